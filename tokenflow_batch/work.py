"""What a stage has cost: rows, floating-point operations, seconds. From its records, torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenflow_batch.clock import KINDS
from tokenflow_batch.ledger import StageFolder


@dataclass(frozen=True)
class Work:
    """What a stage has cost so far, in all its runs and processes.

    Attributes:
        rows: through the UNet, but for partial and retried ones; None for a stage without.
        partial_rows: that left the UNet early.
        retried_rows: of frames whose inversion did not converge at first.
        flops: floating-point operations in the UNet, partial rows among them, retried ones not.
        elapsed: seconds of the threads that did it, one a process; None where nobody counted.
        waited: of these, seconds that they stood still for reading and writing.
        decoding: and those that they stood still for frames that were being decoded.
        seconds: by kind of work, of all threads (`clock`).
    """

    rows: int | None
    partial_rows: int
    retried_rows: int
    flops: int
    elapsed: float | None
    waited: float
    decoding: float
    seconds: Mapping[str, float]

    @classmethod
    def of(cls, folder: StageFolder) -> Work:
        """Of a stage, by its units' records.

        Raises:
            DamagedUnit: a record can't be read.
        """
        told = folder.totals()
        return cls(
            rows=int(told["rows"]) if "rows" in told else None,
            partial_rows=int(told.get("partial_rows", 0)),
            retried_rows=int(told.get("retried_rows", 0)),
            flops=int(told.get("flops", 0)),
            elapsed=told.get("elapsed"),
            waited=told.get("waited", 0.0),
            decoding=told.get("decoding", 0.0),
            seconds={kind: told.get(kind, 0.0) for kind in KINDS},
        )

    @property
    def share_waited(self) -> float | None:
        """Of the stage's time, what its threads waited for the disk."""
        return self.waited / self.elapsed if self.elapsed else None

    def to_json(self, frames: int) -> dict[str, Any]:
        """With what that is per frame, of so many."""
        rows = self.rows or 0
        share = self.share_waited
        return {
            "unet_rows": rows,
            "unet_rows_per_frame": rows / frames,
            "partial_rows": self.partial_rows,
            "retried_rows": self.retried_rows,
            "gflop": self.flops / 1e9,
            "gflop_per_frame": self.flops / 1e9 / frames,
            "elapsed_seconds": self.elapsed and round(self.elapsed, 3),
            "waited_seconds": round(self.waited, 3),
            "decoding_seconds": round(self.decoding, 3),
            "waited_share": None if share is None else round(share, 4),
            "seconds": {kind: round(value, 3) for kind, value in self.seconds.items()},
        }
