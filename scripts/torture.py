"""SIGKILL at random moments, spread over all stages: does a job survive it?

    scripts/torture [--kills 200] [--seed N] [--json FILE]

One job of the demo model (several chunks, several windows with anchors, sound) is run once without
interruption. Then copies of it are run and killed: in each stage, at a moment drawn from how long
the stage takes; the next process goes on from what is left. Every copy must end with the same
latents and decoded frames, bit for bit, and no unit that was committed before a kill may be
computed or written again. The exit code says whether that holds.

Processes are forked from one that has the libraries loaded, so that a kill costs no start-up; they
share nothing else.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from tokenflow_batch.demo.job import write_clip
from tokenflow_batch.demo.scenes import Clip, recoloured
from tokenflow_batch.manifest import load
from tokenflow_batch.results import exit_code
from tokenflow_batch.runner import Runner
from tokenflow_batch.stage_names import STAGES, StageName
from tokenflow_batch.stages.edit import read_edited
from tokenflow_batch.video import probe, read_frames

FRAMES: Final = 20
MANIFEST: Final = """\
version: 1
model: demo
output: out
runtime: {{device: cpu, threads: 1}}
defaults:
  {{steps: 4, segment_length: 4, window_segments: 2, window_overlap: 1, anchors: 2,
   chunk_frames: 7, guidance_scale: 5}}
clips:
  - {{video: clip.mp4, source_prompt: {source!r}, edits: [{{name: edit, prompt: {target!r}}}]}}
"""

Committed = dict[Path, tuple[dict[str, Any], int]]
"""Per commit record: its content and when it was written."""


@dataclass(frozen=True)
class Outcome:
    """What must not depend on how often the work was interrupted: two digests."""

    latents: str
    frames: str


def runner(folder: Path) -> Runner:
    """A runner of the folder's job, without bars."""
    return Runner(
        load(folder / "manifest.yaml"), lambda _what, _total: nullcontext(lambda _n: None)
    )


def run_job(folder: Path, on_stage: Callable[[StageName], None] = lambda _: None) -> None:
    """Run the job from where it is, stage by stage, in this process.

    Raises:
        SystemExit: it failed.
    """
    batch = runner(folder)
    for stage in STAGES:
        on_stage(stage)
        results = batch.run((stage,))
        if exit_code(results):
            raise SystemExit(str(results[0].error))


def outcome(folder: Path) -> Outcome:
    """Digests of the final latents and of the decoded frames."""
    batch = runner(folder)
    context = batch.context(batch.batch.jobs[0])
    video = folder / "out" / "clip" / "edit.mp4"
    frames = hashlib.sha256()
    for frame in read_frames(video, probe(video)):
        frames.update(frame.tobytes())
    latents = read_edited(context, range(FRAMES)).numpy().tobytes()
    return Outcome(hashlib.sha256(latents).hexdigest(), frames.hexdigest())


def committed(folder: Path) -> Committed:
    """What the ledger says is done; a record that was being written is a hidden file, and isn't."""
    records = sorted((folder / "out" / ".work").glob("*/*/commits/[!.]*.json"))
    return {r: (json.loads(r.read_bytes()), r.stat().st_mtime_ns) for r in records}


def lost(before: Committed, after: Committed) -> list[str]:
    """Units that were committed and are gone, or were computed again."""
    found = []
    for record, (content, written) in before.items():
        now, when = after.get(record, (None, 0))
        # Files that are needed no longer are dropped: the record says so and keeps its facts.
        kept = (
            now is not None
            and now["files"] == content["files"]
            and (when == written or (now["dropped"] and not content["dropped"]))
        )
        if not kept:
            found.append(record.stem)
    return found


def forked(folder: Path, status: Path) -> int:
    """Start a process that runs the job and notes each stage in `status`; its number."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:

        def note(stage: StageName) -> None:
            status.write_text(stage, encoding="ascii")

        run_job(folder, note)
        code = 0
    finally:
        os._exit(code)


def ended(child: int) -> int | None:
    """The exit code of a process, None while it runs."""
    pid, state = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(state) if pid else None


def kill_in(stage: StageName, delay: float, child: int, status: Path) -> bool:
    """Kill a process `delay` seconds after it came to a stage; whether it was still alive."""
    while not (status.exists() and status.read_text(encoding="ascii") == stage):
        if ended(child) is not None:
            return False
        time.sleep(0.002)
    time.sleep(delay)
    if ended(child) is not None:
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def timed(folder: Path) -> dict[StageName, float]:
    """Seconds of each stage of an uninterrupted run."""
    began: list[tuple[StageName, float]] = []
    run_job(folder, lambda stage: began.append((stage, time.monotonic())))
    ends = [at for _, at in began[1:]] + [time.monotonic()]
    return {stage: end - at for (stage, at), end in zip(began, ends, strict=True)}


@dataclass
class Count:
    """What happened."""

    kills: Counter[str]
    jobs: int = 0
    commits_between: int = 0


def torture(
    source: Path, scratch: Path, kills: int, draw: random.Random
) -> tuple[Count, list[str]]:
    """Kill until there have been enough; counts and complaints."""
    seconds, wanted = timed(source), outcome(source)
    count, complaints = Count(Counter()), list[str]()
    while count.kills.total() < kills:
        folder = scratch / str(count.jobs)
        folder.mkdir()
        for name in ("clip.mp4", "manifest.yaml"):
            shutil.copy2(source / name, folder)
        for stage in STAGES:
            for _ in range(draw.choice((1, 2))):
                before, status = committed(folder), folder / "status"
                status.unlink(missing_ok=True)
                child = forked(folder, status)
                killed = kill_in(stage, draw.uniform(0, seconds[stage]), child, status)
                count.kills[stage] += killed
                after = committed(folder)
                count.commits_between += len(after) - len(before)
                complaints += [f"job {count.jobs}, {stage}: {x}" for x in lost(before, after)]
        before = committed(folder)
        run_job(folder)
        complaints += [f"job {count.jobs}, at last: {x}" for x in lost(before, committed(folder))]
        if outcome(folder) != wanted:
            complaints.append(f"job {count.jobs}: other latents or frames")
        shutil.rmtree(folder)
        count.jobs += 1
        print(f"{count.kills.total()} kills, {len(complaints)} complaints", flush=True)
    return count, complaints


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; printed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    torch.set_num_threads(1)  # before the first fork: a thread pool would not survive it
    clip = Clip.random(3, FRAMES, 64)
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "whole"
        source.mkdir()
        write_clip(source / "clip.mp4", clip)
        target = recoloured(clip, color="blue").caption
        text = MANIFEST.format(source=clip.caption, target=target)
        (source / "manifest.yaml").write_text(text, encoding="utf-8")
        draw = random.Random(seed)  # noqa: S311 - moments, no secrets
        count, complaints = torture(source, Path(scratch), args.kills, draw)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "seed": seed,
        "kills": count.kills.total(),
        "kills_by_stage": dict(count.kills),
        "jobs": count.jobs,
        "units_committed_between_kills": count.commits_between,
        "complaints": complaints,
    }
    print(json.dumps(report, indent=1))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
