"""What identifies a stage's result: everything that affects it, and nothing else.

One place for it: a stage's key is the digest of its VERSION, its settings, its inputs' digests and
the keys of the stages that it reads. Paths, names, verbosity and the number of processes are not in
there. Raise a stage's VERSION when its result changes for the same settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenflow_batch.config import Job, Settings
from tokenflow_batch.files import digest_json
from tokenflow_batch.ranges import Part
from tokenflow_batch.stage_names import StageName

KEY_LENGTH = 24
"""Hexadecimal digits of a key."""

VERSIONS: Mapping[StageName, int] = {
    "encode": 2,
    "invert": 4,
    "match": 3,
    "edit": 13,
    "render": 1,
    "report": 2,
}

_ENCODE = ("resolution", "fit", "chunk_frames", "vae_batch")
_INVERT = (
    "source_prompt",
    "steps",
    "inversion_steps",
    "inversion_iterations",
    "mode",
    "unet_batch",
)
_MATCH = ("keyframe_seed", "segment_length", "cuts")
_EDIT = (
    "prompt",
    "negative_prompt",
    "guidance_scale",
    "guidance_interval",
    "technique",
    "sampler",
    "window_segments",
    "window_overlap",
    "anchors",
)
_PNP = ("attn_t", "f_t", "conv_site")
_STORED_SOURCE = ("conv_features",)
"""Of PnP edits whose features come from `match`: in official mode they are found on the way."""
_SDEDIT = ("strength",)
_DEFAULT_MODE = ("guidance_focus",)
"""Of edits in the default mode; the official one knows nothing of it."""
_RENDER = ("crf", "audio", "restore_size")
_LATER = {
    name: Settings.model_fields[name].default for name in ("guidance_interval", "conv_features")
}
"""Settings that came after the first keys: at their default, which changes nothing, they are left
out, so that what was computed before them stays valid."""


Values = tuple[tuple[str, Any], ...]
"""Settings by name."""


@dataclass(frozen=True)
class Identity:
    """Digests of a job's inputs.

    Attributes:
        video: of the source file.
        vae: fingerprint of the autoencoder.
        denoiser: fingerprint of UNet, text encoder, tokenizer and scheduler.
    """

    video: str
    vae: str
    denoiser: str


@dataclass(frozen=True)
class StageKey:
    """A stage's key and what it stands for (written beside the data as key.json)."""

    stage: StageName
    key: str
    described: Mapping[str, Any]


def stage_keys(job: Job, identity: Identity, dtype: str) -> dict[StageName, StageKey]:
    """The keys of all six stages of a job.

    Args:
        job: its settings count, its names and paths don't.
        identity: digests of its inputs.
        dtype: as configured (`auto` is not resolved: what it came to is in the numerics record).
    """
    s = job.settings
    stored = (job.stored_conv_steps, job.stored_conv8_steps)
    of_source = (_values(s, names) for names in (_ENCODE, _INVERT, _MATCH))
    source, match = _source_keys(identity, job.part, dtype, *of_source, (*stored, s.conv_site))
    kept, own = (_STORED_SOURCE, _DEFAULT_MODE) if s.mode == "default" else ((), ())
    technique = (*_PNP, *kept) if s.technique == "pnp" else _SDEDIT
    edit = _key("edit", {"match": match, **_pick(s, (*_EDIT, *own, *technique))})
    encode = source["encode"].key
    render = _key("render", {"edit": edit.key, "encode": encode, **_pick(s, _RENDER)})
    report = _key("report", {"render": render.key})
    return {**source, "edit": edit, "render": render, "report": report}


def _key(stage: StageName, values: Mapping[str, Any]) -> StageKey:
    described = {"stage": stage, "version": VERSIONS[stage], **values}
    return StageKey(stage, digest_json(described)[:KEY_LENGTH], described)


@lru_cache(maxsize=64)  # a clip's edits have these in common
def _source_keys(
    identity: Identity,
    part: Part | None,
    dtype: str,
    encoded: Values,
    inverted: Values,
    matched: Values,
    stored: tuple[int, int, str],
) -> tuple[Mapping[StageName, StageKey], str]:
    """The keys of `encode`, `invert` and `match`, and what an edit's key has of `match`'s."""
    source = {"video": identity.video} | ({"part": part.described()} if part is not None else {})
    encode = _key("encode", {**source, "vae": identity.vae, "dtype": dtype, **_json(encoded)})
    model = {"encode": encode.key, "model": identity.denoiser, "dtype": dtype}
    invert = _key("invert", {**model, **_json(inverted)})
    described = {"invert": invert.key, **_json(matched)}
    match = _key("match", {**described, **_stored(*stored)})
    # What an edit reads of `match` doesn't depend on how much more is stored for other edits.
    read = digest_json({"version": VERSIONS["match"], **described})[:KEY_LENGTH]
    return {"encode": encode, "invert": invert, "match": match}, read


def _stored(steps: int, steps8: int, site: str) -> dict[str, Any]:
    """What of the convolution features `match` stores."""
    found: dict[str, Any] = {"conv_steps": steps}
    if steps8:
        found["conv8_steps"] = steps8
    if steps or steps8:
        found["conv_site"] = site
    return found


STORED = ("conv_steps", "conv8_steps", "conv_site")
"""What of `match`'s key its edits' keys don't see."""


def _pick(settings: Settings, names: tuple[str, ...]) -> dict[str, Any]:
    return _json(_values(settings, names))


def _values(settings: Settings, names: tuple[str, ...]) -> Values:
    return tuple((name, getattr(settings, name)) for name in names)


def _json(values: Values) -> dict[str, Any]:
    # As `model_dump` in JSON mode would give them, ten times as fast: plans make thousands of keys.
    return {
        name: list(v) if isinstance(v, tuple) else v
        for name, v in values
        if not (name in _LATER and v == _LATER[name])
    }
