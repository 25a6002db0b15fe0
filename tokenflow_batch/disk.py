"""`--disk-budget`: what the work folder may hold, and what goes first when it holds more.

What goes are the data of stages whose every user among the manifest's jobs has been rendered and
reported. Their commit records stay, so they count as done; an edit that is added later computes
what it needs of them again.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field

from filelock import FileLock, Timeout
from pydantic import ByteSize, TypeAdapter, ValidationError

from tokenflow_batch.config import Job
from tokenflow_batch.errors import ManifestError, TokenflowBatchError, VideoError
from tokenflow_batch.files import tree_bytes
from tokenflow_batch.inputs import Inputs, Keys
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.stage_names import StageName

log = logging.getLogger("tokenflow_batch")

_FREEABLE: tuple[StageName, ...] = ("edit", "match", "invert", "encode")
"""What nothing else is made of goes first. Rendered videos and reports are small, and results."""


def parse_size(text: str) -> int:
    """Bytes from `500M`, `20GB`, `1.5TiB` (K, M, G, T are powers of 1000, KiB and so on of 1024).

    Raises:
        ManifestError: it is none of these, or not above 0.
    """
    try:
        size = int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        size = 0
    if size <= 0:
        raise ManifestError(
            f"{text!r} is no size", hint="give a number and a unit, such as 500MB, 20GB or 1.5TiB"
        )
    return size


@dataclass
class _Data:
    """A stage folder, and until when the jobs have needed it."""

    stage: StageName
    folder: StageFolder
    needed: bool = False
    last_used_ns: int = 0
    jobs: list[str] = field(default_factory=list)


def keep_within(inputs: Inputs, budget: int) -> int:
    """Free what no job needs, what was used last longest ago first, until the rest fits.

    One process at a time, whatever launch it belongs to: two that see the same excess would both
    remove it. What goes wrong is told as a warning; nobody's work stops because of it.

    Args:
        inputs: of the whole manifest.
        budget: bytes that the work folder may hold.

    Returns:
        By how many bytes it still holds more, at least 0.
    """
    try:
        with FileLock(inputs.workspace.budget_lock):
            return _keep_within(inputs, budget)
    except (OSError, TokenflowBatchError) as error:
        log.warning("disk budget: nothing more is removed this time: %s", error)
        return 0


def _keep_within(inputs: Inputs, budget: int) -> int:
    over = tree_bytes(inputs.workspace.work) - budget
    if over <= 0:
        return 0
    found = [d for d in _data(inputs) if not d.needed and d.folder.complete]
    found.sort(key=lambda d: (d.last_used_ns, _FREEABLE.index(d.stage)))
    for data in found:
        over -= _free(inputs, data)
        if over <= 0:
            return 0
    return over


def warn_if_over(inputs: Inputs, budget: int) -> None:
    """Free what may go, and say by how much the rest is still over the budget."""
    over = keep_within(inputs, budget)
    if over:
        log.warning(
            "disk budget: the work folder %s is still over it by %s; what is left is needed by "
            "jobs that are not done, or are results",
            inputs.workspace.work,
            ByteSize(over).human_readable(),
        )


def _free(inputs: Inputs, data: _Data) -> int:
    lock = FileLock(inputs.workspace.lock(data.stage, data.folder.key), timeout=0)
    before = tree_bytes(data.folder.folder)
    try:
        with lock:
            data.folder.free()
    except Timeout:
        return 0  # another run is at work on it
    except (OSError, TokenflowBatchError) as error:
        log.warning("disk budget: %s of %s: %s", data.stage, ", ".join(data.jobs), error)
    gone = before - tree_bytes(data.folder.folder)
    if gone > 0:
        who = ", ".join(data.jobs)
        log.warning(
            "disk budget: removed %s of %s, %s", data.stage, who, ByteSize(gone).human_readable()
        )
    return gone


def _data(inputs: Inputs) -> Iterator[_Data]:
    """All that the manifest's jobs have in their freeable stages, each folder once."""
    found: dict[tuple[StageName, str], _Data] = {}
    for job, keys in _known(inputs):
        ends = [_folder(inputs, stage, keys[stage].key) for stage in ("render", "report")]
        done = all(end.complete for end in ends)
        for stage in _FREEABLE:
            key = keys[stage].key
            data = found.setdefault((stage, key), _Data(stage, _folder(inputs, stage, key)))
            data.needed |= not done
            data.jobs.append(job.name)
            if done:
                data.last_used_ns = max(data.last_used_ns, ends[-1].finished_ns)
    yield from found.values()


def _known(inputs: Inputs) -> Iterator[tuple[Job, Keys]]:
    """Jobs whose results can be told. Videos that are left out this time are not read for it."""
    for job in inputs.batch.jobs:
        try:
            yield job, inputs.keys(job)
        except VideoError:
            continue  # it fails without needing anything
    for job in inputs.batch.others:
        keys = inputs.known_keys(job)
        if keys is not None:
            yield job, keys


def _folder(inputs: Inputs, stage: StageName, key: str) -> StageFolder:
    return StageFolder(inputs.workspace.stage(stage, key), stage, key)
