"""What a stage took of the device's memory: recorded when it is done, for later plans."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from tokenflow_batch.errors import DamagedUnit
from tokenflow_batch.footprint import host_bytes, largest_batches
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.stage_names import StageName
from tokenflow_batch.stages.base import StageContext
from tokenflow_batch.stages.clip import read_clip
from tokenflow_batch.store import ArrayStore

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryUse:
    """Watches one stage, from when it is made.

    On a GPU the memory is torch's on that device; on a CPU it is the process's.
    """

    def __init__(self, device: torch.device, folder: StageFolder) -> None:
        self._device, self._whole = device, next(folder.units(), None) is None
        if device.type == "cuda":
            torch.cuda.empty_cache()  # what other stages had, and torch kept
        self._base = self._now()
        with suppress(OSError):  # other systems than Linux: nothing is told then
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            else:
                _RESET.write_text("5", encoding="ascii")

    def facts(self, context: StageContext, stage: StageName) -> dict[str, Any]:
        """For the stage's last record; nothing where only a part of it was done here."""
        peak = self._peak()
        if not self._whole or not peak:
            return {}
        try:
            clip = read_clip(context)
            shape = ArrayStore.open(context.folder("encode")).specs["latents"].tail
        except DamagedUnit:  # whoever needs it will see to it; this stage is done
            return {}
        rows = largest_batches(context.settings, clip.frames, clip.cuts)[stage]
        return {
            "memory": {
                "batch": rows * shape[1] * shape[2],
                "peak": peak - self._shared(context),
                "base": self._base,
                "device": self._device.type,
                "device_bytes": self._total(),
            }
        }

    def _shared(self, context: StageContext) -> int:
        """Bytes of the process that are there because of other edits beside this one."""
        reads = context.beside.reads
        return 0 if reads is None or self._device.type == "cuda" else reads.largest

    def _now(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.memory_reserved(self._device))
        return _status("VmRSS")

    def _peak(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.max_memory_reserved(self._device))
        return _status("VmHWM")

    def _total(self) -> int:
        if self._device.type == "cuda":
            return int(torch.cuda.get_device_properties(self._device).total_memory)
        return host_bytes()


def _status(name: str) -> int:
    try:
        lines = _STATUS.read_text("ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), 0)
