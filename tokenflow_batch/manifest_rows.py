"""Manifest shorthand that becomes plain clips and edits: a table of rows, a matrix of settings."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from tokenflow_batch.errors import ManifestError
from tokenflow_batch.manifest_text import Problems, Text, Where

Level = dict[str, Any]
_PLAIN = {"video", "prompt", "name", "source_prompt", "negative_prompt"}
"""Columns that are text as they stand; others are read as YAML values."""


def read_table(path: Path, model: str | None) -> Text:
    """A CSV file of (video, prompt[, name, any setting]) rows as a manifest.

    Raises:
        ManifestError: it can't be read, or lacks what it needs.
    """
    if model is None:
        raise ManifestError(f"{path}: a table names no model", hint="give one with --model")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            columns = list(reader.fieldnames or ())
            _check_columns(path, columns)
            rows = [(reader.line_num, row) for row in reader]
    except FileNotFoundError:
        raise ManifestError(f"{path}: no such manifest") from None
    except (OSError, ValueError, csv.Error) as error:
        raise ManifestError(f"{path}: can't be read: {error}") from None
    clips: dict[str, Level] = {}
    lines: dict[Where, int] = {}
    for line, row in rows:
        if None in row or None in row.values():
            raise ManifestError(f"{path}:{line}: the row has not {len(columns)} cells")
        edit = {key: _cell(path, line, key, text) for key, text in row.items() if text.strip()}
        video = str(edit.pop("video", ""))
        if not video:
            raise ManifestError(f"{path}:{line}: `video` is missing")
        clip = clips.setdefault(video, {"video": video, "edits": []})
        edit.setdefault("name", file_safe(str(edit.get("prompt", ""))))
        at = ("clips", list(clips).index(video))
        lines.setdefault(at, line)
        lines[*at, "edits", len(clip["edits"])] = line
        clip["edits"].append(edit)
    return Text(path, None, {"version": 1, "model": model, "clips": list(clips.values())}, lines)


def _check_columns(path: Path, columns: list[str]) -> None:
    missing = [name for name in ("video", "prompt") if name not in columns]
    if missing:
        raise ManifestError(
            f"{path}:1: no column `{missing[0]}`: the first line names the columns",
            hint="video, prompt, and if you like name, source_prompt and any other setting",
        )
    twice = {name for name in columns if columns.count(name) > 1}
    if twice:
        raise ManifestError(f"{path}:1: column `{min(twice)}` is given twice")


def _cell(path: Path, line: int, key: str, text: str) -> Any:
    if key in _PLAIN:
        return text.strip()
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):  # the latter of a date that is none
        raise ManifestError(f"{path}:{line}: {key}: can't be read: {text!r}") from None


def expand(raw: Level, where: Where, problems: Problems) -> list[Level]:
    """An edit with a `matrix` as one edit for each combination of its values; others as they are.

    The `name` is a template with the matrix's keys in braces; values become safe for file names.
    """
    if "matrix" not in raw:
        return [raw]
    matrix, rest = raw["matrix"], {k: v for k, v in raw.items() if k != "matrix"}
    at = (*where, "matrix")
    if not isinstance(matrix, dict) or not matrix:
        problems.add(at, "must be settings with lists of values, such as {guidance_scale: [5, 9]}")
        return []
    for key, values in matrix.items():
        if not isinstance(values, list) or not values:
            problems.add((*at, key), "must be a list of at least one value")
            return []
        if key in rest or key == "name":
            problems.add(
                (*at, key), "stands beside the matrix too" if key in rest else "no setting"
            )
            return []
    template = rest.get("name", "-".join(f"{{{key}}}" for key in matrix))
    found = []
    for values in itertools.product(*matrix.values()):
        chosen = dict(zip(matrix, values, strict=True))
        try:
            name = str(template).format(**{k: file_safe(str(v)) for k, v in chosen.items()})
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            known = ", ".join(f"{{{key}}}" for key in matrix)
            problems.add((*where, "name"), f"template {template!r}: {error}; there are {known}")
            return []
        found.append({**rest, **chosen, "name": name})
    return found


def file_safe(text: str) -> str:
    """A text as part of a file name: letters, digits, dots and hyphens, at most 60 characters."""
    return re.sub(r"[^\w.]+", "-", text).strip("-.")[:60].rstrip("-.")
