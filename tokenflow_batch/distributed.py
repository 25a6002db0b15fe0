"""Processes that share work: who they are, and the few things they agree on.

A team is what `accelerate launch`, `torchrun` or `srun` started, or one process alone. Its members
never send each other results: those go through the work folder. What they agree on (who takes which
unit, what has failed) are small entries in the launcher's key-value store, whose counters are
atomic. The store dies with the launch, so nothing stale is ever left behind.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # re-exported without saying so
    HashStore,
    PrefixStore,
    Store,
    TCPStore,
)

from tokenflow_batch.errors import LaunchError, revived, told

_POLL = (0.002, 0.1)
"""Seconds between two looks while waiting: at first, and at most."""


class Team:
    """The processes of one launch.

    Attributes:
        rank: of this process, from 0.
        size: how many there are.
        local_rank: of this process on its machine, from 0.
        epoch: entries belong to one; everybody goes on to the next together (`next_epoch`).
        waited: seconds this process has waited for others.
    """

    def __init__(
        self, store: Store | None = None, rank: int = 0, size: int = 1, local_rank: int = 0
    ) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.epoch, self.waited = 0, 0.0
        self._store = store or HashStore()

    @classmethod
    def of_launch(cls) -> Team:
        """The team that this process was launched into; alone if it wasn't.

        Raises:
            LaunchError: the launcher's variables and the processes that are there disagree.
        """
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        from accelerate import PartialState

        state = PartialState(cpu=not torch.cuda.is_available())
        if state.num_processes != size:
            raise LaunchError(
                f"the launcher announced {size} processes, {state.num_processes} found each other",
                hint="on a CPU: accelerate launch --multi_gpu --num_processes N --num_machines 1 "
                "--mixed_precision no --dynamo_backend no -m tokenflow_batch run MANIFEST",
            )
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        shared = TCPStore(address, port, is_master=False, wait_for_workers=False)
        # A launcher that restarts its workers keeps the store with all that is in it.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = PrefixStore(f"tokenflow_batch/{attempt}", shared)
        return cls(store, state.process_index, size, state.local_process_index)

    @property
    def leads(self) -> bool:
        """Whether this is the process that talks to the user."""
        return self.rank == 0

    def claim(self, name: str) -> bool:
        """Whether this process is the first of the team to claim `name`."""
        return self.size == 1 or int(self._store.add(self._key("claim", name), 1)) == 1

    def put(self, name: str, value: Any) -> None:
        """Tell the team a JSON value."""
        self._store.set(self._key("value", name), json.dumps(value))

    def get(self, name: str) -> Any | None:
        """What somebody told under `name`, or None."""
        key = self._key("value", name)
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def show(self, what: Any) -> None:
        """Tell what this process is at, a JSON value, whatever the epoch."""
        self._store.set(f"shown/{self.rank}", json.dumps(what))

    def shown(self) -> list[Any | None]:
        """What each process is at, by its own last word; None where it has said nothing."""
        keys = [f"shown/{rank}" for rank in range(self.size)]
        return [json.loads(self._store.get(k)) if self._store.check([k]) else None for k in keys]

    def agree(self, name: str, compute: Callable[[], Any]) -> Any:
        """A JSON value that the first process to ask computes, the same for all.

        Raises:
            Exception: in the process that computes it, whatever `compute` raises.
            TokenflowBatchError: in the others, what that was.
        """
        if self.size == 1:
            return compute()
        if self.claim(f"agree/{name}"):
            try:
                answer = {"value": compute()}
            except Exception as error:
                self.put(name, told(error))  # or the others would wait forever
                raise
            self.put(name, answer)
        self.wait(lambda: self.get(name) is not None)
        found: dict[str, Any] = self.get(name) or {}
        if "value" not in found:
            raise revived(found["error"], found["message"], found["hint"])
        return found["value"]

    def gather(self, name: str, value: Any) -> list[Any]:
        """What every process of the team tells under `name`, by rank; waits for all of them."""
        if self.size == 1:
            return [value]
        names = [f"{name}/{rank}" for rank in range(self.size)]
        self.put(names[self.rank], value)
        self.wait(lambda: all(self.get(each) is not None for each in names))
        return [self.get(each) for each in names]

    def count(self, name: str, by: int = 0) -> int:
        """Add to a number that begins at 0; what it is then."""
        return int(self._store.add(self._key("count", name), by))

    def wait(self, ready: Callable[[], bool], patience: float | None = None) -> bool:
        """Wait until `ready()`; False if that took more than `patience` seconds."""
        began, pause = time.monotonic(), _POLL[0]
        while not ready():
            if patience is not None and time.monotonic() - began > patience:
                break
            time.sleep(pause)
            pause = min(1.5 * pause, _POLL[1])
        else:
            self.waited += time.monotonic() - began
            return True
        self.waited += time.monotonic() - began
        return False

    def barrier(self, name: str) -> None:
        """Wait until every process of the team has come here."""
        if self.size == 1:
            return
        key = self._key("barrier", name)
        self._store.add(key, 1)
        self.wait(lambda: int(self._store.add(key, 0)) >= self.size)

    def next_epoch(self) -> None:
        """Go on to a clean slate: no claims, no values. All processes call this together."""
        self.barrier("epoch")
        self.epoch += 1

    def close(self) -> None:
        """Take leave; whoever may be hosting the store waits until the others have."""
        if self.size == 1:
            return
        key = self._key("closed", "all")
        self._store.add(key, 1)
        if self.leads:
            self.wait(lambda: int(self._store.add(key, 0)) >= self.size)
        if dist.is_initialized():
            dist.destroy_process_group()

    def _key(self, kind: str, name: str) -> str:
        return f"{self.epoch}/{kind}/{name}"
