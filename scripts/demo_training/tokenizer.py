"""A CLIP tokenizer with a small vocabulary of its own: every word of the captions is one token."""

from __future__ import annotations

import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Final

from transformers import CLIPTokenizer

from demo_training.export import make_readable
from tokenflow_batch.demo.captions import GROUND_WORDS, SHAPE_WORDS, TEXTURE_WORDS
from tokenflow_batch.demo.textures import COLORS

MAX_TOKENS: Final = 24
"""Tokens per caption, start and end included."""

_WORD_END: Final = "</w>"
_OTHER_WORDS: Final = (
    "a an the on in of over front photo image picture shape and with at under small big large "
    "moving video left right textured colored coloured"
)


def words() -> list[str]:
    """All words that become one token, sorted; others fall back to characters."""
    synonyms = [*SHAPE_WORDS.values(), *TEXTURE_WORDS.values(), *GROUND_WORDS.values()]
    known = {word for group in synonyms for synonym in group for word in synonym.split()}
    return sorted(known | set(COLORS) | set(_OTHER_WORDS.split()))


def _apply(merge: tuple[str, str], symbols: list[str]) -> list[str]:
    merged: list[str] = []
    position = 0
    while position < len(symbols):
        width = 2 if tuple(symbols[position : position + 2]) == merge else 1
        merged.append("".join(symbols[position : position + width]))
        position += width
    return merged


def train_merges(vocabulary: list[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding of a word list, until every word is one symbol.

    Args:
        vocabulary: the words, each counted once.

    Returns:
        Merges in the order in which they apply; ties go to the later pair in the alphabet.
    """
    sequences = [[*word[:-1], word[-1] + _WORD_END] for word in vocabulary]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for symbols in sequences for pair in pairwise(symbols)):
        merges.append(max(pairs, key=lambda pair: (pairs[pair], pair)))
        sequences = [_apply(merges[-1], symbols) for symbols in sequences]
    return merges


def build(folder: Path) -> CLIPTokenizer:
    """Train the tokenizer and save it.

    Args:
        folder: where tokenizer.json, vocab.json and merges.txt go; made if missing.

    Returns:
        The tokenizer, which pads with and ends on the end-of-text token.
    """
    merges = train_merges(words())
    characters = [chr(code) for code in range(33, 127)]
    symbols = [
        *characters,
        *(character + _WORD_END for character in characters),
        *("".join(merge) for merge in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocab = {symbol: number for number, symbol in enumerate(dict.fromkeys(symbols))}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)
    # transformers 5 saves tokenizer.json alone; earlier versions read these two.
    (folder / "vocab.json").write_text(json.dumps(vocab))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    make_readable(folder)
    return tokenizer
