"""Small real jobs: a clip, a manifest, a run in this process, and what it left."""

import shutil
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import yaml
from devices import DEVICE
from typer.testing import CliRunner
from video_files import frames_of, make, steps

from tokenflow_batch.cli import app
from tokenflow_batch.files import digest
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.manifest import load
from tokenflow_batch.runner import Runner
from tokenflow_batch.stage_names import STAGES
from tokenflow_batch.store import ArrayStore

SIZE = (64, 32)
SETTINGS = {
    "source_prompt": "a red ball on grass",
    "steps": 3,
    "segment_length": 3,
    "chunk_frames": 4,
    "unet_batch": 4,
    "vae_batch": 2,
    "guidance_scale": 3.0,
}
EDIT = {"name": "blue", "prompt": "a blue ball on grass", "negative_prompt": "sand"}


def quick_first(cases, quick, name=None):
    """Parameters of a test that takes long: all but the `quick` ones are for the slow run."""
    kept = [case in quick for case in cases]
    assert sum(kept) == len(quick)
    return [
        pytest.param(
            *(case if isinstance(case, tuple) else (case,)),
            marks=() if now else pytest.mark.slow,
            id=name(*case) if name else None,
        )
        for case, now in zip(cases, kept, strict=True)
    ]


def clip(path, frames, *, size=SIZE, sound=True):
    """A real video file of so many frames, with sound where it is long enough."""
    return make(
        path,
        steps(frames, 1),
        Fraction(1, 10),
        rate=Fraction(10),
        size=size,
        sound=["aac"] if sound and frames > 4 else [],
        setup=_one_thread,
    )


def _one_thread(stream):
    stream.codec_context.thread_count = 1  # more give other bits now and then, on a busy machine


def write_manifest(folder, model, *, clips=None, name="manifest.yaml", runtime=None, **settings):
    """A manifest in `folder`; by default one edit of `clip.mp4`."""
    clips = clips or [{"video": "clip.mp4", "edits": [EDIT]}]
    data = {
        "version": 1,
        "model": str(model),
        "output": "out/",
        "runtime": {"device": DEVICE, "threads": 1, **(runtime or {})},
        "defaults": {**SETTINGS, **settings},
        "clips": clips,
    }
    path = folder / name
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


@contextmanager
def silent(_what, _total):
    yield lambda _n: None


def run(manifest, stages=STAGES, **options):
    """Run a manifest in this process; the results, one a job."""
    return Runner(load(manifest), silent).run(stages, **options)


def run_one(manifest, stages=STAGES, **options):
    """The same for a manifest of one job that must not fail."""
    (result,) = run(manifest, stages, **options)
    assert result.error is None, result.error
    return result


def command(*arguments):
    """The command line, in this process."""
    return CliRunner().invoke(app, [str(a) for a in arguments])


def folder_of(manifest, stage, job=0):
    """Where a stage of a job keeps its result."""
    batch = load(manifest)
    inputs = Inputs.of(batch)
    key = inputs.keys(batch.jobs[job])[stage].key
    return StageFolder(inputs.workspace.stage(stage, key), stage, key)


def edited_latents(manifest, job=0):
    """The final latents, by the store."""
    steps = load(manifest).jobs[job].settings.steps
    return ArrayStore.open(folder_of(manifest, "edit", job)).read("latents", (steps,))


def outcome(manifest, job=0):
    """Everything that must not depend on how the work was done."""
    batch = load(manifest)
    video = batch.output / batch.jobs[job].clip / f"{batch.jobs[job].edit}.mp4"
    return edited_latents(manifest, job), frames_of(video), digest(video)


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def snapshot(folder):
    """Files with inode, size and time: any that is written anew shows."""
    return {
        str(p.relative_to(folder)): (p.stat().st_ino, p.stat().st_size, p.stat().st_mtime_ns)
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and p.suffix != ".lock"
    }


def copy_of(job: Path, to: Path):
    """A job's folder, files and times, to work on; gives its manifest."""
    shutil.copytree(job, to)
    return to / "manifest.yaml"


def published(folder):
    """Relative names of what lies in the output folder, work files left out."""
    out = folder / "out"
    return sorted(
        str(p.relative_to(out)) for p in out.rglob("*") if p.is_file() and ".work" not in p.parts
    )
