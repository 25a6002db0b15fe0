"""Manifests: YAML (or JSON) in, jobs out, with the file and line of everything that is wrong."""

from __future__ import annotations

import difflib
import glob
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    PlainValidator,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
)

from tokenflow_batch.config import (
    NAMING,
    PRESETS,
    Batch,
    Frozen,
    Job,
    Runtime,
    Settings,
    stored_conv_steps,
)
from tokenflow_batch.errors import ManifestError
from tokenflow_batch.manifest_rows import Level, expand, read_table
from tokenflow_batch.manifest_text import Problems, Text, Where
from tokenflow_batch.ranges import Part, seconds

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts"}
    | {".wmv", ".flv", ".ogv", ".3gp", ".gif"}
)


def _short_enough(name: str) -> str:
    if len(name.encode()) > 200:
        raise ValueError("too long for a file name")
    return name


# A name becomes a file or folder name: no separators, no control characters, not hidden.
Name = Annotated[
    str,
    AfterValidator(_short_enough),
    StringConstraints(min_length=1, max_length=120, pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*$"),
]


def _edit_name(name: str) -> str:
    if name.lower().endswith(".mp4"):
        raise ValueError("leave `.mp4` out: it is added")
    return name


Count = Annotated[int, Field(ge=0, lt=2**40, strict=True)]
Seconds = Annotated[
    Fraction, PlainValidator(seconds), WithJsonSchema({"type": ["number", "string"]})
]
EditName = Annotated[Name, AfterValidator(_edit_name)]
M = TypeVar("M", bound=Frozen)
_NAME: TypeAdapter[str] = TypeAdapter(Name)


class EditEntry(Frozen):
    """What only an edit has; it may also give any setting."""

    name: EditName
    prompt: str = Field(min_length=1)


class ClipEntry(Frozen):
    """What only a clip has; it may also give any setting for its edits."""

    video: str = Field(min_length=1, description="file, glob or folder, relative to the manifest")
    name: Name | None = Field(None, description="default: the file's name without its suffix")
    frames: tuple[Count, Count] | None = Field(
        None, description="only these: from the first up to, not including, the second; from 0"
    )
    time: tuple[Seconds, Seconds] | None = Field(
        None, description='only this range: seconds or texts such as "1:30.5", end not included'
    )
    edits: list[Level] = Field(min_length=1)


class ManifestFile(Frozen):
    """The top level."""

    version: Literal[1]
    model: str = Field(min_length=1, description="hub id, folder, single file, or `demo`")
    base_config: str | None = Field(
        None, description="for a single file: folder or hub id with its component configs"
    )
    output: str = Field("outputs/", min_length=1, description="relative to the manifest")
    naming: str = Field(NAMING, description="where a video goes under `output`")
    runtime: Runtime = Runtime()
    defaults: Level = Field(default_factory=dict)
    clips: list[Level] = Field(min_length=1)


def load(
    path: Path,
    *,
    output: Path | None = None,
    workdir: Path | None = None,
    model: str | None = None,
) -> Batch:
    """Read and resolve a manifest.

    Args:
        path: the YAML or JSON file, or a CSV table.
        output: overrides the manifest's `output`.
        workdir: overrides the default work folder, `OUTPUT/.work`.
        model: of a CSV table, which names none.

    Raises:
        ManifestError: listing everything that is wrong, with file and line.
    """
    table = path.suffix.lower() == ".csv"
    if model is not None and not table:
        raise ManifestError("--model is for CSV tables", hint=f"write `model:` into {path}")
    text = read_table(path, model) if table else Text.read(path)
    problems = Problems(text)
    top = _validate(ManifestFile, text.raw, (), problems)
    problems.stop()
    assert top is not None  # noqa: S101 - stop() has raised otherwise
    _split(top.defaults, None, ("defaults",), problems)
    jobs: list[Job] = []
    given = path.parent / Path(top.output).expanduser()
    results = [p.resolve() for p in (given, output, workdir) if p is not None]
    for index in range(len(top.clips)):
        jobs += _clip_jobs(path, top, index, results, problems)
    _refuse_equal_names(jobs, problems)
    _check_naming(top.naming, jobs, problems)
    problems.stop()
    out = output or given
    return Batch(tuple(jobs), out, workdir or out / ".work", top.runtime, top.naming)


def _clip_jobs(
    path: Path, top: ManifestFile, index: int, results: Sequence[Path], problems: Problems
) -> list[Job]:
    where: Where = ("clips", index)
    entry, shared = _split(top.clips[index], ClipEntry, where, problems)
    if entry is None:
        return []
    found = _videos(path.parent, entry, results, where, problems)
    part = _part(entry, where, problems)
    videos = [(v, _clip_name(entry, v, part, where, problems)) for v in found]
    edits: list[tuple[EditEntry, Settings, int]] = []
    for number, compact in enumerate(entry.edits):
        at = (*where, "edits", number)
        for raw in expand(compact, at, problems):
            edit, own = _split(raw, EditEntry, at, problems)
            if edit is not None:
                levels = [(("defaults",), top.defaults), (where, shared), (at, own)]
                settings = _settings(levels, edit.prompt, problems)
                if settings is not None:
                    edits.append((edit, settings, problems.text.line(at)))
    beside = {video: _sidecar(video, where, problems) for video in found}
    conv_steps = stored_conv_steps([settings for _, settings, _ in edits])
    return [
        Job(
            clip=name,
            edit=edit.name,
            video=video,
            model=_model_reference(path.parent, top.model),
            base_config=top.base_config and _model_reference(path.parent, top.base_config),
            settings=_with_source(settings, beside[video]),
            stored_conv_steps=conv_steps.get((settings.steps, "store"), 0),
            where=f"{path}:{line}",
            part=part,
            stored_conv8_steps=conv_steps.get((settings.steps, "store8"), 0),
        )
        for video, name in videos
        for edit, settings, line in edits
    ]


def _settings(
    levels: Sequence[tuple[Where, Level]], prompt: str, problems: Problems
) -> Settings | None:
    """Merge preset < defaults < clip < edit and validate; errors point to where a value stands."""
    given: Level = {}
    origin: dict[str, Where] = {}
    for where, level in levels:
        given |= level
        origin |= {key: (*where, key) for key in level}
    wanted = given.get("preset", "balanced")
    preset = next((values for name, values in PRESETS.items() if name == wanted), {})
    merged = {**preset, **given, "prompt": prompt}
    merged.setdefault("inversion_steps", merged.get("steps", 25))
    try:
        settings = Settings.model_validate(merged)
    except ValidationError as error:
        for item in error.errors():
            key = str(item["loc"][0])
            place = (*origin.get(key, levels[-1][0]), *item["loc"][1:])
            problems.add(place, f"{item['msg']} (got {_short(item['input'])})")
        return None
    plain = settings.inversion_iterations == 0
    if settings.inversion_steps < settings.steps or (
        not plain and settings.inversion_steps != settings.steps
    ):
        problems.add(
            origin.get("inversion_steps", levels[-1][0]),
            "inversion_steps differs from steps: fixed-point inversion takes exactly `steps`, "
            "plain inversion (inversion_iterations: 0) at least as many",
        )
        return None
    if settings.window_overlap > settings.window_segments // 2:
        problems.add(
            origin.get("window_overlap", origin.get("window_segments", levels[-1][0])),
            f"windows of {settings.window_segments} segments can't share "
            f"{settings.window_overlap}: window_overlap is at most half of window_segments",
        )
        return None
    return settings


def _sidecar(video: Path, where: Where, problems: Problems) -> str | None:
    """The text file beside a video, which is its source prompt where the manifest gives none."""
    path = video.with_suffix(".txt")
    try:
        return path.read_text("utf-8-sig").strip() if path.is_file() else None
    except (OSError, ValueError) as error:
        problems.add((*where, "video"), f"its source prompt {path} can't be read: {error}")
        return None


def _with_source(settings: Settings, beside: str | None) -> Settings:
    if beside is None or "source_prompt" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"source_prompt": beside})


