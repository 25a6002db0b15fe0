"""edit: inverted latents and a prompt → edited latents, step by step over the whole clip."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tokenflow_batch.arrays import (
    CONV,
    CONV8,
    CONV8_SCALE,
    edit_arrays,
    index_name,
    state_names,
)
from tokenflow_batch.config import Settings
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.models import require_finite
from tokenflow_batch.plan import guidance_of, injection_of
from tokenflow_batch.stages.base import Advance, Stage, StageContext
from tokenflow_batch.stages.clip import CleanLatents, Clip, InvertedLatents, read_clip
from tokenflow_batch.stages.matching import sites_by_tokens
from tokenflow_batch.store import Array, ArrayStore, unit_name
from tokenflow_batch.tokenflow.attention import tokenflow_hooks
from tokenflow_batch.tokenflow.ddim import Schedule, renoise
from tokenflow_batch.tokenflow.denoise import (
    Denoiser,
    EditSettings,
    Prompts,
    predict_window,
)
from tokenflow_batch.tokenflow.injection import Site, attention_sites
from tokenflow_batch.tokenflow.keyframes import draw_keyframes
from tokenflow_batch.tokenflow.modes import MODES
from tokenflow_batch.tokenflow.quantise import dequantise
from tokenflow_batch.tokenflow.samplers import SAMPLERS, Sampler, State
from tokenflow_batch.tokenflow.windows import (
    Chunk,
    Layout,
    Window,
    WindowMoment,
)
from tokenflow_batch.turns import Turns, all_turns


class Edit(Stage):
    """Units: per sampling step, one per *window* (its noise predictions), then one per chunk to
    *advance* the latents. Both are dropped once the next step's latents are all there."""

    name = "edit"

    def run(self, context: StageContext, folder: StageFolder) -> None:
        """See `Stage.run`."""
        all_turns(self.turns(context, folder))

    def turns(self, context: StageContext, folder: StageFolder) -> Turns[None]:
        """See `Stage.turns`: a turn is a window, or all that ends a step.

        Edits of a clip then read what is stored of the source once, each window of a step for all
        of them. Each has UNet batches of its own, so its bits are those of an edit alone.
        """
        s, clip, model = context.settings, read_clip(context), context.model()
        model.check_conv_site(s.conv_site)
        schedule = model.schedule(s.steps)
        inversion = model.schedule(s.inversion_steps)
        reads = context.beside.reads
        source = InvertedLatents(context.folder("invert"), schedule, inversion, reads)
        layout, sampler = clip.layout(s), SAMPLERS[s.sampler]
        frame_shape = model.frame_shape(clip.geometry.working)
        latent_hw = frame_shape[1], frame_shape[2]
        size = (s.steps, clip.frames, clip.chunk_frames)
        windows = (len(layout.windows), max(map(len, layout.windows)))
        specs = edit_arrays(*size, frame_shape, windows, sampler.history)
        store = context.store(folder, specs)
        prompts = Prompts(*(model.embed(p) for p in (s.source_prompt, s.negative_prompt, s.prompt)))
        first = context.sharing.agree(
            folder, "first step", lambda: _resume_at(folder, clip, layout.windows, s)
        )
        denoiser = Denoiser(model.unet, model.prediction_type)
        sites = attention_sites(model.unet)
        inputs = _Inputs(context, store, source, sampler, schedule, inversion, sites, latent_hw)
        settings = _edit_settings(context, latent_hw)
        work = _Editing(clip, layout, store, inputs, denoiser, prompts, settings, schedule)
        with context.progress("edit", (s.steps - first) * clip.frames) as advance:
            for step in range(first, s.steps):
                yield from work.step(step, s, sampler, advance)
            work.tidy()


def _edit_settings(context: StageContext, latent_hw: tuple[int, int]) -> EditSettings:
    s = context.settings
    return EditSettings(
        guidance=guidance_of(s),
        injection=injection_of(s),
        steps=s.steps,
        batch=s.segment_length,
        latent_hw=latent_hw,
        mode=MODES[s.mode],
        matching=context.compute.matching,
        recompute_conv=s.conv_features == "recompute",
    )


