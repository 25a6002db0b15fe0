"""Manifests: YAML (or JSON) in, jobs out, with the file and line of everything that is wrong."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import takewhile
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, PlainValidator, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

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
from tokenflow_batch.files import at_home
from tokenflow_batch.manifest_names import (
    EditName,
    Name,
    PathText,
    check_naming,
    clip_name,
    refuse_equal_names,
)
from tokenflow_batch.manifest_rows import Level, expand, read_table
from tokenflow_batch.manifest_text import Problems, Text, Where
from tokenflow_batch.manifest_words import told, unknown_key
from tokenflow_batch.ranges import Part, seconds

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".m2ts", ".mts"}
    | {".wmv", ".flv", ".ogv", ".3gp", ".gif"}
)


Count = Annotated[int, Field(ge=0, lt=2**40, strict=True)]
Seconds = Annotated[
    Fraction, PlainValidator(seconds), WithJsonSchema({"type": ["number", "string"]})
]
M = TypeVar("M", bound=Frozen)


class EditEntry(Frozen):
    """What only an edit has; it may also give any setting."""

    name: EditName
    prompt: str = Field(min_length=1)


class ClipEntry(Frozen):
    """What only a clip has; it may also give any setting for its edits."""

    video: PathText = Field(description="file, glob or folder, relative to the manifest")
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
    model: PathText = Field(description="hub id, folder, single file, or `demo`")
    base_config: str | None = Field(
        None, description="for a single file: folder or hub id with its component configs"
    )
    output: PathText = Field("outputs/", description="relative to the manifest")
    naming: PathText = Field(NAMING, description="where a video goes under `output`")
    runtime: Runtime = Runtime()
    defaults: Level = Field(default_factory=dict)
    clips: list[Level] = Field(min_length=1)


def load(
    path: Path,
    *,
    output: Path | None = None,
    workdir: Path | None = None,
    model: str | None = None,
    tolerant: bool = False,
) -> Batch:
    """Read and resolve a manifest.

    Args:
        path: the YAML or JSON file, or a CSV table.
        output: overrides the manifest's `output`.
        workdir: overrides the default work folder, `OUTPUT/.work`.
        model: of a CSV table, which names none.
        tolerant: leave out single clips and edits that are wrong (`Batch.mistakes`), if there are
            others.

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
    given = path.parent / at_home(top.output)
    results = [p.resolve() for p in (given, output, workdir) if p is not None]
    for index in range(len(top.clips)):
        jobs += _clip_jobs(path, top, index, results, problems)
    good = refuse_equal_names(jobs, problems)
    check_naming(top.naming, good, problems)
    if not tolerant or problems.general or not good:
        problems.stop()
    out = output or given
    lines = {key: f"{path}:{text.line((key,))}" for key in ("model", "runtime") if key in text.raw}
    return Batch(
        tuple(good),
        out,
        workdir or out / ".work",
        top.runtime,
        top.naming,
        mistakes=tuple(problems.lines),
        where=lines,
    )


def _clip_jobs(
    path: Path, top: ManifestFile, index: int, results: Sequence[Path], problems: Problems
) -> list[Job]:
    where: Where = ("clips", index)
    before = len(problems.lines)
    entry, shared = _split(top.clips[index], ClipEntry, where, problems)
    if entry is None:
        return []
    found = _videos(path.parent, entry, results, where, problems)
    part = _part(entry, where, problems)
    videos = [(v, clip_name(entry.name, v, part, where, problems)) for v in found]
    beside = {video: _sidecar(video, where, problems) for video in found}
    wrong = len(problems.lines) > before
    edits: list[tuple[EditEntry, Settings, int]] = []
    for number, compact in enumerate(entry.edits):
        at = (*where, "edits", number)
        for raw in expand(compact, at, problems):
            known = len(problems.lines)
            edit, own = _split(raw, EditEntry, at, problems)
            if edit is not None:
                levels = [(("defaults",), top.defaults), (where, shared), (at, own)]
                settings = _settings(levels, edit.prompt, problems)
                if settings is not None and len(problems.lines) == known:
                    edits.append((edit, settings, problems.text.line(at)))
    if wrong:  # nothing of it can be meant as it stands
        return []
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
        for (key, *rest), message in told(error, lambda _: ()):
            if key in origin:  # what follows from another key is wrong there
                problems.add((*origin[str(key)], *rest), message)
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


def _videos(
    root: Path, entry: ClipEntry, results: Sequence[Path], where: Where, problems: Problems
) -> list[Path]:
    """The files that `video` names: one file, a glob's matches, or a folder's videos.

    A search leaves the folders of `results` (resolved) out, unless it begins inside of them.
    """
    target = root / at_home(entry.video)
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


def _is_video(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix.lower() in VIDEO_SUFFIXES and (folder / path).is_file()


def _model_reference(root: Path, model: str) -> str:
    """A path relative to the manifest if it exists, else the text as it stands (hub id, demo)."""
    local = root / at_home(model)
    return str(local) if model != "demo" and local.exists() else model


def _split(
    raw: Level, model: type[M] | None, where: Where, problems: Problems
) -> tuple[M | None, Level]:
    """Part a level into its own entry (if it has one) and the settings it passes on."""
    own = set(model.model_fields) if model else set()
    fields = Settings.model_fields.keys()
    known = own | (fields - {"prompt"})
    for key in raw:
        if key not in known:
            problems.add((*where, key), unknown_key(str(key), known))
    settings = {k: v for k, v in raw.items() if k in fields and k not in own}
    if model is None:
        return None, settings
    return _validate(model, {k: v for k, v in raw.items() if k in own}, where, problems), settings


def _validate(model: type[M], raw: Any, where: Where, problems: Problems) -> M | None:
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        for place, message in told(error, lambda item: _known(model, item)):
            problems.add((*where, *place), message)
        return None


def _known(model: type[Frozen], item: ErrorDetails) -> Iterable[str]:
    return (Runtime if "runtime" in item["loc"] else model).model_fields
