"""The JSON Schema of manifests, for editors and other programs: made from what validates them."""

from __future__ import annotations

from typing import Any, cast

from pydantic import BaseModel, Field, create_model

from tokenflow_batch.config import Frozen, Settings
from tokenflow_batch.manifest import ClipEntry, EditEntry, ManifestFile

_OF_EDITS = {"prompt"}


def _settings(**more: Any) -> dict[str, Any]:
    fields: dict[str, Any] = {
        name: (info.annotation, info)
        for name, info in Settings.model_fields.items()
        if name not in _OF_EDITS
    }
    return fields | more


def _own(entry: type[BaseModel], *but: str) -> dict[str, Any]:
    return {n: (i.annotation, i) for n, i in entry.model_fields.items() if n not in but}


def _list(item: Any) -> Any:
    return list[item]


def _model(name: str, fields: dict[str, Any]) -> Any:
    return create_model(name, __base__=Frozen, **fields)


def manifest_model() -> type[BaseModel]:
    """All of a manifest's levels as one pydantic model."""
    edit = _model("Edit", _settings(**_own(EditEntry)))
    lists = {
        name: (_list(info.annotation) | None, Field(None, min_length=1))
        for name, info in (Settings.model_fields | EditEntry.model_fields).items()
        if name != "name"
    }
    matrix = _model("Matrix", lists)
    template = (str | None, Field(None, description="template such as `{prompt}`"))
    prompt = (str | None, None)
    varied = _model("MatrixEdit", _settings(matrix=(matrix, ...), name=template, prompt=prompt))
    edits = (_list(edit | varied), Field(min_length=1))
    clip = _model("Clip", _settings(**_own(ClipEntry, "edits"), edits=edits))
    defaults = _model("Defaults", _settings())
    top = _own(ManifestFile, "defaults", "clips")
    top["defaults"] = (defaults, Field(default_factory=defaults))
    top["clips"] = (_list(clip), Field(min_length=1))
    return cast(type[BaseModel], _model("Manifest", top))


def manifest_schema() -> dict[str, Any]:
    """The JSON Schema, draft 2020-12."""
    schema = manifest_model().model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
