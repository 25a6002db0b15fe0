"""The training loop of both stages: data parallel, with moving averages, resumable after a kill.

A stage hands in a function from the step number to the losses. All its draws must be functions of
(seed, step, rank); then a run that was killed and resumed sees the batches, and ends at the
weights, of one that was not.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn


@dataclass(frozen=True)
class LoopConfig:
    """What a training run depends on besides its losses; it may not change on resuming.

    Attributes:
        data: what is trained on, in words.
        seed: of all draws.
        steps: optimizer steps in all.
        batch: samples per step and process.
        learning_rate: peak of the schedule.
        hold: fraction of the steps before the cosine decay begins.
        floor: last learning rate as a fraction of the peak.
        warmup: steps of linear increase.
        betas: of AdamW.
        weight_decay: of AdamW.
        ema_decay: of the moving average of the weights, reached after a ramp.
        save_every: steps between checkpoints.
        log_every: steps averaged into one line of the log.
    """

    data: str
    seed: int
    steps: int
    batch: int
    learning_rate: float
    hold: float
    floor: float
    warmup: int
    betas: tuple[float, float]
    weight_decay: float
    ema_decay: float
    save_every: int = 100
    log_every: int = 10

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up, plateau, cosine decay."""
        rate = self.learning_rate * min(1.0, (step + 1) / self.warmup)
        done = step / self.steps
        if done < self.hold:
            return rate
        decay = 0.5 * (1 + math.cos(math.pi * (done - self.hold) / (1 - self.hold)))
        return rate * (self.floor + (1 - self.floor) * decay)

    def ema_decay_at(self, step: int) -> float:
        """A short memory at first, so that the average forgets the initial weights."""
        return min(self.ema_decay, (2 + step) / (11 + step))


class CheckpointMismatchError(RuntimeError):
    """A checkpoint was written under another configuration."""


class Run:
    """One stage's weights, their moving average and the optimizer.

    Args:
        parameters: what is trained; the same on every process.
        config: of the loop.
        state: the processes.
        folder: where `<name>.ckpt` and `<name>.jsonl` are.
        name: of the stage.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        config: LoopConfig,
        state: PartialState,
        folder: Path,
        name: str,
    ) -> None:
        self.parameters: list[Tensor] = list(parameters)
        self.config = config
        self.state = state
        self.checkpoint = folder / f"{name}.ckpt"
        self.log = folder / f"{name}.jsonl"
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = 0
        self.seconds = 0.0

    def fit(
        self,
        losses: Callable[[int], Mapping[str, Tensor]],
        evaluate: Callable[[], Mapping[str, float]] | None = None,
    ) -> None:
        """Train from the last checkpoint, or from the start, to the last step.

        Args:
            losses: maps a step to scalars; "loss" is minimised, all are logged.
            evaluate: scalars for the log at every checkpoint, with the weights as they are.

        Raises:
            CheckpointMismatchError: the checkpoint belongs to another configuration.
        """
        self._resume()
        recent: list[dict[str, float]] = []
        started = time.monotonic() - self.seconds
        while self.step < self.config.steps:
            recent.append(self._advance(losses))
            self.seconds = time.monotonic() - started
            saving = self.step % self.config.save_every == 0 or self.step == self.config.steps
            if not saving and self.step % self.config.log_every:
                continue
            if self.state.is_main_process:
                extra = evaluate() if saving and evaluate else {}
                means = {name: sum(r[name] for r in recent) / len(recent) for name in recent[0]}
                self._write_log({**means, **extra})
                if saving:
                    self._save()
            recent.clear()

    @torch.no_grad()
    def use_average(self) -> None:
        """Replace the weights by their moving average, for release."""
        for parameter, average in zip(self.parameters, self.average, strict=True):
            parameter.copy_(average)

    def _advance(self, losses: Callable[[int], Mapping[str, Tensor]]) -> dict[str, float]:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.step)
        self.optimizer.zero_grad()
        values = losses(self.step)
        values["loss"].backward()
        self._average_gradients()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        with torch.no_grad():
            weight = 1 - self.config.ema_decay_at(self.step)
            torch._foreach_lerp_(self.average, self.parameters, weight)
        self.step += 1
        return {name: value.item() for name, value in values.items()}

    def _average_gradients(self) -> None:
        """Average over the processes, in one message: many small ones cost more than overlap."""
        if self.state.num_processes == 1:
            return
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        torch.distributed.all_reduce(flat)
        flat /= self.state.num_processes
        offset = 0
        for gradient in gradients:
            gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
            offset += gradient.numel()

    def _identity(self) -> str:
        """Which runs may go on from each other's checkpoints."""
        fields = asdict(self.config) | {"processes": self.state.num_processes}
        # How often to save and to log has no influence on the weights.
        return json.dumps({k: v for k, v in fields.items() if not k.endswith("_every")})

    def _save(self) -> None:
        content: dict[str, Any] = {
            "identity": self._identity(),
            "step": self.step,
            "seconds": self.seconds,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.checkpoint.with_suffix(".partial")
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.checkpoint)

    @torch.no_grad()
    def _resume(self) -> None:
        if not self.checkpoint.exists():
            if self.state.is_main_process:
                self.log.unlink(missing_ok=True)
            return
        content = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
        if content["identity"] != self._identity():
            raise CheckpointMismatchError(
                f"{self.checkpoint} was written with {content['identity']}, this run has "
                f"{self._identity()}: use the same options, or another work folder"
            )
        for target, source in zip(self.parameters, content["parameters"], strict=True):
            target.copy_(source)
        for target, source in zip(self.average, content["average"], strict=True):
            target.copy_(source)
        self.optimizer.load_state_dict(content["optimizer"])
        self.step, self.seconds = content["step"], content["seconds"]
        if self.state.is_main_process:
            self._cut_log()

    def _cut_log(self) -> None:
        """Drop lines later than the checkpoint: those steps are taken again."""
        lines = self.log.read_text().splitlines(keepends=True) if self.log.exists() else []
        kept = [x for x in lines if x.endswith("\n") and json.loads(x)["step"] <= self.step]
        self.log.write_text("".join(kept))

    def _write_log(self, values: Mapping[str, float]) -> None:
        line = {
            "step": self.step,
            "samples": self.step * self.config.batch * self.state.num_processes,
            "seconds": round(self.seconds, 1),
            "learning_rate": float(f"{self.config.learning_rate_at(self.step - 1):.3g}"),
            **{name: float(f"{value:.5g}") for name, value in values.items()},
        }
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(" ".join(f"{name}={value}" for name, value in line.items()), flush=True)
