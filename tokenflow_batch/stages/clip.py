"""What the encode stage found out about a clip, and its clean and inverted latents, for readers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from tokenflow_batch.config import Settings
from tokenflow_batch.errors import VideoError
from tokenflow_batch.geometry import Fit, Geometry, plan_geometry
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.plan import layout_of
from tokenflow_batch.stages.base import StageContext
from tokenflow_batch.store import ArrayStore, Reads
from tokenflow_batch.tokenflow.ddim import Schedule
from tokenflow_batch.tokenflow.keyframes import Segment, segments
from tokenflow_batch.tokenflow.windows import Chunk, Layout, chunks
from tokenflow_batch.video import VideoFacts

PROBE = "probe"
FACTS_FILE, PTS_FILE = "facts.json", "pts.npy"
CUTS, CUTS_FILE = "cuts", "cuts.json"


@dataclass(frozen=True)
class Clip:
    """A probed source video and how it is cut.

    Attributes:
        facts: the stream facts, timestamps included.
        geometry: from source to working size.
        chunk_frames: frames per chunk.
        segment_length: frames per keyframe.
        cuts: first frames of all shots but the first.
    """

    facts: VideoFacts
    geometry: Geometry
    chunk_frames: int
    segment_length: int
    cuts: tuple[int, ...] = ()

    @property
    def frames(self) -> int:
        """F."""
        return self.facts.frames

    @cached_property
    def chunks(self) -> list[Chunk]:
        """The unit grid."""
        return chunks(self.frames, self.chunk_frames)

    @cached_property
    def segments(self) -> list[Segment]:
        """Keyframe segments."""
        return segments(self.frames, self.segment_length, self.cuts)

    def layout(self, settings: Settings) -> Layout:
        """The windows of an edit."""
        return layout_of(settings, self.frames, self.cuts)


def read_clip(context: StageContext) -> Clip:
    """Read what encode's probe committed.

    Raises:
        DamagedUnit: the facts are not what was committed.
        ValueError: the requested resolution is none of the model's (the probe has refused it).
    """
    folder = context.folder("encode")
    record = folder.check(PROBE)
    raw = json.loads((folder.files / FACTS_FILE).read_text("utf-8"))
    facts = VideoFacts.from_json(raw, np.load(folder.files / PTS_FILE, allow_pickle=False))
    s = context.settings
    geometry = plan_geometry(
        (facts.width, facts.height), s.resolution, Fit(s.fit), int(record.facts["multiple"])
    )
    return Clip(facts, geometry, s.chunk_frames, s.segment_length, _cuts(context, facts.frames))


def _cuts(context: StageContext, frames: int) -> tuple[int, ...]:
    """As found or as given; none in official mode, which knows no shots.

    Raises:
        DamagedUnit: what was found is not what was committed.
        VideoError: a given cut is not inside the clip.
    """
    s, folder = context.settings, context.folder("encode")
    if s.mode == "official" or s.cuts == "none":
        return ()
    if s.cuts != "auto":
        outside = [cut for cut in s.cuts if not 0 < cut < frames]
        if outside:
            raise VideoError(
                f"{context.job.video}: cut at frame {outside[0]} of {frames} frames",
                hint=f"`cuts` names the first frames of new shots ({context.job.where})",
            )
        return s.cuts
    if not folder.committed(CUTS):
        return ()  # not yet looked for, and nothing before that needs them
    folder.check(CUTS)
    found: list[int] = json.loads((folder.files / CUTS_FILE).read_text("utf-8"))
    return tuple(found)


class CleanLatents:
    """Encode's latents, (F, C, h, w)."""

    def __init__(self, folder: StageFolder) -> None:
        self._store = ArrayStore.open(folder)

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, h, w)."""
        channels, height, width = self._store.specs["latents"].tail
        return channels, height, width

    def read(self, frames: Sequence[int]) -> Tensor:
        """(N, C, h, w) float32."""
        return torch.from_numpy(self._store.read("latents", (), frames)).float()


class InvertedLatents:
    """Invert's latents at every sampling step, read together with others where `reads` is given."""

    def __init__(
        self,
        folder: StageFolder,
        sampling: Schedule,
        inversion: Schedule,
        reads: Reads | None = None,
    ) -> None:
        self._store, self._reads = ArrayStore.open(folder), reads
        ascending = {t: i for i, t in enumerate(reversed(inversion.timesteps))}
        self._position = [ascending[t] for t in sampling.timesteps]

    def read(self, step: int, frames: Sequence[int]) -> Tensor:
        """(N, C, h, w) float32 at sampling step `step`."""
        data = self._store.shared(self._reads, "latents", (self._position[step],), frames)
        return torch.from_numpy(data).float()

    def noisiest(self, frames: Sequence[int]) -> Tensor:
        """(N, C, h, w) float32 after the last inversion step, which may be past the sampling's."""
        data = self._store.read("latents", (self._store.specs["latents"].lead[0] - 1,), frames)
        return torch.from_numpy(data).float()
