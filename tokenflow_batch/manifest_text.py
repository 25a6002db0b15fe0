"""A manifest's text: YAML or JSON with the line of every node, and what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tokenflow_batch.errors import ManifestError

Where = tuple[str | int, ...]
"""Keys and positions from the top to a node."""

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast where it is built


@dataclass(frozen=True)
class Text:
    """A manifest's data with the line of every node."""

    path: Path
    root: yaml.Node | None
    raw: Any
    lines: Mapping[Where, int] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Text:
        """Read a file.

        Raises:
            ManifestError: it is not there, no YAML, no mapping, or gives a key twice.
        """
        try:
            loader = _Loader(_decoded(path))
            root = loader.get_single_node()
            if isinstance(root, yaml.MappingNode):
                _refuse_duplicate_keys(path, root)  # before merge keys are resolved
            raw = None if root is None else loader.construct_document(root)
        except FileNotFoundError:
            raise ManifestError(f"{path}: no such manifest") from None
        except yaml.MarkedYAMLError as error:
            raise _not_yaml(path, error) from None
        except yaml.reader.ReaderError as error:
            line = path.read_bytes().decode().count("\n", 0, error.position) + 1
            what = f"character {error.character!r} can't stand in YAML"
            raise ManifestError(f"{path}:{line}: {what}") from None
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ManifestError(f"{path}: can't be read: {error}") from None
        if not isinstance(root, yaml.MappingNode):
            raise ManifestError(f"{path}:1: a manifest is a mapping: version, model, clips")
        return cls(path, root, raw)

    def line(self, where: Where) -> int:
        """The line of the innermost part of `where` that exists."""
        if self.root is None:  # a table: lines of whole clips and edits
            known = (self.lines.get(where[:n]) for n in range(len(where), 0, -1))
            return next((line for line in known if line is not None), 1)
        node, line = self.root, self.root.start_mark.line
        for part in where:
            found = _child(node, part)
            if found is None:
                break
            key, node = found
            line = key.start_mark.line
        return line + 1


# JSON writes characters beyond the first plane as two escapes, which YAML does not know.
_HEX = "[0-9a-fA-F]{2}"
_PAIR = re.compile(rf"(?<!\\)((?:\\\\)*)(\\u[dD][89abAB]{_HEX}\\u[dD][c-fC-F]{_HEX})")


def _joined(pair: re.Match[str]) -> str:
    return pair[1] + str(json.loads(f'"{pair[2]}"'))


def _decoded(path: Path) -> str:
    """A file's text.

    Raises:
        ManifestError: it is no UTF-8.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8")
        return _PAIR.sub(_joined, text) if path.suffix.lower() == ".json" else text
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ManifestError(
            f"{path}:{line}: byte {data[error.start]:#04x} is no UTF-8", hint="save it as UTF-8"
        ) from None


_YAML_HINTS = {
    "mapping values are not allowed": "put quotes around a text that has a colon in it",
    "cannot start any token": "indent with spaces, not tabs; put quotes around texts that begin "
    "with a special character",
    "end of stream": "a quote or bracket that begins there is not closed",
}


def _not_yaml(path: Path, error: yaml.MarkedYAMLError) -> ManifestError:
    problem = str(error.problem)
    mark = error.problem_mark or error.context_mark
    if "end of stream" in problem:  # the end says nothing: where did it begin?
        mark = error.context_mark or mark
    line = mark.line + 1 if mark else 1
    hint = next((told for said, told in _YAML_HINTS.items() if said in problem), None)
    return ManifestError(f"{path}:{line}: not valid YAML: {problem}", hint=hint)


def _child(node: yaml.Node, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """A node's key and value; a list's item is both. No tables: lists may have thousands."""
    if isinstance(node, yaml.MappingNode):
        pairs = ((key, value) for key, value in reversed(node.value) if key.value == str(part))
        return next(pairs, None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    return None


def _refuse_duplicate_keys(path: Path, root: yaml.Node) -> None:
    """YAML keeps the last of two equal keys without a word: an edit would be lost."""
    waiting, visited = [root], set[int]()
    while waiting:
        node = waiting.pop()
        if id(node) not in visited:  # an anchor may stand in many places, even in itself
            visited.add(id(node))
            waiting += _unique_children(path, node)


def _unique_children(path: Path, node: yaml.Node) -> list[yaml.Node]:
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ManifestError(f"{path}:{line}: a key must be a text, no list or mapping")
            if key.value in seen:
                raise ManifestError(f"{path}:{line}: `{key.value}` is given twice")
            seen.add(key.value)
        children = [value for _, value in node.value]
    return children


@dataclass
class Problems:
    """Collects everything that is wrong before saying so.

    Attributes:
        text: the manifest's.
        lines: what is wrong, with file and line.
        general: whether something is wrong outside of single clips, so that nothing can run.
    """

    text: Text
    lines: list[str] = field(default_factory=list)
    general: bool = False

    def add(self, where: Where, message: str) -> None:
        """Something is wrong at a node."""
        self.general |= where[:1] != ("clips",) or len(where) < 2
        dotted = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in where).lstrip(".")
        self.say(f"{self.text.path}:{self.text.line(where)}: {dotted}: {message}")

    def say(self, line: str) -> None:
        """Add a whole line, once."""
        if line not in self.lines:
            self.lines.append(line)

    def stop(self) -> None:
        """Go no further if anything was wrong.

        Raises:
            ManifestError: naming all of it.
        """
        if self.lines:
            raise ManifestError("\n".join(self.lines), hint="docs/manifest.md lists every key")
