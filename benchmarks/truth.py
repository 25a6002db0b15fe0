"""Measures of an edited clip against the generator's ground truth: exact masks, flow, occlusions.

Frames are RGB uint8 (H, W, 3).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from tokenflow_batch.demo.scenes import GROUND, OBJECT, Clip
from tokenflow_batch.demo.textures import COLORS, second_color
from tokenflow_batch.metrics import psnr, warp_error

Frame = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_INSIDE: Final = 2
"""Pixels by which a mask shrinks before colours are read in it."""

_OUTSIDE: Final = 3
"""Pixels by which a mask grows before the background is measured around it."""

_DECIDED: Final = 0.2
"""Least share of the mask whose colour says anything."""


def _square(radius: int) -> NDArray[np.uint8]:
    return np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)


def _lab(rgb: NDArray[np.float32]) -> NDArray[np.float32]:
    lab: NDArray[np.float32] = cv2.cvtColor(rgb, cv2.COLOR_RGB2LAB)
    return lab


def in_place(frame: Frame, mask: Mask, color: str, texture: str) -> bool:
    """Whether most of an object's true mask has the colour asked for.

    Each pixel of the mask counts as the nearest of the palette in CIE Lab. On a textured object
    those nearest to its second, pale colour say nothing and are left out; at least a fifth must
    remain.
    """
    inside = cv2.erode(mask.astype(np.uint8), _square(_INSIDE)).astype(bool)
    names = list(COLORS)
    palette = [COLORS[name] for name in names]
    if texture != "solid":
        palette.append(tuple(float(v) for v in second_color(color)))  # type: ignore[arg-type]
    palette_lab = _lab(np.asarray([palette], np.float32))[0]
    lab = _lab(frame.astype(np.float32) / np.float32(255))[inside]
    nearest = np.linalg.norm(lab[:, None] - palette_lab[None], axis=-1).argmin(axis=1)
    decided = nearest < len(names)
    if not len(nearest) or decided.mean() < _DECIDED:
        return False
    return bool(np.mean(nearest[decided] == names.index(color)) > 0.5)


def background_psnr(frame: Frame, reference: Frame, objects: Mask) -> float:
    """PSNR in dB of what is well outside the objects."""
    outside = ~cv2.dilate(objects.astype(np.uint8), _square(_OUTSIDE)).astype(bool)
    return psnr(frame, reference, outside)


def gradient_energy(frame: Frame, mask: Mask) -> float:
    """Mean squared brightness gradient inside a mask, in [0, 1]² per pixel²: falls with blur."""
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY).astype(np.float32) / 255
    gy, gx = np.gradient(grey)
    inside = cv2.erode(mask.astype(np.uint8), _square(_INSIDE)).astype(bool)
    return float(np.mean((gx**2 + gy**2)[inside])) if inside.any() else float("nan")


def warp_errors(frames: Sequence[Frame], clip: Clip) -> dict[str, float]:
    """Mean warp error × 10³ along the exact flow, outside occlusions.

    Returns:
        `all` pixels, the first `object`'s and the `ground`'s; the mean over consecutive pairs.
    """
    found: dict[str, list[float]] = {"all": [], "object": [], "ground": []}
    for i in range(len(frames) - 1):
        flow, layers, visible = clip.flow(i), clip.layers(i), ~clip.occluded(i)
        regions = {
            "all": visible,
            "object": visible & (layers == OBJECT),
            "ground": visible & (layers == GROUND),
        }
        for name, region in regions.items():
            found[name].append(1e3 * warp_error(frames[i], frames[i + 1], flow, region))
    known = {name: [v for v in values if not np.isnan(v)] for name, values in found.items()}
    return {name: float(np.mean(v)) if v else float("nan") for name, v in known.items()}
