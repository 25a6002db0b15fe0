"""Teams whose processes are threads over one key-value store, and small things they do."""

import threading
import time

from filelock import FileLock, Timeout
from torch.distributed import HashStore

from tokenflow_batch.distributed import Team


def together(size, work, timeout=60):
    """What `work(team)` gives, or raises, in each of `size` members; none may hang."""
    store, found = HashStore(), [None] * size

    def member(rank):
        try:
            found[rank] = work(Team(store, rank, size))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=member, args=(n,), daemon=True) for n in range(size)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout
    for thread in threads:
        thread.join(max(0, deadline - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), "somebody waits forever"
    return found


def commit(folder, unit):
    path = folder.folder / unit
    path.write_text(unit)
    folder.commit(unit, [path])


def is_free(path):
    try:
        with FileLock(path, timeout=0):
            return True
    except Timeout:
        return False
