"""The six stages: their names, their order, and whose results each reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

StageName = Literal["encode", "invert", "match", "edit", "render", "report"]

STAGES: tuple[StageName, ...] = ("encode", "invert", "match", "edit", "render", "report")
STAGE_INPUTS: Mapping[StageName, tuple[StageName, ...]] = {
    "encode": (),
    "invert": ("encode",),
    "match": ("encode", "invert"),
    "edit": ("encode", "invert", "match"),
    "render": ("encode", "edit"),
    "report": ("encode", "invert", "edit", "render"),
}
"""The stages whose results each stage is made of."""

STAGE_DATA: Mapping[StageName, tuple[StageName, ...]] = {
    **STAGE_INPUTS,
    "render": ("edit",),
    "report": ("render",),
}
"""Of these, the stages whose data it reads: of others records and facts do, which are kept."""