def _resume_at(
    folder: StageFolder, clip: Clip, windows: Sequence[Window], settings: Settings
) -> int:
    """The step to go on with: the last one whose input latents are all there.

    If there is none although units were dropped, latents that were needed have been lost to damage:
    then everything is begun anew.
    """
    for step in range(settings.steps, settings.first_step, -1):
        units = (unit_name("advance", (step, c.index)) for c in clip.chunks)
        if all(folder.available(unit) for unit in units):
            for earlier in range(step):  # a killed process may not have come to it
                _drop_step(folder, earlier, windows, clip)
            return step
    begun = list(folder.units())
    if any(not folder.available(unit) for unit in begun):
        for unit in begun:
            if unit.startswith(("advance", "window")):
                folder.forget(unit)
    return settings.first_step


def _drop_step(folder: StageFolder, step: int, windows: Sequence[Window], clip: Clip) -> None:
    """Remove what led to the next step's latents, now that they are there."""
    for unit in _units_of(step, windows, clip):
        folder.drop(unit)


def _units_of(step: int, windows: Sequence[Window], clip: Clip) -> list[str]:
    """What leads to the next step's latents."""
    noise = [unit_name("window", (step, window.index, 0)) for window in windows]
    return noise + [unit_name("advance", (step, chunk.index)) for chunk in clip.chunks]


@dataclass
class _Inputs:
    """A window's inputs out of the stores, at `step`."""

    context: StageContext
    store: ArrayStore
    source_latents: InvertedLatents
    sampler: Sampler
    schedule: Schedule
    inversion: Schedule
    sites: Sequence[Site]
    latent_hw: tuple[int, int]
    step: int = 0

    def __post_init__(self) -> None:
        stored = MODES[self.context.settings.mode].stored_source
        self._match = ArrayStore.open(self.context.folder("match")) if stored else None
        self._groups = sites_by_tokens(self.sites, self.latent_hw)

    def at(self, step: int, part: Window | Chunk) -> None:
        """Come to a window at a step, or to the chunk that it advances."""
        self.step = step
        if self.context.beside.reads is not None:
            self.context.beside.reads.at((type(part), step, part.start, part.stop))

    def _stored(self, name: str, frames: Sequence[int]) -> Array:
        assert self._match is not None  # noqa: S101 - only asked for with a stored source
        return self._match.shared(self.context.beside.reads, name, (self.step,), frames)

    def latents(self, frames: Sequence[int]) -> Tensor:
        """Edited latents before the step: the inverted ones at the first."""
        return self.state(frames).x

    def state(self, frames: Sequence[int]) -> State:
        """Latents and sampler history before the step."""
        if self.step == self.context.settings.first_step:
            return State(self._start(frames))
        x, *history = (
            torch.from_numpy(self.store.read(name, (self.step,), frames))
            for name in state_names(self.sampler.history)
        )
        return State(x, tuple(history))

    def _start(self, frames: Sequence[int]) -> Tensor:
        """Where sampling begins: the inverted latents; as published, the clean ones re-noised."""
        if self.context.settings.mode != "official":
            return self.source(frames)
        clean = CleanLatents(self.context.folder("encode")).read(frames)
        noisiest, inversion = self.source_latents.noisiest(frames), self.inversion
        return renoise(clean, noisiest, inversion.alphas[0], self.schedule.alphas[self.step])

    def source(self, frames: Sequence[int]) -> Tensor:
        """Inverted latents at the step."""
        return self.source_latents.read(self.step, frames)

    def conv(self, frames: Sequence[int]) -> Tensor:
        """Stored convolution features."""
        names = (CONV8, CONV8_SCALE) if self.context.settings.conv_features == "store8" else (CONV,)
        data = [torch.from_numpy(self._stored(name, frames)) for name in names]
        return data[0] if len(data) == 1 else dequantise(*data)

    def correspondences(self, frames: Sequence[int]) -> list[Tensor]:
        """γ per site, (N, 2, L) int64."""
        index: dict[int, Tensor] = {}
        for tokens, group in self._groups.items():
            shared = torch.from_numpy(self._stored(index_name(tokens), frames).astype("int64"))
            index.update({site.index: shared for site in group})
        return [index[i] for i in range(len(index))]


