"""The demo job: a generated clip and a manifest that recolours its object."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Final

import numpy as np
import yaml

from tokenflow_batch.config import Settings
from tokenflow_batch.demo.scenes import Clip, recoloured
from tokenflow_batch.files import replacing
from tokenflow_batch.video import Encoding, write_segment

FPS = 12
EDIT: Final = Settings(guidance_scale=5.0, attn_t=0.8, f_t=1.0, conv_site="up_blocks.2.resnets.1")
"""What edits by the demo model are set to.

Its hues drift at the usual guidance of 7.5, and its objects hold still at these thresholds. The
site is a level finer than SD's usual one: like that at 512 pixels, it has 16 × 16 tokens at 128.
"""


def write_clip(path: Path, clip: Clip, *, fps: int = FPS, crf: int = 4) -> None:
    """Encode a generated clip as a video file, a frame at a time."""
    with replacing(path) as partial:
        write_segment(
            partial,
            clip.frames(),
            np.arange(len(clip)),
            time_base=Fraction(1, fps),
            rate=Fraction(fps),
            encoding=Encoding(crf=crf),
        )


def write_demo(folder: Path, *, frames: int, seed: int) -> Path:
    """Write `clip.mp4` and `manifest.yaml` into `folder`; returns the manifest's path."""
    clip = Clip.random(seed, frames)
    now = clip.params(0)
    colour = "blue" if now.color in ("red", "orange", "pink", "yellow") else "red"
    wanted = recoloured(clip, color=colour)
    write_clip(folder / "clip.mp4", clip)
    manifest = {
        "version": 1,
        "model": "demo",
        "output": "results/",
        "defaults": {"preset": "balanced", **EDIT.model_dump(exclude_unset=True)},
        "clips": [
            {
                "video": "clip.mp4",
                "source_prompt": clip.caption,
                "edits": [{"name": colour, "prompt": wanted.caption}],
            }
        ],
    }
    path = folder / "manifest.yaml"
    with replacing(path) as partial:
        partial.write_text(yaml.safe_dump(manifest, sort_keys=False), "utf-8")
    return path
