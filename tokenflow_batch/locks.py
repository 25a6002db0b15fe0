"""Locks that keep other runs out of the stages that this one works on.

They are the operating system's, so they go when their process dies. They only save double work:
what is safe is safe by units that are committed whole.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from tokenflow_batch.distributed import Team
from tokenflow_batch.errors import LockedError
from tokenflow_batch.paths import Workspace
from tokenflow_batch.stage_names import StageName


class StageLocks:
    """The locks of one process's part in a run.

    Args:
        team: the run's processes; one of them holds a lock for all.
        workspace: where the locks lie.
    """

    def __init__(self, team: Team, workspace: Workspace) -> None:
        self._team, self._workspace = team, workspace
        self._held: dict[Path, FileLock] = {}

    @contextmanager
    def shared(self, stage: StageName, key: str, who: str) -> Iterator[None]:
        """Hold a stage for the whole team, until it is done.

        If this process leaves it by an exception, others may go on with it: then the lock is kept
        until `release`.

        Args:
            stage: which.
            key: of its folder.
            who: the job, for the message.

        Raises:
            LockedError: another run works on it.
            OSError: there can be no lock file.
        """
        path = self._workspace.lock(stage, key)
        if not self.take(stage, key):
            raise _locked(stage, who)
        try:
            yield
        except BaseException:
            if self._team.size == 1 and path in self._held:
                self._held.pop(path).release()
            raise
        if path in self._held:
            self._held.pop(path).release()

    def take(self, stage: StageName, key: str) -> bool:
        """Hold a stage for the whole team before its turn, if no other run does: until it is done
        (`shared`) or `release`.

        Raises:
            OSError: there can be no lock file.
        """
        path = self._workspace.lock(stage, key)
        return bool(self._team.agree(f"lock/{stage}/{key}", lambda: self._acquire(path)))

    @contextmanager
    def alone(self, stage: StageName, key: str, who: str) -> Iterator[None]:
        """Hold a stage while no other process of the team works on anything.

        Raises:
            LockedError: another run works on it.
            OSError: there can be no lock file.
        """
        path = self._workspace.lock(stage, key)
        if not self._acquire(path):
            raise _locked(stage, who)
        try:
            yield
        finally:
            self._held.pop(path).release()

    def release(self) -> None:
        """Let go of whatever is still held."""
        for lock in self._held.values():
            lock.release()
        self._held.clear()

    def _acquire(self, path: Path) -> bool:
        if path in self._held:
            return True
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return False
        self._held[path] = lock
        with suppress(OSError):  # for `status`; whether it holds is the operating system's word
            path.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}))
        return True


def _locked(stage: StageName, who: str) -> LockedError:
    return LockedError(
        f"{stage} of {who} is being worked on by another run",
        hint="wait for it, or run again later: nothing is lost",
    )
