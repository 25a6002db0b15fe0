"""render: edited latents → video file with the source's timestamps and audio."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_batch.ahead import ahead
from tokenflow_batch.files import replacing
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.models import Model
from tokenflow_batch.stages.base import Advance, Stage, StageContext
from tokenflow_batch.stages.clip import Clip, read_clip
from tokenflow_batch.stages.edit import read_edited
from tokenflow_batch.store import unit_name
from tokenflow_batch.tokenflow.windows import Chunk, batches
from tokenflow_batch.video import Encoding, join, read_frames, write_segment

VIDEO, VIDEO_FILE = "video", "video.mp4"
Frame = NDArray[np.uint8]


class Render(Stage):
    """Units: one per chunk (an encoded segment), then `video`: the segments joined, with audio."""

    name = "render"

    def run(self, context: StageContext, folder: StageFolder) -> None:
        """See `Stage.run`."""
        clip, sharing = read_clip(context), context.sharing
        units = {unit_name("segment", (chunk.index,)): chunk for chunk in clip.chunks}
        sharing.agree(folder, "begun", lambda: _forget_dropped(folder, units))
        if not folder.committed(VIDEO):
            _render_segments(context, folder, clip, units)
            sharing.once(folder, VIDEO, lambda: _join(context, folder, clip, units))
        with sharing.busy(folder):
            if sharing.mine(folder, "drop"):
                for unit in units:
                    folder.drop(unit)
                # And what killed processes have left there.
                shutil.rmtree(folder.folder / "segments", ignore_errors=True)


def _forget_dropped(folder: StageFolder, units: Iterable[str]) -> None:
    """Segments that were dropped after a join whose result has been lost since."""
    for unit in units:
        if not folder.committed(VIDEO) and folder.committed(unit) and not folder.available(unit):
            folder.forget(unit)


def _join(context: StageContext, folder: StageFolder, clip: Clip, units: Iterable[str]) -> None:
    for unit in units:
        folder.check(unit)
    segments = [_segment_path(folder, chunk) for chunk in clip.chunks]
    source = context.job.video if context.settings.audio else None
    output = folder.files / VIDEO_FILE
    for warning in join(segments, clip.facts, source, output):
        context.warn(f"{context.job.video}: {warning}")
    folder.commit(VIDEO, [output], folder.lap.take())


def _segment_path(folder: StageFolder, chunk: Chunk) -> Path:
    return folder.files / "segments" / f"{chunk.index:05d}.mp4"


def _render_segments(
    context: StageContext, folder: StageFolder, clip: Clip, units: Mapping[str, Chunk]
) -> None:
    missing = [chunk for unit, chunk in units.items() if not folder.committed(unit)]
    if not missing:
        return
    undo, model = _undo(context, clip, missing[0].start), context.model()
    with context.progress("render", sum(map(len, missing))) as advance:
        done = missing[0].start
        for chunk in context.sharing.share(folder, units):
            undo.skip(chunk.start - done)
            path, began = _segment_path(folder, chunk), time.perf_counter()
            with replacing(path) as partial:
                write_segment(
                    partial,
                    map(undo, _decoded(context, model, chunk, advance)),
                    clip.facts.pts[chunk.start : chunk.stop],
                    time_base=clip.facts.time_base,
                    rate=clip.facts.rate,
                    encoding=Encoding(crf=context.settings.crf),
                    sample_aspect_ratio=undo.sample_aspect_ratio,
                )
            seconds = time.perf_counter() - began
            facts = {"frames": len(chunk), "seconds": seconds, **folder.lap.take()}
            _commit_behind(folder, unit_name("segment", (chunk.index,)), path, facts)
            done = chunk.stop


def _commit_behind(folder: StageFolder, unit: str, path: Path, facts: Mapping[str, Any]) -> None:
    def commit() -> None:
        began = time.perf_counter()
        took = lambda: {**facts, "store": round(time.perf_counter() - began, 6)}  # noqa: E731
        folder.commit(unit, [path], took)

    folder.commit_behind(unit, commit)


def _decoded(
    context: StageContext, model: Model, chunk: Chunk, advance: Advance
) -> Iterator[Frame]:
    """A chunk's edited frames at working size."""
    parts = batches(chunk.frames, context.settings.vae_batch)
    done = chunk.start
    for latents in ahead((read_edited(context, frames) for frames in parts), 1):
        yield from model.decode(latents, f"decoding frames {done} to {done + len(latents) - 1}")
        done += len(latents)
        advance(len(latents))


class _Undo:
    """From working size to output size."""

    def __init__(self, clip: Clip, source: Iterator[Frame] | None, *, restore: bool) -> None:
        self._geometry, self._source, self._restore = clip.geometry, source, restore
        sar = clip.facts.sample_aspect_ratio
        self.sample_aspect_ratio = sar if restore else clip.geometry.working_aspect(sar)

    def __call__(self, frame: Frame) -> Frame:
        if not self._restore:
            return frame
        return self._geometry.undo(frame, next(self._source) if self._source else None)

    def skip(self, frames: int) -> None:
        """Leave source frames out that belong to segments already there."""
        if self._source is not None:
            for _ in islice(self._source, frames):
                pass


def _undo(context: StageContext, clip: Clip, start: int) -> _Undo:
    restore = context.settings.restore_size
    source = None
    if restore and clip.geometry.crops:  # what was cropped away comes from the source
        source = read_frames(context.job.video, clip.facts, start)
    return _Undo(clip, source, restore=restore)
