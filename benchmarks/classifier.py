"""Reads shapes, colours, textures and ground from a picture: the judge of what a prompt gave.

    python benchmarks/classifier.py train                   # 10 minutes on one CPU core
    python benchmarks/classifier.py train --go-on --steps 2000 --rate 1e-3
    python benchmarks/classifier.py evaluate                # accuracy on held-out scenes

A small convolutional network with a transformer of three queries on top: the object further to the
left, the one further to the right (or none), and the ground. It learns from rendered scenes of the
full domain alone, never from anything the demo model or its autoencoder made, so that it is no
party to what it judges.

Tensor suffixes: N pictures, C channels, H and W pixels, P places of the feature map.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import cv2
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tokenflow_batch.demo.stills import TRAINED, SceneParams, Thing, render, sample
from tokenflow_batch.demo.textures import COLORS, GROUNDS, SHAPES, TEXTURES

WEIGHTS: Final = Path(__file__).with_name("classifier.safetensors")
SIZE: Final = 128
"""Side of the pictures in pixels; others are resized."""

ATTRIBUTES: Final[dict[str, Sequence[str]]] = {
    "shape": SHAPES,
    "color": tuple(COLORS),
    "texture": TEXTURES,
}
DOMAIN: Final = replace(TRAINED, pairs=0.5)
_WIDTHS: Final = (32, 64, 128)
_TRAIN, _HELD_OUT, _MORE = 11, 12, 13


@dataclass(frozen=True)
class Reading:
    """What is seen in a picture.

    Attributes:
        objects: (shape, colour, texture) of each object, from left to right.
        ground: what they are on.
    """

    objects: tuple[tuple[str, str, str], ...]
    ground: str


class Residual(nn.Module):
    """Two convolutions beside the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(8, width),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x_NCHW: Tensor) -> Tensor:
        """Shape is kept."""
        out: Tensor = x_NCHW + self.body(x_NCHW)
        return out


class Classifier(nn.Module):
    """Pictures (N, 3, 128, 128) float32 in [0, 1] to logits: see `forward`."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, _WIDTHS[0], 6, stride=4, padding=1)]
        for width, following in zip(_WIDTHS, (*_WIDTHS[1:], None), strict=True):
            layers += [Residual(width), Residual(width)]
            if following:
                layers.append(nn.Conv2d(width, following, 2, stride=2))
        self.trunk = nn.Sequential(*layers, nn.GroupNorm(8, _WIDTHS[-1]))
        width, places = _WIDTHS[-1], (SIZE // 16) ** 2
        self.place = nn.Parameter(torch.randn(places, width) * 0.1)
        self.query = nn.Parameter(torch.randn(3, width) * 0.1)
        layer = nn.TransformerEncoderLayer(width, 4, 256, 0.0, batch_first=True, norm_first=True)
        self.mixer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        sizes = [len(names) + 1 for names in ATTRIBUTES.values()]
        self.object_head = nn.Linear(width, sum(sizes))
        self.ground_head = nn.Linear(width, len(GROUNDS))
        self.sizes = sizes

    def forward(self, pixels_NCHW: Tensor) -> tuple[list[Tensor], Tensor]:
        """Logits.

        Returns:
            Per attribute (N, 2, classes + 1), left and right object, the last class meaning that
            there is no such object; and the ground's (N, 6).
        """
        features_NPC = self.trunk(pixels_NCHW * 2 - 1).flatten(2).transpose(1, 2) + self.place
        queries = self.query.expand(len(features_NPC), -1, -1)
        mixed = self.mixer(torch.cat([queries, features_NPC], 1))[:, :3]
        return list(self.object_head(mixed[:, :2]).split(self.sizes, -1)), self.ground_head(
            mixed[:, 2]
        )


def _left_to_right(params: SceneParams) -> list[Thing | SceneParams]:
    return sorted(params.objects, key=lambda thing: thing.center_x)


def labels(params: SceneParams) -> tuple[list[list[int]], int]:
    """Class numbers: per attribute those of the left and the right object, and the ground's."""
    things = _left_to_right(params)
    per_attribute = [
        [names.index(getattr(thing, attribute)) for thing in things]
        + [len(names)] * (2 - len(things))
        for attribute, names in ATTRIBUTES.items()
    ]
    return per_attribute, GROUNDS.index(params.ground)


def _worn(image_HWC: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.float32]:
    """Blur, contrast and noise, as any model's pictures have them."""
    if rng.random() < 0.5:
        image_HWC = cv2.GaussianBlur(image_HWC, (0, 0), rng.uniform(0.3, 1.3))
    image_HWC = (image_HWC - 0.5) * np.float32(rng.uniform(0.9, 1.15)) + 0.5
    noise = rng.standard_normal(image_HWC.shape, dtype=np.float32)
    return np.clip(image_HWC + np.float32(rng.uniform(0, 0.04)) * noise, 0, 1)


def batch(
    stream: int, step: int, count: int, worn: bool
) -> tuple[Tensor, list[Tensor], Tensor, list[SceneParams]]:
    """Pictures, labels and scenes as a function of the arguments."""
    rng = np.random.default_rng([stream, step])
    scenes = [sample(rng, DOMAIN) for _ in range(count)]
    images = [render(params, SIZE)[0] for params in scenes]
    if worn:
        images = [_worn(image, rng) for image in images]
    pixels_NCHW = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
    known = [labels(params) for params in scenes]
    per_attribute = [torch.tensor([row[0][i] for row in known]) for i in range(len(ATTRIBUTES))]
    return pixels_NCHW, per_attribute, torch.tensor([row[1] for row in known]), scenes


