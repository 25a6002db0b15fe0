"""encode: video file → stream facts and clean latents (the VAE posterior's mean)."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from tokenflow_batch.arrays import encode_arrays
from tokenflow_batch.errors import VideoError
from tokenflow_batch.files import replacing
from tokenflow_batch.geometry import Fit, plan_geometry
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.stages.base import Stage, StageContext
from tokenflow_batch.stages.clip import (
    CUTS,
    CUTS_FILE,
    FACTS_FILE,
    PROBE,
    PTS_FILE,
    Clip,
    read_clip,
)
from tokenflow_batch.store import unit_name
from tokenflow_batch.tokenflow.windows import Chunk
from tokenflow_batch.video import find_cuts, probe, read_frames


class Encode(Stage):
    """Units: `probe` (one decoding pass over the file), then one per chunk of frames."""

    name = "encode"

    def run(self, context: StageContext, folder: StageFolder) -> None:
        """See `Stage.run`."""
        sharing = context.sharing
        sharing.once(folder, PROBE, lambda: _probe(context, folder))
        clip = read_clip(context)
        sharing.once(folder, CUTS, lambda: _find_cuts(context, folder, clip))
        model = context.model()
        frame_shape = model.frame_shape(clip.geometry.working)
        specs = encode_arrays(clip.frames, clip.chunk_frames, frame_shape, context.float_dtype)
        store = context.store(folder, specs)
        units = {unit_name("encode", (chunk.index,)): chunk for chunk in clip.chunks}
        missing = [chunk for unit, chunk in units.items() if not folder.committed(unit)]
        with context.progress("encode", sum(map(len, missing))) as advance:
            for chunk, frames in _frames_of(context, clip, sharing.share(folder, units)):
                began, latents, done = time.perf_counter(), [], chunk.start
                while batch := list(islice(frames, context.settings.vae_batch)):
                    what = f"encoding frames {done} to {done + len(batch) - 1}"
                    latents.append(model.encode(np.stack(batch), what).numpy())
                    done += len(batch)
                    advance(len(batch))
                facts = {"frames": len(chunk), "seconds": time.perf_counter() - began}
                store.write((chunk.index,), {"latents": np.concatenate(latents)}, facts)


def _probe(context: StageContext, folder: StageFolder) -> None:
    job = context.job
    with context.progress("probe", 0) as advance:
        facts = probe(job.video, lambda _: advance(1), job.part)
    s, multiple = job.settings, context.model().multiple
    try:
        geometry = plan_geometry((facts.width, facts.height), s.resolution, Fit(s.fit), multiple)
    except ValueError as error:
        raise VideoError(
            f"{job.video}: {error}", hint=f"change `resolution` ({job.where})"
        ) from None
    if facts.damaged:
        context.warn(
            f"{job.video}: {facts.damaged} frames or packets are damaged; "
            "what can be decoded of them is kept"
        )
    if facts.high_dynamic_range:
        context.warn(f"{job.video}: high dynamic range comes out as plain 8-bit BT.709")
    if geometry.crops:
        context.warn(f"{job.video}: {geometry.describe()}")
    with replacing(folder.files / FACTS_FILE) as path:
        path.write_text(json.dumps(facts.to_json()), "utf-8")
    with replacing(folder.files / PTS_FILE) as path, path.open("wb") as file:
        np.save(file, facts.pts, allow_pickle=False)
    files = [folder.files / FACTS_FILE, folder.files / PTS_FILE]
    folder.commit(PROBE, files, {"multiple": multiple, **folder.lap.take()})


def _find_cuts(context: StageContext, folder: StageFolder, clip: Clip) -> None:
    with context.progress("shots", clip.frames) as advance:

        def told() -> Iterator[NDArray[np.uint8]]:
            for frame in read_frames(context.job.video, clip.facts):
                yield frame
                advance(1)

        cuts = find_cuts(told(), clip.facts.rate)
    with replacing(folder.files / CUTS_FILE) as path:
        path.write_text(json.dumps(cuts), "utf-8")
    facts = {"cuts": len(cuts), **folder.lap.take()}
    folder.commit(CUTS, [folder.files / CUTS_FILE], facts)


def _frames_of(
    context: StageContext, clip: Clip, chunks: Iterator[Chunk]
) -> Iterator[tuple[Chunk, Iterator[NDArray[np.uint8]]]]:
    """Each chunk, in ascending order, with its frames at working size, from one reading."""
    frames, read = None, 0
    for chunk in chunks:
        if frames is None:
            frames, read = read_frames(context.job.video, clip.facts, chunk.start), chunk.start
        for _ in islice(frames, chunk.start - read):  # of chunks that others have
            pass
        yield chunk, map(clip.geometry.apply, islice(frames, len(chunk)))
        read = chunk.stop