def _check_naming(naming: str, jobs: Sequence[Job], problems: Problems) -> None:
    """Every video needs a file of its own inside the output folder."""
    where = ("naming",)
    try:
        names = [naming.format(clip=job.clip, edit=job.edit) for job in jobs]
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        problems.add(where, f"template {naming!r}: {error}; there are {{clip}} and {{edit}}")
        return
    if not naming.endswith(".mp4"):
        problems.add(where, f"must end in .mp4 (got {naming!r})")
    for name in names:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or "\\" in name or any(p.startswith((".", "~")) for p in parts):
            problems.add(where, f"{name!r} is not inside the output folder, or hidden")
            return
    taken: dict[str, Job] = {}
    for job, name in zip(jobs, names, strict=True):
        first = taken.setdefault(name.casefold(), job)
        if first is not job and naming != NAMING:  # else two edits have one name, said before
            problems.add(where, f"{first.name} and {job.name} would both be {name!r}")
            return


def _videos(
    root: Path, entry: ClipEntry, results: Sequence[Path], where: Where, problems: Problems
) -> list[Path]:
    """The files that `video` names: one file, a glob's matches, or a folder's videos.

    A search leaves the folders of `results` (resolved) out, unless it begins inside of them.
    """
    target = root / Path(entry.video).expanduser()
    try:
        if target.is_dir():
            matched = [p for p in target.rglob("*") if _is_video(p.relative_to(target), target)]
            found = _sources(matched, target, results)
            nothing = f"no video files in folder {target}"
        elif glob.has_magic(entry.video) and not target.exists():
            names = glob.glob(str(target), recursive=True)  # noqa: PTH207 - takes any pattern
            matched = [p for p in map(Path, names) if p.is_file()]
            plain = takewhile(lambda part: not glob.has_magic(part), target.parts)
            found = _sources(matched, Path(*plain), results)
            nothing = f"no file matches {target}"
        else:
            return [target]  # a missing file is that job's failure, not the batch's
    except (OSError, ValueError) as error:
        matched, found, nothing = [], [], f"{entry.video!r} can't be looked up: {error}"
    if matched and not found:
        nothing += " but for some in the output or work folder, which are left out"
    if not found:
        problems.add((*where, "video"), nothing)
    if entry.name is not None and len(found) > 1:
        problems.add((*where, "name"), f"one name for {len(found)} videos: leave it out")
    return found


