"""Where everything lies: one class computes every path."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tokenflow_batch.config import NAMING
from tokenflow_batch.stage_names import StageName


@dataclass(frozen=True)
class Workspace:
    """The output folder and the work folder of a batch.

    OUTPUT/<clip>/<edit>.mp4                 the edited video, or as `naming` says
    OUTPUT/<clip>/<edit>/metrics.json        and contact_sheet.png, side_by_side.mp4
    WORK/<stage>/<key>/                      a stage's result: ledger.StageFolder
    WORK/<stage>/<key>.lock                  held while a process works on it
    WORK/budget.lock                         held while a process keeps the disk budget
    WORK/digests.json                        files already digested, by path, size and mtime
    WORK/headers.json                        lengths and sizes of videos, by the same
    WORK/calibration/                        what `plan --calibrate` ran: calibrate
    WORK/logs/                               events and errors of jobs: joblog.JobLog
    SCRATCH/<stage>/<key>/                   copies of a stage's files: scratch.Copies
    """

    output: Path
    work: Path
    naming: str = NAMING
    scratch: Path | None = None

    def video(self, clip: str, edit: str) -> Path:
        """The edited video."""
        return self.output / self.naming.format(clip=clip, edit=edit)

    def details(self, clip: str, edit: str) -> Path:
        """The folder beside the edited video."""
        return self.video(clip, edit).with_suffix("")

    def stage(self, stage: StageName, key: str) -> Path:
        """A stage's folder."""
        return self.work / stage / key

    def near(self, stage: StageName, key: str) -> Path | None:
        """Where a stage's files lie in scratch; None without one."""
        return self.scratch and self.scratch / stage / key

    def lock(self, stage: StageName, key: str) -> Path:
        """The lock of a stage's folder."""
        return self.work / stage / f"{key}.lock"

    @property
    def budget_lock(self) -> Path:
        """Held while a process keeps the work folder within its disk budget."""
        return self.work / "budget.lock"

    @property
    def digests(self) -> Path:
        """The memory of file digests."""
        return self.work / "digests.json"

    @property
    def headers(self) -> Path:
        """The memory of video headers."""
        return self.work / "headers.json"

    @property
    def calibration(self) -> Path:
        """The folder of the runs of a calibration."""
        return self.work / "calibration"

    @property
    def logs(self) -> Path:
        """The folder of the jobs' logs."""
        return self.work / "logs"
