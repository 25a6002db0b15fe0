"""report: what came out, measured (metrics.json) and to look at (contact sheet, side by side)."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tokenflow_batch.files import replacing
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.metrics import Consistency, Looks, Seams
from tokenflow_batch.sheet import contact_sheet, sample_times
from tokenflow_batch.stage_names import STAGES
from tokenflow_batch.stages.base import Stage, StageContext
from tokenflow_batch.stages.clip import Clip, read_clip
from tokenflow_batch.stages.render import VIDEO, VIDEO_FILE
from tokenflow_batch.tokenflow.windows import Layout
from tokenflow_batch.video import Encoding, join, probe, read_frames, write_segment
from tokenflow_batch.work import Work

REPORT = "report"
METRICS, SHEET, SIDE_BY_SIDE = "metrics.json", "contact_sheet.png", "side_by_side.mp4"
Frame = NDArray[np.uint8]


class Report(Stage):
    """One unit: three files."""

    name = "report"

    def run(self, context: StageContext, folder: StageFolder) -> None:
        """See `Stage.run`."""
        context.sharing.once(folder, REPORT, lambda: _report(context, folder))


def _report(context: StageContext, folder: StageFolder) -> None:
    clip, began = read_clip(context), time.perf_counter()
    rendered = context.folder("render")
    rendered.check(VIDEO)
    edited = rendered.files / VIDEO_FILE
    with context.progress("report", 2 * clip.frames) as advance:

        def counted() -> Iterator[tuple[Frame, Frame]]:
            for pair in _pairs(context, clip, edited):
                yield pair
                advance(1)

        looks = Looks(), Looks()
        consistency = Consistency.of(_looked_at(counted(), looks))
        shown = _side_by_side(context, clip, counted(), folder)
    with replacing(folder.files / SHEET) as path:
        times = [
            float((clip.facts.pts[i] - clip.facts.pts[0]) * clip.facts.time_base) for i in shown
        ]
        contact_sheet(
            path,
            f"{context.settings.source_prompt!r} to {context.settings.prompt!r}",
            [f"{t:.2f} s" for t in times],
            {"source": [s for s, _ in shown.values()], "edit": [e for _, e in shown.values()]},
        )
    metrics = _metrics(context, clip, consistency)
    metrics["seams"] = _seams(clip, clip.layout(context.settings), looks)
    with replacing(folder.files / METRICS) as path:
        path.write_text(json.dumps(metrics, indent=1) + "\n", "utf-8")
    seconds = time.perf_counter() - began
    facts = {"frames": clip.frames, "seconds": seconds, **folder.lap.take()}
    folder.commit(REPORT, [folder.files / name for name in (METRICS, SHEET, SIDE_BY_SIDE)], facts)


def _pairs(context: StageContext, clip: Clip, edited: Path) -> Iterator[tuple[Frame, Frame]]:
    """Source and edited frames at the output's size."""
    shape = clip.geometry.source if context.settings.restore_size else clip.geometry.working
    width, height = shape
    source = read_frames(context.job.video, clip.facts)
    result = read_frames(edited, probe(edited))
    for before, after in zip(source, result, strict=True):
        shown = before if context.settings.restore_size else clip.geometry.apply(before)
        yield shown, after[:height, :width]  # the coded picture may have one row or column more


def _looked_at(
    pairs: Iterable[tuple[Frame, Frame]], looks: tuple[Looks, Looks]
) -> Iterator[tuple[Frame, Frame]]:
    for pair in pairs:
        for own, frame in zip(looks, pair, strict=True):
            own.add(frame)
        yield pair


def _seams(clip: Clip, layout: Layout, looks: tuple[Looks, Looks]) -> dict[str, Any]:
    """Changes across the joins of windows against changes elsewhere, and drift; None: no joins."""
    found: dict[str, Any] = {"joins": list(layout.joins), "gap_frames": clip.segment_length}
    for name, own in zip(("source", "edited"), looks, strict=True):
        changes = own.changes(clip.segment_length, clip.cuts)
        seams = (Seams.of(change, clip.segment_length, layout.joins) for change in changes)
        drift = own.drift(min(map(len, layout.windows)))
        found[name] = {
            kind: {"join": seam and asdict(seam), "drift": drifted}
            for kind, seam, drifted in zip(("colour", "texture"), seams, drift, strict=True)
        }
    return found


