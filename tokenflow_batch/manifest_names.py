"""Names of clips, edits and results: what may be one, and that no two are the same."""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, StringConstraints, TypeAdapter, ValidationError

from tokenflow_batch.config import NAMING, Job
from tokenflow_batch.manifest_text import Problems, Where
from tokenflow_batch.ranges import Part

_LONGEST = 230
"""Bytes of a file's name; file systems take 255, and it has a longer one while it is written."""


def _short_enough(name: str) -> str:
    if len(name.encode()) > 200:
        raise ValueError("too long for a file name")
    return name


def _path_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("a path can't have a NUL character")
    return text


def _edit_name(name: str) -> str:
    if name.lower().endswith(".mp4"):
        raise ValueError("leave `.mp4` out: it is added")
    return name


# A name becomes a file or folder name: no separators, no control characters, not hidden.
Name = Annotated[
    str,
    StringConstraints(min_length=1, max_length=120, pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$"),
    AfterValidator(_short_enough),
]
EditName = Annotated[Name, AfterValidator(_edit_name)]
PathText = Annotated[str, StringConstraints(min_length=1), AfterValidator(_path_text)]
_NAME: TypeAdapter[str] = TypeAdapter(Name)


def clip_name(
    given: str | None, video: Path, part: Part | None, where: Where, problems: Problems
) -> str:
    """A clip's name, or its file's (with the part), which must do as a folder's."""
    if given is not None:
        return given
    name = video.stem if part is None else f"{video.stem}-{part.label}"
    try:
        return _NAME.validate_python(name)
    except ValidationError:
        slash = ", and `/` between folders" if "\\" in name else ""
        problems.add(
            (*where, "video"), f"{name!r} can't be a folder's name: give the clip a `name`{slash}"
        )
        return name


def refuse_equal_names(jobs: Iterable[Job], problems: Problems) -> list[Job]:
    """Two clips, or two edits of a clip, that would write the same files.

    Returns:
        The jobs whose names were not taken.
    """
    clips: dict[str, Job] = {}
    edits: dict[tuple[str, str], Job] = {}
    good = []
    for job in jobs:
        first = clips.setdefault(job.clip.casefold(), job)
        other = edits.setdefault((job.clip.casefold(), job.edit.casefold()), job)
        if _source(first) != _source(job):
            problems.say(
                f"{job.where}: clip name {job.clip!r} is taken: {_source(first)} and "
                f"{_source(job)} would write the same files; give one of them a `name`"
            )
        elif other is not job:
            problems.say(f"{job.where}: edit {job.name!r} is already defined at {other.where}")
        else:
            good.append(job)
    return good


def _source(job: Job) -> str:
    return f"{job.video}" if job.part is None else f"{job.video} {job.part}"


def check_naming(naming: str, jobs: Sequence[Job], problems: Problems) -> None:
    """Every video needs a file of its own inside the output folder."""
    where = ("naming",)
    try:
        fields = {field for _, field, _, _ in string.Formatter().parse(naming)} - {None}
        unknown = fields - {"clip", "edit"}
        if unknown:
            raise ValueError(f"there is no {{{min(map(str, unknown))}}}")
        names = [naming.format(clip=job.clip, edit=job.edit) for job in jobs]
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        problems.add(where, f"template {naming!r}: {error}; there are {{clip}} and {{edit}}")
        return
    if not naming.endswith(".mp4"):
        problems.add(where, f"must end in .mp4 (got {naming!r})")
    for name in names:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or "\\" in name or any(p.startswith((".", "~")) for p in parts):
            problems.add(where, f"{name!r} is not inside the output folder, or hidden")
            return
        if any(len(part.encode()) > _LONGEST for part in parts):
            problems.add(where, f"{name!r} is too long for a file's name")
            return
    taken: dict[str, Job] = {}
    for job, name in zip(jobs, names, strict=True):
        first = taken.setdefault(name.casefold(), job)
        if first is not job and naming != NAMING:  # else two edits have one name, said before
            problems.add(where, f"{first.name} and {job.name} would both be {name!r}")
            return
