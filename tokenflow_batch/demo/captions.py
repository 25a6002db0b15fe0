"""Captions of the synthetic scenes: the grammar that the demo model's text encoder learns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from tokenflow_batch.demo.stills import SceneParams, Thing

SHAPE_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "circle": ("ball", "circle"),
    "square": ("square", "box"),
    "triangle": ("triangle", "pyramid"),
    "star": ("star",),
    "heart": ("heart",),
}
TEXTURE_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "solid": ("", "", "", "solid", "plain"),
    "striped": ("striped",),
    "checkered": ("checkered", "checkerboard"),
    "dotted": ("dotted", "spotted"),
}
GROUND_WORDS: Final[dict[str, tuple[str, ...]]] = {
    "grass": ("grass", "lawn"),
    "sand": ("sand", "beach"),
    "water": ("water", "sea"),
    "night": ("night sky", "starry sky"),
    "brick": ("brick wall", "bricks"),
    "snow": ("snow",),
}
"""Words for each attribute; the first is the plain one, repeats make a word likelier."""

PREPOSITIONS: Final = ("on", "on", "on the", "in", "in front of", "over the", "on a")
_SIZE_WORDS: Final = ((0.2, ("small",)), (0.3, ("big", "large")))
"""Below the first radius an object may be called small, above the second one big."""


def _pick(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]


def _article(noun: str) -> str:
    return "an" if noun.startswith("orange") else "a"


def _drawn_noun(thing: Thing | SceneParams, rng: np.random.Generator) -> str:
    """Name an object with its article, in one of many ways."""
    shape = _pick(SHAPE_WORDS[thing.shape], rng)
    texture = _pick(TEXTURE_WORDS[thing.texture], rng)
    color = thing.color
    vague = rng.random()
    if vague < 0.05:
        color = ""
    elif vague < 0.08:
        shape = "shape"
    words = [color, texture] if rng.random() < 0.6 else [texture, color]
    if rng.random() < 0.15:
        (small, small_words), (big, big_words) = _SIZE_WORDS
        if thing.radius < small:
            words.insert(0, _pick(small_words, rng))
        elif thing.radius > big:
            words.insert(0, _pick(big_words, rng))
    noun = " ".join([word for word in words if word] + [shape])
    return f"{'the' if rng.random() < 0.15 else _article(noun)} {noun}"


def caption(params: SceneParams, rng: np.random.Generator) -> str:
    """Draw a caption from the training grammar.

    Words vary by synonym, order, article, preposition and opening; 5 % leave a colour out, 3 % say
    "shape" for a shape, 6 % leave the ground out, some name an uncommon size. Light is never named.

    Args:
        params: the scene to describe.
        rng: source of the draws.

    Returns:
        The caption, lower case, without a full stop.
    """
    nouns = [_drawn_noun(thing, rng) for thing in params.objects]
    if len(nouns) > 1 and rng.random() < 0.5:
        nouns.reverse()
    things = " and ".join(nouns)
    ground = _pick(GROUND_WORDS[params.ground], rng)
    preposition = _pick(PREPOSITIONS, rng)

    form = rng.random()
    if form < 0.06:
        text = things
    elif form < 0.10:
        text = f"{ground}, {things}"
    else:
        text = f"{things} {preposition} {ground}"

    opening = rng.random()
    if opening < 0.12:
        return f"a photo of {text}"
    if opening < 0.20:
        return f"an image of {text}"
    if opening < 0.25:
        return f"a picture of {text}"
    return text


def describe(params: SceneParams) -> str:
    """Name a scene plainly, e.g. "a red striped ball and a blue star on grass".

    Args:
        params: the scene to describe; a solid texture is not named.

    Returns:
        One caption of the training grammar, always the same for the same attributes.
    """
    nouns = []
    for thing in params.objects:
        words = [thing.color, TEXTURE_WORDS[thing.texture][0], SHAPE_WORDS[thing.shape][0]]
        noun = " ".join(word for word in words if word)
        nouns.append(f"{_article(noun)} {noun}")
    return f"{' and '.join(nouns)} on {GROUND_WORDS[params.ground][0]}"
