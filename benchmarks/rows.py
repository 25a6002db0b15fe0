"""UNet rows and FLOPs per frame and stage: as planned, and as a run really makes them.

    python benchmarks/rows.py MANIFEST [--json FILE]

The plan's side: the calls that `tokenflow_batch.plan` lists from settings and frame count, each
weighed on the meta device (no arithmetic is done). The run's side: rows and FLOPs from the commit
records, and FLOPs counted by torch while the stages run, in a work folder of their own. They must
all be equal; the exit code says so. FLOPs are those inside UNet calls: convolutions, projections,
attention, and in official mode, which searches correspondences on the way, that search.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula, sdpa_flop_count

from tokenflow_batch.config import Job, Settings
from tokenflow_batch.geometry import Fit, plan_geometry
from tokenflow_batch.manifest import load
from tokenflow_batch.models import Model
from tokenflow_batch.plan import UNetCall, partial_rows, rows, unet_calls
from tokenflow_batch.runner import Runner
from tokenflow_batch.stage_names import StageName
from tokenflow_batch.stages.base import Advance
from tokenflow_batch.stages.clip import read_clip
from tokenflow_batch.tokenflow.attention import Hooks, tokenflow_hooks
from tokenflow_batch.tokenflow.focus import Focus
from tokenflow_batch.tokenflow.injection import CONV_SITE
from tokenflow_batch.tokenflow.keyframes import Neighbours
from tokenflow_batch.tokenflow.passes import Enough, FeaturePass, KeyframePass
from tokenflow_batch.tokenflow.propagation import PropagationPass
from tokenflow_batch.tokenflow.windows import Standing
from tokenflow_batch.video import VideoFacts, probe

STAGES: tuple[StageName, ...] = ("invert", "match", "edit")
Counts = dict[StageName, dict[str, int]]


@register_flop_formula(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu)
def _cpu_flash(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    """Torch counts the GPU kernels of attention, but not the CPU's."""
    return sdpa_flop_count(q, k, v)


class MetaUNet:
    """A UNet without weights, to weigh calls on.

    Args:
        unet: the real one.
        frame_shape: latent shape of a frame, (C, h, w).
        embed_shape: text embedding shape, (T, E).
    """

    def __init__(
        self, unet: nn.Module, frame_shape: tuple[int, ...], embed_shape: tuple[int, ...]
    ) -> None:
        self.unet = copy.deepcopy(unet).to("meta")
        self.frame_shape, self.embed_shape = frame_shape, embed_shape

    def flops(self, call: UNetCall, conv_site: str = CONV_SITE) -> int:
        """Floating-point operations of one call."""
        with tokenflow_hooks(self.unet, conv_site=conv_site) as hooks:
            if call.kind == "plain":
                return self._count(call.rows)
            if call.kind == "partial":
                with hooks.during(FeaturePass()):
                    return self._count(call.rows)
            if call.kind == "keyframes":
                joint = self._joint(call)
                with hooks.during(joint), joint.focus.watching() if joint.focus else nullcontext():
                    return self._count(call.rows)
            return self._propagation(hooks, call)

    def _joint(self, call: UNetCall) -> KeyframePass:
        return KeyframePass(
            branches=call.branches,
            inject_qk=call.qk,
            inject_conv=False,  # copying features costs no arithmetic
            stored_conv_KChw=None,
            attention="sdpa",
            keep_tokens=call.branches > 1 + call.guided,
            standing=Standing.alone(call.anchors, call.frames - len(call.anchors)),
            guided=call.guided,
            focus=self._focus(call),
        )

    def _focus(self, call: UNetCall, *, of_source: bool = False) -> Focus | None:
        if not call.focused:
            return None
        text = torch.empty(self.embed_shape, device="meta")
        hw = (self.frame_shape[1], self.frame_shape[2])
        return Focus(self.unet, text, call.frames, hw, of_source=of_source)

    def _propagation(self, hooks: Hooks, call: UNetCall) -> int:
        """A small keyframe pass serves as the source of tokens: what is counted comes after it."""
        one = UNetCall("keyframes", max(call.searched, 1), call.branches, guided=call.guided)
        with hooks.during(self._joint(one)) as joint:
            self._forward(one.rows)
        tokens = [joint.outputs[site.index].shape[2] for site in hooks.sites]
        index = [torch.zeros(call.frames, 2, n, dtype=torch.long, device="meta") for n in tokens]
        hw = (self.frame_shape[1], self.frame_shape[2])
        spread = PropagationPass(
            joint,
            [Neighbours(0, max(call.searched, 1) - 1, 0.5)] * call.frames,
            branches=call.branches,
            inject_conv=False,
            stored_conv_NChw=None,
            stored_index=None if call.searched else index,
            matching="torch",
            grids=None if call.searched else [site.grid(hw) for site in hooks.sites],
            focus_K1hw=torch.empty(1, 1, *hw, device="meta") if call.own else None,
            own=call.own,
            source_focus=self._focus(call, of_source=True),
        )
        watching = spread.source_focus.watching() if spread.source_focus else nullcontext()
        with hooks.during(spread), watching:
            return self._count(call.rows)

    def _count(self, n_rows: int) -> int:
        with FlopCounterMode(display=False) as counter, suppress(Enough):
            self._forward(n_rows)
        return counter.get_total_flops()

    def _forward(self, n_rows: int) -> Tensor:
        x = torch.empty(n_rows, *self.frame_shape, device="meta")
        embeds = torch.empty(n_rows, *self.embed_shape, device="meta")
        timestep = torch.tensor(1, device="meta")
        noise: Tensor = self.unet(x, timestep, encoder_hidden_states=embeds, return_dict=False)[0]
        return noise