def _side_by_side(
    context: StageContext, clip: Clip, pairs: Iterator[tuple[Frame, Frame]], folder: StageFolder
) -> dict[int, tuple[Frame, Frame]]:
    """Write source | edit as a video; keep the pairs for the contact sheet on the way."""
    kept: dict[int, tuple[Frame, Frame]] = {}
    wanted = set(sample_times(clip.frames))

    def joined() -> Iterator[Frame]:
        for i, pair in enumerate(pairs):
            if i in wanted:
                kept[i] = pair
            yield np.concatenate(pair, axis=1)

    facts = clip.facts
    aspect = facts.sample_aspect_ratio
    if not context.settings.restore_size:
        aspect = clip.geometry.working_aspect(aspect)
    with tempfile.TemporaryDirectory(dir=folder.files) as scratch:
        segment = Path(scratch) / "segment.mp4"
        write_segment(
            segment,
            joined(),
            facts.pts,
            time_base=facts.time_base,
            rate=facts.rate,
            encoding=Encoding(crf=context.settings.crf),
            sample_aspect_ratio=aspect,
        )
        source = context.job.video if context.settings.audio else None
        join([segment], facts, source, folder.files / SIDE_BY_SIDE)
    return kept


def _metrics(context: StageContext, clip: Clip, consistency: Consistency) -> dict[str, Any]:
    s, facts = context.settings, clip.facts
    totals = {stage: context.folder(stage).totals() for stage in STAGES[:-1]}
    work = {stage: Work.of(context.folder(stage)) for stage in STAGES[:-1]}
    rows = {stage: w.rows for stage, w in work.items() if w.rows is not None}
    retried = work["invert"].retried_rows  # unplanned: frames that swing
    return {
        "frames": clip.frames,
        "shot_cuts": list(clip.cuts),
        "fps": float(facts.rate),
        "duration_seconds": float(facts.duration),
        "working_size": list(clip.geometry.working),
        "source_size": list(clip.geometry.source),
        "settings": s.model_dump(mode="json"),
        "warp_error": {
            "edited": consistency.edited.mean,
            "source": consistency.source.mean,
            "unit": "mean squared RGB difference in [0, 1] of neighbouring frames aligned by the "
            "source's DIS optical flow, occlusions left out",
        },
        "inversion_residual": _residual(context, clip.frames),
        "unet_rows": {**rows, "retried": retried, "total": sum(rows.values()) + retried},
        "unet_rows_per_frame": {stage: n / clip.frames for stage, n in rows.items()},
        "unet_seconds": {k: round(t["seconds"], 3) for k, t in totals.items() if "rows" in t},
        "waited_seconds": {k: round(t["waited"], 3) for k, t in totals.items() if "waited" in t},
        "work": {stage: w.to_json(clip.frames) for stage, w in work.items()},
        "numerics": json.loads(
            (context.folder("edit").folder / "numerics.json").read_text("utf-8")
        ),
    }


def _residual(context: StageContext, frames: int) -> dict[str, float | None]:
    """How exactly the inversion solved the sampler's equation, over frames and steps.

    `unconverged` counts (frame, step) pairs above the tolerance after a retry.
    """
    folder = context.folder("invert")
    records = (folder.record(unit) for unit in folder.units())
    facts = [r.facts for r in records if r is not None and "residual_sum" in r.facts]
    if not facts:
        return {"mean": None, "largest": None, "worst_frame": None, "unconverged": None}
    mean = sum(f["residual_sum"] for f in facts) / (frames * context.settings.inversion_steps)
    worst = max(facts, key=lambda f: f["residual_largest"])
    return {
        "mean": mean,
        "largest": worst["residual_largest"],
        "worst_frame": worst["residual_worst_frame"],
        "unconverged": sum(f["unconverged"] for f in facts),
    }
