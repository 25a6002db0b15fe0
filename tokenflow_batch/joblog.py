"""What happened to each job, for people and programs: JSON lines, and the last error.

WORK/logs/<clip>.<edit>.jsonl        one event a line: time, clip, edit, event, facts
WORK/logs/<clip>.<edit>.error.json   why the job failed last; gone once it succeeds

A dot in a clip's name is written as %2E, a percent sign as %25.
"""

from __future__ import annotations

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tokenflow_batch.config import Job
from tokenflow_batch.errors import TokenflowBatchError
from tokenflow_batch.files import write_json
from tokenflow_batch.paths import Workspace

log = logging.getLogger("tokenflow_batch")


@dataclass(frozen=True)
class JobLog:
    """One job's log. A log that can't be written never stops the work."""

    folder: Path
    clip: str
    edit: str

    @classmethod
    def of(cls, workspace: Workspace, job: Job) -> JobLog:
        """The log of a job in a work folder."""
        return cls(workspace.logs, job.clip, job.edit)

    @property
    def _stem(self) -> str:
        clip = self.clip.replace("%", "%25").replace(".", "%2E")
        name = f"{clip}.{self.edit}"  # whose first dot parts the two
        if len(name.encode()) <= 200:
            return name
        return hashlib.sha256(name.encode()).hexdigest()[:32]  # too long for a file's name

    @property
    def events(self) -> Path:
        """The file of events."""
        return self.folder / f"{self._stem}.jsonl"

    @property
    def traceback(self) -> Path:
        """The file for the traceback of what nobody foresaw."""
        return self.folder / f"{self._stem}.traceback.txt"

    @property
    def _error(self) -> Path:
        return self.folder / f"{self._stem}.error.json"

    def event(self, what: str, **facts: Any) -> None:
        """Append a line; one write, so that processes don't mix."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "clip": self.clip, "edit": self.edit, "event": what, **facts}
        with suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.events.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def warn(self, message: str) -> None:
        """Tell the user, and the log."""
        log.warning(message)
        self.event("warning", message=message)

    def failed(self, error: TokenflowBatchError) -> None:
        """The job ended with an error."""
        facts = {"message": error.message, "hint": error.hint, "code": error.exit_code}
        self.event("failed", **facts)
        with suppress(OSError):
            write_json(self._error, {"clip": self.clip, "edit": self.edit, **facts})

    def succeeded(self) -> None:
        """The job did what was asked; an error of an earlier run is over."""
        with suppress(OSError):
            self._error.unlink(missing_ok=True)

    def last_error(self) -> str | None:
        """Why the job failed last, or None."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(self._error.read_text("utf-8"))
            if (found["clip"], found["edit"]) == (self.clip, self.edit):
                return str(found["message"])
        return None
