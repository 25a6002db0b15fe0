"""Where everything lies: one class computes every path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenflow_batch.config import StageName


@dataclass(frozen=True)
class Workspace:
    """The output folder and the work folder of a batch.

    OUTPUT/<clip>/<edit>.mp4                 the edited video
    OUTPUT/<clip>/<edit>/metrics.json        and contact_sheet.png, side_by_side.mp4
    WORK/<stage>/<key>/                      a stage's result: ledger.StageFolder
    WORK/<stage>/<key>.lock                  held while a process works on it
    WORK/digests.json                        files already digested, by path, size and mtime
    """

    output: Path
    work: Path

    def video(self, clip: str, edit: str) -> Path:
        """The edited video."""
        return self.output / clip / f"{edit}.mp4"

    def details(self, clip: str, edit: str) -> Path:
        """The folder beside the edited video."""
        return self.output / clip / edit

    def stage(self, stage: StageName, key: str) -> Path:
        """A stage's folder."""
        return self.work / stage / key

    def lock(self, stage: StageName, key: str) -> Path:
        """The lock of a stage's folder."""
        return self.work / stage / f"{key}.lock"

    @property
    def digests(self) -> Path:
        """The memory of file digests."""
        return self.work / "digests.json"
