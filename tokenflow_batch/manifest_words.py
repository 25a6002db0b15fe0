"""What pydantic finds wrong in a manifest, in words for people who write YAML."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from tokenflow_batch.manifest_text import Where

_LONGEST = 60


def told(
    error: ValidationError, known: Callable[[ErrorDetails], Iterable[str]]
) -> Iterator[tuple[Where, str]]:
    """Where something is wrong, and what.

    Args:
        error: of a level of the manifest.
        known: the keys that may stand where one is unknown.

    Yields:
        Keys and positions below the level, and a message.
    """
    found = error.errors()
    for item in found:
        place = tuple(part for part in item["loc"] if not _is_tag(part))
        if _is_tag(item["loc"][-1]) and _better(item, found):
            continue
        if item["type"] == "extra_forbidden":
            yield place, unknown_key(str(place[-1]), known(item))
        elif item["type"] == "missing" and isinstance(place[-1], str):
            yield place[:-1], f"`{place[-1]}` is missing"
        else:
            yield place, f"{_words(item)} (got {short(item['input'])})"


def unknown_key(key: str, known: Iterable[str]) -> str:
    """Of a key that nobody knows: the nearest that is known."""
    close = difflib.get_close_matches(key, list(known), n=1)
    return f"unknown key{f', did you mean `{close[0]}`?' if close else ''}"


def short(value: Any) -> str:
    """A value for messages."""
    text = repr(value)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 3] + "..."


def _is_tag(part: str | int) -> bool:
    """Whether a part of a place names one of a field's types, no key."""
    return isinstance(part, str) and ("[" in part or "(" in part)


def _better(item: ErrorDetails, found: list[ErrorDetails]) -> bool:
    """Whether another error says more about a value that may be of several types."""
    key, is_list = item["loc"][0], isinstance(item["input"], list)
    others = [e for e in found if e["loc"][0] == key and e is not item]
    return bool(others) and is_list == (item["type"] == "literal_error")


_WORDS = {
    "dict_type": "must be keys with values (`key: value`)",
    "model_type": "must be keys with values (`key: value`)",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "missing": "must be a list of two",
    "string_type": "must be a text: put it in quotes",
    "bool_type": "must be `true` or `false`",
    "bool_parsing": "must be `true` or `false`",
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
}
_PATTERNS = {
    "name": "can't be a file's name: no slash, backslash or line break, and no dot in front",
    "device": "must be `auto`, `cpu`, `cuda` or `cuda:N`",
}


def _words(item: ErrorDetails) -> str:
    kind, key = item["type"], item["loc"][-1]
    message = item["msg"].removeprefix("Value error, ")
    if key == "[key]":
        return "a key must be a text: put it in quotes"
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(str(key), message)
    if kind == "literal_error" and item["loc"][0] == "cuts":
        return "must be `auto`, `none` or a list of the first frames of new shots"
    if kind == "too_long":
        return message.replace("Tuple", "A list").replace(" after validation", "")
    return _WORDS.get(kind, message)
