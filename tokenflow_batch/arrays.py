"""Which arrays each stage stores, and how many bytes they take: numbers only, without torch.

The stages lay their stores out by these functions and `forecast` counts bytes by the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_ITEM = {"int8": 1, "uint8": 1, "float16": 2, "uint16": 2, "float32": 4, "uint32": 4}
_CHECKSUM = 4
_INDEX_ENTRY = 16
"""A shard ends with offset and length of every inner chunk (8 bytes each) and a checksum."""


@dataclass(frozen=True)
class ArraySpec:
    """One array.

    Attributes:
        unit: the kind of unit that writes it; arrays of one kind are committed together.
        lead: sizes of the leading axes that are not frames, one block each (steps, windows).
        frames: size of the frame axis.
        block_frames: frames per block.
        tail: shape of one frame's data.
        dtype: numpy dtype name.
        compress: try zstd (indices compress, latents don't).
    """

    unit: str
    lead: tuple[int, ...]
    frames: int
    block_frames: int
    tail: tuple[int, ...]
    dtype: str
    compress: bool = False

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> ArraySpec:
        """From `dataclasses.asdict` by way of JSON, where tuples became lists."""
        return cls(**{**raw, "lead": tuple(raw["lead"]), "tail": tuple(raw["tail"])})

    @property
    def shape(self) -> tuple[int, ...]:
        """The whole array."""
        return (*self.lead, self.frames, *self.tail)

    @property
    def shard(self) -> tuple[int, ...]:
        """One block."""
        return (*(1 for _ in self.lead), self.block_frames, *self.tail)

    @property
    def inner(self) -> tuple[int, ...]:
        """What is read at once: single frames, so that keyframes can be picked."""
        return (*(1 for _ in self.lead), 1, *self.tail)

    @property
    def frame_bytes(self) -> int:
        """One frame's data, uncompressed."""
        return math.prod(self.tail) * _ITEM[self.dtype]

    def stored_bytes(self, leads: int | None = None, ratio: float = 1.0) -> int:
        """Bytes of its files.

        Args:
            leads: at how many leading positions blocks are kept; all where None.
            ratio: compressed over plain size.
        """
        leads = math.prod(self.lead) if leads is None else leads
        blocks = -(-self.frames // self.block_frames)
        data = self.frames * (self.frame_bytes * ratio + _CHECKSUM)
        return round(leads * (data + blocks * (self.block_frames * _INDEX_ENTRY + _CHECKSUM)))


CONV, CONV8, CONV8_SCALE = "conv", "conv8", "conv8_scale"
"""Convolution features in half precision; in 8 bits, and their scales."""

Specs = dict[str, ArraySpec]
Shape = tuple[int, int, int]


def encode_arrays(frames: int, chunk_frames: int, frame_shape: Shape, dtype: str) -> Specs:
    """Clean latents of (C, h, w)."""
    return {"latents": ArraySpec("encode", (), frames, chunk_frames, frame_shape, dtype)}


def invert_arrays(
    steps: int, frames: int, chunk_frames: int, frame_shape: Shape, dtype: str
) -> Specs:
    """Latents after each inversion step, and how far each frame was from the equation's root."""
    grid = ("invert", (steps,), frames, chunk_frames)
    return {
        "latents": ArraySpec(*grid, frame_shape, dtype),
        "residual": ArraySpec(*grid, (), "float32"),
    }


def match_arrays(
    steps: int,
    frames: int,
    chunk_frames: int,
    tokens: Iterable[int],
    conv: Shape,
    conv_steps: int,
    conv8_steps: int = 0,
) -> Specs:
    """Correspondences, one field per token count, and convolution features of the first steps.

    Features are stored in half precision, in 8 bits with a scale per frame and channel, or both.

    Args:
        steps: T.
        frames: F.
        chunk_frames: frames per block.
        tokens: the token counts that sites have.
        conv: (C, h, w) of the features.
        conv_steps: of how many steps they are kept in half precision.
        conv8_steps: of how many in 8 bits.
    """
    specs = {
        index_name(n): ArraySpec(
            "match", (steps,), frames, chunk_frames, (2, n), index_dtype(n), compress=True
        )
        for n in tokens
    }
    if conv_steps:
        specs[CONV] = ArraySpec("match", (conv_steps,), frames, chunk_frames, conv, "float16")
    if conv8_steps:
        grid = ("match", (conv8_steps,), frames, chunk_frames)
        specs[CONV8] = ArraySpec(*grid, conv, "int8")
        specs[CONV8_SCALE] = ArraySpec(*grid, conv[:1], "float32")
    return specs


def index_name(tokens: int) -> str:
    """The array that holds the correspondences of all sites with so many tokens."""
    return f"index_{tokens}"


def index_dtype(tokens: int) -> str:
    """The smallest unsigned integer type that holds indices below `tokens`.

    Raises:
        ValueError: there is none of at most 32 bits.
    """
    for dtype, bits in (("uint8", 8), ("uint16", 16), ("uint32", 32)):
        if tokens <= 2**bits:
            return dtype
    raise ValueError(f"{tokens} tokens do not fit uint32")


def edit_arrays(
    steps: int,
    frames: int,
    chunk_frames: int,
    frame_shape: Shape,
    windows: tuple[int, int],
    history: int,
) -> Specs:
    """Latents after each step (position 0 stays empty), sampler history, window predictions.

    All float32 whatever the model computes in: they are few, and rounding would add up.

    Args:
        steps: T.
        frames: F.
        chunk_frames: frames per block.
        frame_shape: (C, h, w).
        windows: how many, and the frames of the longest.
        history: tensors of history that the sampler keeps.
    """
    grid = ((steps + 1,), frames, chunk_frames, frame_shape, "float32")
    count, longest = windows
    specs = {name: ArraySpec("advance", *grid) for name in state_names(history)}
    specs["noise"] = ArraySpec("window", (steps, count), longest, longest, frame_shape, "float32")
    return specs


def state_names(history: int) -> list[str]:
    """The arrays of an edit's state between steps."""
    return ["latents", *(f"history_{k}" for k in range(history))]