@dataclass
class _Editing:
    """One edit, a step at a time; `over` is a step whose units can go."""

    clip: Clip
    layout: Layout
    store: ArrayStore
    inputs: _Inputs
    denoiser: Denoiser
    prompts: Prompts
    settings: EditSettings
    schedule: Schedule
    over: int | None = None

    def step(self, step: int, s: Settings, sampler: Sampler, advance: Advance) -> Turns[None]:
        """Compute and commit a sampling step: windows, then advances; then drop what is over."""
        folder, sharing = self.store.stage, self.inputs.context.sharing
        drawn = draw_keyframes(s.keyframe_seed, step, self.layout.segments)
        anchored = self.layout.at(s.keyframe_seed, step)
        windows = {unit_name("window", (step, w.index, 0)): w for w in self.layout.windows}
        told = 0
        for name, window in windows.items():
            yield step, window.index
            self.inputs.at(step, window)
            for _ in sharing.claimed(folder, {name: window}):
                moment = anchored.moment(self.settings.mode.neighbours, drawn, window)
                self._window(step, window, moment)
            # Earlier ones are done or in work, by whomever.
            reached = self.clip.frames * (window.index + 1) // len(windows)
            advance(reached - told)
            told = reached
        yield step, len(windows)
        self.tidy()
        sharing.all_there(folder, windows, coming=True)
        chunks = {unit_name("advance", (step + 1, c.index)): c for c in self.clip.chunks}
        for chunk in sharing.share(folder, chunks, coming=True):
            self._advance(step, chunk, drawn, s.first_step, sampler)
        advance(self.clip.frames - told)
        self.over = step

    def tidy(self) -> None:
        """Drop what led to the latents that this step began with.

        That must wait for the last of them to be written, so it is done late: once the next thing
        to write is computed.
        """
        if self.over is None:
            return
        folder, sharing = self.store.stage, self.inputs.context.sharing
        step, self.over = self.over, None
        with sharing.busy(folder):
            if sharing.mine(folder, f"drop-{step}"):
                _drop_step(folder, step, self.layout.windows, self.clip)
        folder.release(_units_of(step, self.layout.windows, self.clip))

    def _window(self, step: int, window: Window, moment: WindowMoment) -> None:
        made = self.denoiser.counts()
        began, context = time.perf_counter(), self.inputs.context
        # For a window only: other edits, with other sites, may have the next turn.
        with tokenflow_hooks(
            self.denoiser.unet, context.compute.attention, context.settings.conv_site
        ) as hooks:
            noise = predict_window(
                self.denoiser,
                hooks,
                self.inputs,
                self.prompts,
                self.settings,
                step=step,
                t=self.schedule.timesteps[step],
                alpha=self.schedule.alphas[step],
                window=moment,
            )
        require_finite(noise, f"sampling step {step}, frames {window.start} to {window.stop}")
        self.tidy()
        # Frames at its ends that belong to a neighbouring window alone stay 0.
        padded = noise.new_zeros(self.store.specs["noise"].frames, *noise.shape[1:])
        offset = moment.frames.start - window.start
        padded[offset : offset + len(noise)] = noise
        now = self.denoiser.counts()
        facts = {name: now[name] - made[name] for name in now}
        if not facts["partial_rows"]:  # then the work is the rows
            del facts["partial_rows"], facts["work"]
        facts["seconds"] = time.perf_counter() - began
        self.store.write((step, window.index, 0), {"noise": padded.numpy()}, facts)

    def _advance(
        self, step: int, chunk: Chunk, drawn: Sequence[int], first: int, sampler: Sampler
    ) -> None:
        self.inputs.at(step, chunk)
        noise = self._blended(step, chunk, drawn)
        state = self.inputs.state(chunk.frames)
        after = sampler.step(self.schedule, step, first, state, noise)
        values = (after.x.numpy(), *(h.numpy() for h in after.history))
        named = dict(zip(state_names(sampler.history), values, strict=True))
        self.store.write((step + 1, chunk.index), named)

    def _blended(self, step: int, chunk: Chunk, drawn: Sequence[int]) -> Tensor:
        """The windows' predictions for a chunk, summed in window order."""
        total: Tensor | None = None
        for window, weights in self.layout.blend(self.settings.mode.neighbours, drawn, chunk):
            inside = range(max(chunk.start, window.start), min(chunk.stop, window.stop))
            places = [f - window.start for f in inside]
            noise = torch.from_numpy(self.store.read("noise", (step, window.index), places))
            if total is None:
                total = noise.new_zeros(len(chunk), *noise.shape[1:])
            rows = slice(inside.start - chunk.start, inside.stop - chunk.start)
            total[rows] += torch.tensor(weights[rows]).view(-1, 1, 1, 1) * noise
        assert total is not None  # noqa: S101 - windows cover the clip
        return total


def read_edited(context: StageContext, frames: Sequence[int]) -> Tensor:
    """The final edited latents, (N, C, h, w) float32.

    Raises:
        DamagedUnit: they are not what was committed.
    """
    store = ArrayStore.open(context.folder("edit"))
    return torch.from_numpy(store.read("latents", (context.settings.steps,), frames))
