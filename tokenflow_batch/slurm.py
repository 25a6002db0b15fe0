"""Submitting a batch to Slurm: what is missing, and not in the queue already, as arrays over clips.

Slurm is driven by its own commands, each with a time limit.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock

from tokenflow_batch.config import Batch
from tokenflow_batch.errors import ClusterError, StoreError
from tokenflow_batch.files import replacing
from tokenflow_batch.model_files import DEMO, locate
from tokenflow_batch.sbatch import Array, Part, Resources, Work, script
from tokenflow_batch.status import JobStatus, status

ARRAY_SIZE = 1001
"""Tasks that an array may have (`MaxArraySize`) where a cluster has not changed it."""

PATIENCE = 60
"""Seconds that a command of Slurm may take."""

_GPU_STAGES = ("encode", "invert", "match", "edit")


@dataclass(frozen=True)
class Missing:
    """Clips that are to be submitted, as patterns for `run --only`.

    Attributes:
        gpu: they lack something before `render`.
        cpu: they lack `render` or `report` alone.
        queued: not complete, but a task for them is in the queue.
        complete: how many clips need nothing.
    """

    gpu: tuple[str, ...]
    cpu: tuple[str, ...]
    queued: tuple[str, ...]
    complete: int


@dataclass(frozen=True)
class Submission:
    """One array as it was, or would be, submitted.

    Attributes:
        array: what it does.
        text: the script.
        after: index of the submission whose tasks must each end well before its own, or None.
        behind: index of the submission that must have ended before, so that no more tasks than
            the throttle run at once, or None.
        job: Slurm's number; None in a dry run.
    """

    array: Array
    text: str
    after: int | None
    behind: int | None = None
    job: str | None = None


def work_of(manifest: Path, batch: Batch, options: Sequence[str], logs: Path | None = None) -> Work:
    """Names and places; the jobs' name stands for this manifest and this work folder.

    Args:
        manifest: its path.
        batch: what it says.
        options: what tasks give to `run` besides.
        logs: folder for the tasks' logs; by default one in the work folder.

    Raises:
        ModelError: the model is not on this disk.
    """
    path, folder = manifest.resolve(), batch.workdir.resolve()
    mark = hashlib.sha256(f"{path}\n{folder}".encode()).hexdigest()[:12]
    stem = re.sub(r"[^A-Za-z0-9_.-]", "_", path.stem)[:40]
    output = batch.output.resolve()
    videos = {job.video.resolve().parent for job in batch.jobs}
    binds = sorted({path.parent, output, folder, *videos, *_model_folders(batch)})
    own = folder / "slurm"
    where = own / "logs" if logs is None else logs.resolve()
    name = f"tokenflow-{stem}-{mark}"
    return Work(name, path, tuple(options), own, where, tuple(binds))


def _model_folders(batch: Batch) -> set[Path]:
    """Where the models lie, for a container; the one that comes along is inside of it."""
    found = set()
    for model, base_config in {(job.model, job.base_config) for job in batch.jobs}:
        files = locate(model, base_config, download=False)
        for path in (files.path, files.base_config):
            if path is None or path == DEMO:
                continue
            folder = path.resolve() if path.is_dir() else path.resolve().parent
            # A snapshot in the hub's cache is links to files beside it.
            cached = [p for p in folder.parents if (p / "blobs").is_dir()]
            found.add(cached[0].parent if cached else folder)
    return found


def missing(batch: Batch, queued: frozenset[str]) -> Missing:
    """Which clips lack something.

    Args:
        batch: the manifest.
        queued: patterns of clips that are in the queue.

    Raises:
        ModelError: the model is not on this disk.
    """
    clips: dict[str, list[JobStatus]] = {}
    for row in status(batch):
        clips.setdefault(row.clip, []).append(row)
    gpu, cpu, waiting, complete = [], [], [], 0
    for clip, rows in clips.items():
        pattern = f"{glob.escape(clip)}/*"
        lacking = {stage for row in rows for stage in row.lacking}
        if not lacking and all(row.published for row in rows):
            complete += 1
        elif pattern in queued:
            waiting.append(pattern)
        elif lacking & set(_GPU_STAGES):
            gpu.append(pattern)
        else:
            cpu.append(pattern)
    return Missing(tuple(gpu), tuple(cpu), tuple(waiting), complete)


def plan(
    resources: Resources, work: Work, found: Missing, size: int = ARRAY_SIZE
) -> list[Submission]:
    """The arrays for what is missing, in the order in which they are submitted.

    Args:
        resources: what to ask Slurm for.
        work: names and places.
        found: what is missing.
        size: tasks that an array may have; more clips than that become several arrays.

    Raises:
        ManifestError: a value can't be written into a script.
    """
    done: list[Submission] = []

    def add(part: Part, clips: tuple[str, ...], after: int | None, behind: int | None) -> int:
        array = _array(work, part, clips)
        text = script(resources, work, array)
        done.append(Submission(array, text, after, behind if resources.throttle else None))
        return len(done) - 1

    first = second = third = None
    if resources.cpu_partition is None:
        for clips in _pieces(found.gpu + found.cpu, size):
            first = add("all", clips, None, first)
        return done
    for clips in _pieces(found.gpu, size):
        first = add("gpu", clips, None, first)
        second = add("cpu", clips, first, second)
    for clips in _pieces(found.cpu, size):
        third = add("cpu", clips, None, third)
    return done


def _pieces(clips: tuple[str, ...], size: int) -> list[tuple[str, ...]]:
    return [clips[i : i + size] for i in range(0, len(clips), size)]


def _array(work: Work, part: Part, patterns: tuple[str, ...]) -> Array:
    digest = hashlib.sha256("\n".join(patterns).encode()).hexdigest()[:16]
    return Array(part, patterns, work.folder / f"{digest}.clips", f"tokenflow_batch {digest}")


def submit(batch: Batch, resources: Resources, work: Work) -> tuple[Missing, list[Submission]]:
    """Submit what is missing; what two of these at the same time find is submitted once.

    Raises:
        ClusterError: Slurm is not there, does not answer, or refuses.
        ManifestError: a value can't be written into a script.
        ModelError: the model is not on this disk.
        StoreError: the work folder can't be written.
    """
    try:
        for folder in (work.folder / "failures", work.logs, batch.output):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"{folder}: {error.strerror}", hint="output, work and log folders must be writable"
        ) from None
    with FileLock(work.folder / "submit.lock"):
        found = missing(batch, queued(work))
        done: list[Submission] = []
        for wanted in plan(resources, work, found, _array_size()):
            with replacing(wanted.array.list) as temporary:
                temporary.write_text("".join(f"{p}\n" for p in wanted.array.patterns), "utf-8")
            options = dependency(wanted, [str(one.job) for one in done])
            try:
                job = _sbatch(wanted.text, options)
            except ClusterError as error:
                raise _half_submitted(error, done) from None
            done.append(replace(wanted, job=job))
    return found, done


def dependency(wanted: Submission, jobs: Sequence[str]) -> tuple[str, ...]:
    """The options by which an array waits for others.

    Args:
        wanted: the array.
        jobs: numbers of the submissions before it.
    """
    given = []
    if wanted.after is not None:  # each task for the same task of another array
        given.append(f"aftercorr:{jobs[wanted.after]}")
    if wanted.behind is not None:
        given.append(f"afterany:{jobs[wanted.behind]}")
    return (f"--dependency={','.join(given)}", "--kill-on-invalid-dep=yes") if given else ()


def _array_size() -> int:
    """Tasks that an array may have on this cluster.

    Raises:
        ClusterError: Slurm is not there, does not answer, or takes no arrays.
    """
    said = _call(["scontrol", "show", "config"], "scontrol")
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", said, re.MULTILINE)
    size = int(match[1]) if match else ARRAY_SIZE
    if size < 1:
        raise ClusterError(
            "this cluster takes no job arrays (MaxArraySize is 0)",
            hint="ask its administrators, or start from scripts/slurm_multinode.sbatch",
        )
    return size


def queued(work: Work) -> frozenset[str]:
    """Patterns of the clips of this manifest that are in the queue, whoever put them there.

    Raises:
        ClusterError: Slurm is not there or does not answer.
    """
    said = _call(
        ["squeue", "--noheader", "--array", f"--name={work.name}", "--format=%K|%k"], "squeue"
    )
    lists: dict[str, list[str]] = {}
    found = set()
    for line in said.splitlines():
        index, _, comment = line.partition("|")
        digest = comment.removeprefix("tokenflow_batch ").strip()
        if digest not in lists:
            try:
                text = (work.folder / f"{digest}.clips").read_text("utf-8")
            except OSError:
                text = ""  # of another work folder of old: nothing is known of its clips
            lists[digest] = text.split("\n")[:-1]
        with suppress(ValueError, IndexError):
            found.add(lists[digest][int(index)])
    return frozenset(found)


def _sbatch(text: str, options: Sequence[str]) -> str:
    environment = {**os.environ, "PATH": _path()}
    said = _call(["sbatch", "--parsable", *options], "sbatch", stdin=text, env=environment)
    number = said.strip().partition(";")[0]
    if not number.isdecimal():
        raise ClusterError(f"sbatch gave no job number but {said.strip()!r}")
    return number


def _path() -> str:
    """`PATH` for the tasks: what is called there is this installation, activated or not."""
    path, here = os.environ.get("PATH", ""), Path(sys.executable).with_name("tokenflow-batch")
    found = shutil.which(here.name)
    if not here.is_file() or (found is not None and here.samefile(found)):
        return path
    return os.pathsep.join(filter(None, (str(here.parent), path)))


def _half_submitted(error: ClusterError, done: Sequence[Submission]) -> ClusterError:
    if not done:
        return error
    numbers = " ".join(str(d.job) for d in done)
    return ClusterError(
        f"{error.message} (job {numbers} is submitted all the same)",
        hint=f"take it back with `scancel {numbers}`, or submit again once it is done",
    )


def _call(
    command: list[str], what: str, stdin: str | None = None, env: dict[str, str] | None = None
) -> str:
    """Run one of Slurm's commands and give what it said."""
    try:
        answer = subprocess.run(
            command,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
            env=env,
        )
    except FileNotFoundError:
        raise ClusterError(
            f"there is no `{what}` here",
            hint="submit from a login node of a Slurm cluster; --dry-run works everywhere",
        ) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(
            f"`{what}` gave no answer within {PATIENCE} seconds",
            hint="look with `squeue --me` whether anything was submitted, then try again",
        ) from None
    if answer.returncode:
        lines = [line.strip() for line in (answer.stderr or answer.stdout).splitlines()]
        said = "; ".join(line.removeprefix(f"{what}: error: ") for line in lines if line)
        raise ClusterError(
            f"`{what}` refused: {said}",
            hint="see `sinfo` and `sacctmgr` for what "
            "this cluster offers, and the options of `tokenflow-batch submit`",
        )
    return answer.stdout