def _sources(found: Iterable[Path], top: Path, results: Sequence[Path]) -> list[Path]:
    """Sorted, without what an earlier run may have written."""
    start = top.resolve()
    left_out = [p for p in results if start == p or not start.is_relative_to(p)]
    return sorted(p for p in found if not any(map(p.resolve().is_relative_to, left_out)))


def _part(entry: ClipEntry, where: Where, problems: Problems) -> Part | None:
    """The part of its videos that a clip asks for."""
    if entry.frames is not None and entry.time is not None:
        problems.add((*where, "time"), "give `frames` or `time`, not both")
    for key, ends in (("frames", entry.frames), ("time", entry.time)):
        if ends is not None:
            line = f"{problems.text.path}:{problems.text.line((*where, key))}"
            unit: Literal["frames", "seconds"] = "frames" if key == "frames" else "seconds"
            part = Part(unit, Fraction(ends[0]), Fraction(ends[1]), line)
            if part.start >= part.stop:
                problems.add((*where, key), f"{part} is empty: it must end after its start")
            return part
    return None


def _clip_name(
    entry: ClipEntry, video: Path, part: Part | None, where: Where, problems: Problems
) -> str:
    """The clip's name, or the file's (with the part), which must do as a folder's."""
    if entry.name is not None:
        return entry.name
    name = video.stem if part is None else f"{video.stem}-{part.label}"
    try:
        return _NAME.validate_python(name)
    except ValidationError:
        message = f"{name!r} can't be a folder's name: give the clip a `name`"
        problems.add((*where, "video"), message)
        return name


def _is_video(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix.lower() in VIDEO_SUFFIXES and (folder / path).is_file()


def _refuse_equal_names(jobs: Iterable[Job], problems: Problems) -> None:
    """Two clips, or two edits of a clip, that would write the same files."""
    clips: dict[str, Job] = {}
    edits: dict[tuple[str, str], Job] = {}
    for job in jobs:
        first = clips.setdefault(job.clip.casefold(), job)
        if _source(first) != _source(job):
            problems.say(
                f"{job.where}: clip name {job.clip!r} is taken: {_source(first)} and "
                f"{_source(job)} would write the same files; give one of them a `name`"
            )
        other = edits.setdefault((job.clip.casefold(), job.edit.casefold()), job)
        if other is not job and _source(first) == _source(job):
            problems.say(f"{job.where}: edit {job.name!r} is already defined at {other.where}")


def _source(job: Job) -> str:
    return f"{job.video}" if job.part is None else f"{job.video} {job.part}"


def _model_reference(root: Path, model: str) -> str:
    """A path relative to the manifest if it exists, else the text as it stands (hub id, demo)."""
    local = root / Path(model).expanduser()
    return str(local) if model != "demo" and local.exists() else model


def _split(
    raw: Level, model: type[M] | None, where: Where, problems: Problems
) -> tuple[M | None, Level]:
    """Part a level into its own entry (if it has one) and the settings it passes on."""
    own = set(model.model_fields) if model else set()
    known = own | (set(Settings.model_fields) - {"prompt"})
    for key in raw:
        if key not in known:
            problems.add((*where, key), _unknown(str(key), known))
    settings = {k: v for k, v in raw.items() if k in Settings.model_fields and k not in own}
    if model is None:
        return None, settings
    return _validate(model, {k: v for k, v in raw.items() if k in own}, where, problems), settings


def _validate(model: type[M], raw: Any, where: Where, problems: Problems) -> M | None:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        for item in error.errors():
            place = (*where, *item["loc"])
            if item["type"] == "extra_forbidden":
                owner = Runtime if "runtime" in item["loc"] else model
                problems.add(place, _unknown(str(place[-1]), owner.model_fields))
            elif item["type"] == "missing":
                problems.add(place[:-1], f"`{place[-1]}` is missing")
            else:
                problems.add(place, f"{item['msg']} (got {_short(item['input'])})")
        return None


def _unknown(key: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"unknown key{f', did you mean `{close[0]}`?' if close else ''}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