def load() -> Classifier:
    """The trained classifier, float32, on the CPU."""
    classifier = Classifier()
    classifier.load_state_dict({k: v.float() for k, v in load_file(WEIGHTS).items()})
    return classifier.eval()


@torch.inference_mode()
def read(classifier: Classifier, images: Sequence[NDArray[np.uint8]]) -> list[Reading]:
    """Read pictures.

    Args:
        classifier: from `load`.
        images: RGB (H, W, 3) uint8, square, of any size.

    Returns:
        One reading each.
    """
    resized = [cv2.resize(x, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for x in images]
    pixels_NCHW = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).float() / 255
    attributes, grounds = classifier(pixels_NCHW)
    # Whether there is an object is decided once, by its shape.
    there = attributes[0].argmax(-1) < len(SHAPES)
    readings = []
    for n, ground in enumerate(grounds.argmax(-1).tolist()):
        objects = [
            tuple(
                names[int(logits[n, slot, :-1].argmax())]
                for names, logits in zip(ATTRIBUTES.values(), attributes, strict=True)
            )
            for slot in range(2)
            if there[n, slot]
        ]
        readings.append(Reading(tuple((s, c, t) for s, c, t in objects), GROUNDS[ground]))
    return readings


Look = tuple[str, str, str]
"""Shape, colour and texture."""


def _paired(reading: Reading, params: SceneParams) -> list[tuple[Look, Look]]:
    """What was read of which object, (seen, asked), in the order in which more is right."""
    wanted = [(thing.shape, thing.color, thing.texture) for thing in params.objects]
    orders = [list(zip(reading.objects, order, strict=False)) for order in (wanted, wanted[::-1])]
    return max(orders, key=lambda pairs: sum(sum(_hits(*pair)) for pair in pairs))


def _hits(seen: Look, asked: Look) -> list[bool]:
    return [a == b for a, b in zip(seen, asked, strict=True)]


def agreement(reading: Reading, params: SceneParams) -> dict[str, float]:
    """Share of a scene's objects that were read right, by attribute, in the better order.

    A missing object counts as wrong in everything.
    """
    hits = [_hits(*pair) for pair in _paired(reading, params)]
    number = len(params.objects)
    shares = {name: sum(h[i] for h in hits) / number for i, name in enumerate(ATTRIBUTES)}
    return shares | {
        "ground": float(reading.ground == params.ground),
        "count": float(len(reading.objects) == number),
    }


def first_right(reading: Reading, params: SceneParams) -> dict[str, float]:
    """The same of the first object alone, `first_…`."""
    thing = params.objects[0]
    own = (thing.shape, thing.color, thing.texture)
    found = [_hits(seen, asked) for seen, asked in _paired(reading, params) if asked == own]
    return {
        f"first_{name}": float(bool(found) and found[0][i]) for i, name in enumerate(ATTRIBUTES)
    }


def evaluate(count: int = 2000) -> dict[str, dict[str, float]]:
    """Accuracies on scenes that training did not see, clean and worn, of one object and of two."""
    classifier = load()
    table: dict[str, dict[str, float]] = {}
    for worn in (False, True):
        rows: dict[int, list[dict[str, float]]] = {1: [], 2: []}
        for step in range(math.ceil(count / 100)):
            pixels_NCHW, _, _, scenes = batch(_HELD_OUT, step, 100, worn)
            frames = (pixels_NCHW.permute(0, 2, 3, 1) * 255).round().byte().numpy()
            for reading, params in zip(read(classifier, list(frames)), scenes, strict=True):
                rows[len(params.objects)].append(agreement(reading, params))
        for number, found in rows.items():
            name = f"{'worn' if worn else 'clean'}, {number} object{'s' * (number - 1)}"
            table[name] = {k: round(float(np.mean([r[k] for r in found])), 4) for k in found[0]}
    return table


def train(steps: int, count: int, rate: float, *, go_on: bool) -> None:
    """Train from nothing, or from the saved weights on other scenes; save in half precision."""
    torch.manual_seed(0)
    classifier = (load() if go_on else Classifier()).train()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    for step in range(steps):
        pixels_NCHW, attributes, grounds, _ = batch(
            _MORE if go_on else _TRAIN, step, count, worn=True
        )
        found, ground = classifier(pixels_NCHW)
        losses = [
            F.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            for logits, wanted in zip(found, attributes, strict=True)
        ]
        loss = sum(losses, F.cross_entropy(ground, grounds))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0:
            print(step + 1, *(f"{x.item():.4f}" for x in (*losses, loss)), flush=True)
    save_file({k: v.half().contiguous() for k, v in classifier.state_dict().items()}, WEIGHTS)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="train and save the weights")
    training.add_argument("--steps", type=int, default=1500)
    training.add_argument("--batch", type=int, default=32)
    training.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    training.add_argument("--go-on", action="store_true", help="start from the saved weights")
    training.add_argument("--threads", type=int, default=1)
    measuring = commands.add_parser("evaluate", help="accuracy on held-out scenes")
    measuring.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    if args.command == "train":
        torch.set_num_threads(args.threads)
        train(args.steps, args.batch, args.rate, go_on=args.go_on)
        return
    table = evaluate()
    for name, row in table.items():
        print(f"{name:18}", *(f"{key} {value:.4f}" for key, value in row.items()), sep="  ")
    if args.json:
        date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
        report = {"date": date, "accuracy": table}
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
