"""Resolved settings: what one job does, after manifest inheritance and presets.

Plain data, importable without torch. Names are those of diffusers and the paper where they exist.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from tokenflow_batch.ranges import Part

Dtype = Literal["auto", "fp32", "fp16", "bf16"]
Technique = Literal["pnp", "sdedit"]
Preset = Literal["fast", "balanced", "quality", "official"]
ConvFeatures = Literal["store", "store8", "recompute"]

_Number = TypeVar("_Number", int, float)

NAMING = "{clip}/{edit}.mp4"
"""Where videos go under the output folder unless a manifest says otherwise."""


def _ascending(values: tuple[_Number, ...]) -> tuple[_Number, ...]:
    if any(a >= b for a, b in pairwise(values)):
        raise ValueError("must ascend, no value twice")
    return values


UNIT_SIDE = Annotated[int, Field(ge=8, le=16384)]
SHARE = Annotated[float, Field(ge=0, le=1)]
INTERVAL = Annotated[tuple[SHARE, SHARE], AfterValidator(_ascending)]
CUTS = Annotated[tuple[Annotated[int, Field(ge=1)], ...], AfterValidator(_ascending)]


class Frozen(BaseModel):
    """Immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` where a number is wanted: Python takes it for 1."""
        field = cls.model_fields[info.field_name or ""]
        if isinstance(value, bool) and field.annotation in (int, float):
            raise ValueError("must be a number")
        return value


class Runtime(Frozen):
    """Where and how a process computes. Bits depend on it, so it is recorded beside the results."""

    device: str = Field(
        "auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="`auto`, `cpu`, `cuda` or `cuda:N`"
    )
    dtype: Dtype = Field("auto", description="fp16 on a GPU and fp32 on a CPU unless set")
    threads: int = Field(2, ge=1, le=1024, description="CPU threads of every process")
    attention: Literal["auto", "sdpa", "xformers"] = "auto"
    correspondence: Literal["auto", "faiss", "torch", "triton"] = "auto"
    channels_last: bool | None = Field(
        None, description="how the model's images lie in memory; unset, what is fastest"
    )
    compile: bool = Field(False, description="the UNet's parts through torch.compile")
    edits_together: int = Field(
        16, ge=1, le=1000, description="edits of a clip that go side by side, on one reading of it"
    )


class Settings(Frozen):
    """Everything about one edit of one clip that affects the result.

    A manifest gives these under `defaults`, a clip or an edit; the innermost wins.
    """

    # the clip
    source_prompt: str = Field("", description="what the video shows; steers the inversion")
    keyframe_seed: int = Field(0, ge=-(2**63), lt=2**63)
    resolution: tuple[UNIT_SIDE, UNIT_SIDE] | None = Field(
        None, description="working width, height; default: the source's, to the model's multiple"
    )
    fit: Literal["resize", "crop", "pad"] = Field(
        "crop", description="how the source becomes the working resolution"
    )
    restore_size: bool = Field(False, description="give the output the source's size again")
    preset: Preset = "balanced"
    steps: int = Field(25, ge=1, le=1000, description="sampling steps T; overrides the preset")
    inversion_steps: int = Field(25, ge=1, le=1000)
    inversion_iterations: int = Field(
        1, ge=0, le=100, description="extra fixed-point iterations per step; 0 is plain inversion"
    )
    mode: Literal["default", "official"] = "default"
    cuts: Literal["auto", "none"] | CUTS = Field(
        "auto", description="first frames of new shots; `auto` finds them, none is crossed"
    )
    segment_length: int = Field(8, ge=1, le=4096, description="B, frames per keyframe")
    window_segments: int = Field(
        16, ge=2, le=4096, description="K_w, segments edited jointly; longer clips are overlapped"
    )
    window_overlap: int = Field(
        2, ge=1, le=2048, description="O, segments shared by neighbouring windows"
    )
    anchors: int = Field(
        4, ge=0, le=256, description="keyframes of the clip that every window attends to"
    )
    chunk_frames: int = Field(64, ge=1, le=65536, description="frames per unit of work and shard")
    unet_batch: int = Field(16, ge=1, le=4096, description="frames per UNet call outside the edit")
    vae_batch: int = Field(4, ge=1, le=4096)
    # the edit
    prompt: str = ""
    negative_prompt: str = ""
    guidance_scale: float = Field(7.5, ge=0, le=100)
    guidance_interval: INTERVAL = Field(
        (0.0, 1.0), description="shares of the sampling steps between which there is guidance"
    )
    guidance_focus: SHARE = Field(
        0.5,
        description="share of the sampling steps from which on there is guidance only where the "
        "prompt asks for something else than the source's, and in the last sixth frames keep "
        "their own attention elsewhere, and what is left as it was goes back to the source; "
        "1: everywhere to the end",
    )
    technique: Technique = "pnp"
    attn_t: SHARE = Field(0.5, description="PnP: share of steps with injected queries and keys")
    f_t: SHARE = Field(0.8, description="PnP: share of steps with injected convolution features")
    conv_site: str = Field(
        "up_blocks.1.resnets.1",
        pattern=r"^up_blocks\.\d+\.resnets\.\d+$",
        description="PnP: the residual block whose convolution features are injected",
    )
    conv_features: ConvFeatures = Field(
        "store",
        description="PnP: the source's convolution features are stored in 16 bits, in 8 bits "
        "(store8), or not at all and computed again when they are needed",
    )
    strength: float = Field(0.9, gt=0, le=1, description="SDEdit: share of steps that are sampled")
    sampler: Literal["ddim", "dpmsolver++"] = "ddim"
    # the output
    crf: int = Field(16, ge=1, le=51, description="x264 constant rate factor")
    audio: bool = Field(True, description="copy the source's audio")

    @property
    def first_step(self) -> int:
        """The sampling step the edit starts at: later for SDEdit below full strength."""
        if self.technique == "pnp":
            return 0
        return min(self.steps - round(self.steps * self.strength), self.steps - 1)


PRESETS: dict[Preset, dict[str, object]] = {
    "fast": {"steps": 10, "inversion_iterations": 2},
    "balanced": {"steps": 25, "inversion_iterations": 1},
    "quality": {"steps": 50, "inversion_iterations": 1},
    "official": {
        "steps": 50,
        "inversion_steps": 500,
        "inversion_iterations": 0,
        "mode": "official",
    },
}


@dataclass(frozen=True)
class Job:
    """One edit of one clip.

    Attributes:
        clip: the clip's name, a folder under the output.
        edit: the edit's name.
        video: the source file.
        model: hub id, folder, single file or `demo`.
        base_config: for a single file, the folder or hub id whose component configs fit it.
        settings: everything that affects the result.
        stored_conv_steps: for how many of the first steps `match` stores convolution features:
            what the clip's PnP edits need together.
        where: manifest file and line, for messages.
        part: which part of the video; all of it where None.
        stored_conv8_steps: the same for features in 8 bits.
    """

    clip: str
    edit: str
    video: Path
    model: str
    base_config: str | None
    settings: Settings
    stored_conv_steps: int
    where: str
    part: Part | None = None
    stored_conv8_steps: int = 0

    @property
    def name(self) -> str:
        """`clip/edit`, how messages call the job."""
        return f"{self.clip}/{self.edit}"


def stored_conv_steps(edits: Sequence[Settings]) -> dict[tuple[int, ConvFeatures], int]:
    """For how many of the first steps `match` stores convolution features, by `steps` and kind.

    The usual share (f_t = 0.8) or, if some edit asks for more, all: so that adding an edit to a
    clip doesn't make its `match` another one. Edits that compute them again ask for none.
    """
    wanted: dict[tuple[int, ConvFeatures], int] = {}
    for s in edits:
        if s.technique == "pnp" and s.mode == "default":
            usual = int(s.steps * 0.8)
            needed = usual if int(s.steps * s.f_t) <= usual else s.steps
            kind = s.steps, s.conv_features
            wanted[kind] = max(needed, wanted.get(kind, 0))
    return wanted


@dataclass(frozen=True)
class Batch:
    """A manifest, resolved: jobs in its order, and where they write.

    Attributes:
        jobs: to work on.
        output: the folder of results.
        workdir: the folder of everything else.
        runtime: how to compute.
        naming: template of the videos' paths under the output folder.
        others: jobs of the manifest that are left out this time (`only`), whose results are kept.
        scratch: a folder of this process on a disk of its machine.
        mistakes: what is wrong with the manifest's other clips and edits, with file and line.
        where: manifest file and line of `model` and `runtime`, for messages.
    """

    jobs: tuple[Job, ...]
    output: Path
    workdir: Path
    runtime: Runtime
    naming: str = NAMING
    others: tuple[Job, ...] = ()
    scratch: Path | None = None
    mistakes: tuple[str, ...] = ()
    where: Mapping[str, str] = field(default_factory=dict)

    def with_conv_features(self, kind: ConvFeatures) -> Batch:
        """The same jobs, with `kind` wherever convolution features would be stored in 16 bits."""
        jobs = (_with_conv_features(job, kind) for job in self.jobs)
        return replace(self, jobs=tuple(jobs))

    def only(self, patterns: Sequence[str]) -> Batch:
        """The jobs that at least one pattern names, in the manifest's order.

        Args:
            patterns: shell-style, against `clip/edit`, or the clip alone where there is no slash.

        Raises:
            ValueError: a pattern names none; says the nearest name.
        """
        chosen: set[str] = set()
        for pattern in patterns:
            whole = "/" in pattern
            names = {j.name: j.name if whole else j.clip for j in self.jobs}
            found = {job for job, name in names.items() if fnmatchcase(name, pattern)}
            if not found:
                close = difflib.get_close_matches(pattern, set(names.values()), n=1, cutoff=0.3)
                hint = f"; the nearest is {close[0]!r}" if close else ""
                raise ValueError(f"no job is called {pattern!r}{hint}")
            chosen |= found
        left_out = tuple(j for j in self.jobs if j.name not in chosen)
        return replace(
            self,
            jobs=tuple(j for j in self.jobs if j.name in chosen),
            others=(*self.others, *left_out),
        )


def _with_conv_features(job: Job, kind: ConvFeatures) -> Job:
    """A job of a clip all of whose edits do so."""
    if kind == "store":
        return job
    s, more = job.settings, job.stored_conv_steps if kind == "store8" else 0
    changed = s.model_copy(update={"conv_features": kind}) if s.conv_features == "store" else s
    return replace(
        job,
        settings=changed,
        stored_conv_steps=0,
        stored_conv8_steps=max(more, job.stored_conv8_steps),
    )