def planned(settings: Settings, frames: int, meta: MetaUNet, cuts: Sequence[int] = ()) -> Counts:
    """Rows and FLOPs per stage from the plan."""
    weights: dict[UNetCall, int] = {}
    found: Counts = {}
    for stage, calls in unet_calls(settings, frames, cuts).items():
        flops = 0
        for call, count in calls.items():
            # Frames of a batch don't see each other, save keyframes: weigh one of them.
            alike = call.frames if call.kind != "keyframes" else 1
            one = replace(call, frames=call.frames // alike, conv=False)
            if one not in weights:
                weights[one] = meta.flops(one, settings.conv_site)
            flops += weights[one] * alike * count
        found[stage] = {
            "rows": rows(calls),
            "partial_rows": partial_rows(calls),
            "flops": flops,
        }
    return found


@contextmanager
def _no_bar(what: str, total: int) -> Iterator[Advance]:  # noqa: ARG001
    yield lambda n: None  # noqa: ARG005


@contextmanager
def counting(unet: nn.Module) -> Iterator[Callable[[], int]]:
    """Count the FLOPs inside `unet`'s forward passes."""
    total = 0
    counter: FlopCounterMode | None = None

    def before(module: nn.Module, args: Any) -> None:  # noqa: ARG001
        nonlocal counter
        counter = FlopCounterMode(display=False)
        counter.__enter__()

    def after(module: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
        nonlocal total
        assert counter is not None
        counter.__exit__(None, None, None)
        total += counter.get_total_flops()

    # Also after passes that leave early.
    leaving = unet.register_forward_hook(after, always_call=True)
    handles = [unet.register_forward_pre_hook(before), leaving]
    try:
        yield lambda: total
    finally:
        for handle in handles:
            handle.remove()


def measured(manifest: Path) -> Iterator[tuple[Job, VideoFacts, Model, Counts, Sequence[int]]]:
    """Run every job's UNet stages from nothing and count; last come the clip's shot cuts."""
    for index, job in enumerate(load(manifest).jobs):
        with tempfile.TemporaryDirectory() as scratch:
            batch = load(manifest, output=Path(scratch))
            countable = {"attention": "sdpa", "correspondence": "torch"}  # torch sees no others
            runtime = batch.runtime.model_copy(update=countable)
            batch = replace(batch, jobs=(batch.jobs[index],), runtime=runtime)
            runner = Runner(batch, _no_bar)
            found: Counts = {}
            _check(runner.run(("encode",)))
            for stage in STAGES:
                with counting(runner.model.unet) as flops:
                    _check(runner.run((stage,)))
                folder = runner.context(batch.jobs[0]).folder(stage)
                totals = folder.totals()
                found[stage] = {
                    "rows": int(totals.get("rows", 0)),
                    "partial_rows": int(totals.get("partial_rows", 0)),
                    "flops": flops(),
                    "recorded": int(totals.get("flops", 0)),
                    "retried_rows": int(totals.get("retried_rows", 0)),
                }
            # Of `match`'s work, what `invert` has done on its way.
            handed = found["match"]["recorded"] - found["match"]["flops"]
            found["match"]["flops"] += handed
            found["invert"]["flops"] -= handed
            cuts = read_clip(runner.context(batch.jobs[0])).cuts
            yield job, probe(job.video, part=job.part), runner.model, found, cuts


def _check(results: Any) -> None:
    for result in results:
        if result.error is not None:
            raise SystemExit(str(result.error))


def compare(manifest: Path) -> list[dict[str, Any]]:
    """Plan and run of every job of a manifest."""
    report = []
    for job, facts, model, run, cuts in measured(manifest):
        s = job.settings
        geometry = plan_geometry(
            (facts.width, facts.height), s.resolution, Fit(s.fit), model.multiple
        )
        frame_shape = model.frame_shape(geometry.working)
        meta = MetaUNet(model.unet, frame_shape, tuple(model.embed(s.prompt).shape))
        plan = planned(s, facts.frames, meta, cuts)
        one = meta.flops(UNetCall("plain", 1))
        for counts in run.values():
            # Frames whose inversion swings are retried: no plan can know them.
            counts["flops"] -= counts.pop("retried_rows") * one
        recorded = {stage: counts.pop("recorded") for stage, counts in run.items()}
        equal = all(plan[stage] == run[stage] for stage in STAGES)
        equal &= all(recorded[stage] == run[stage]["flops"] for stage in STAGES)
        stages = {stage: _stage(plan[stage], run[stage], facts.frames) for stage in STAGES}
        report.append({"job": job.name, "frames": facts.frames, "equal": equal, "stages": stages})
    return report


def _stage(plan: Mapping[str, int], run: Mapping[str, int], frames: int) -> dict[str, float]:
    return {
        "rows_planned": plan["rows"],
        "rows_run": run["rows"],
        "rows_per_frame": plan["rows"] / frames,
        "partial_rows_planned": plan["partial_rows"],
        "partial_rows_run": run["partial_rows"],
        "flops_planned": plan["flops"],
        "flops_run": run["flops"],
        "gflops_per_frame": plan["flops"] / frames / 1e9,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("manifest", type=Path, metavar="MANIFEST")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    report = compare(args.manifest)
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    sys.exit(0 if all(job["equal"] for job in report) else 1)


if __name__ == "__main__":
    main()
