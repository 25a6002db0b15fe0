"""Everything that can go wrong, as one tree. Each class carries the exit code of the command line.

TokenflowBatchError           1   anything below; on its own, a bug
├── ManifestError             2   the manifest or a command-line value is wrong (file, line, fix)
├── ModelError                3   the model can't be found, loaded or used for this
├── VideoError                4   a source can't be read, has no picture, or can't be written
├── ClusterError              5   Slurm is not there, does not answer, or refuses
├── StoreError                6   the work folder can't be used as it is
│   ├── DamagedUnit           6   stored data differ from their commit record (and are recomputed)
│   ├── MissingInput          6   an earlier stage has not been run
│   └── NumericsMismatch      6   half-done work was begun under other numerics
├── DiskFullError             7   no space left where the work folder or the output is
├── OutOfMemoryError          8   the device or the host has too little memory for the settings
├── LockedError               9   another process is at work on the same stage of the same clip
└── LaunchError              10   the processes of a launch don't find each other, or differ

Of several failures the exit code says how many there are: 20 more than that (results.exit_code).
Stopped by SIGINT or SIGTERM, the command line exits with 130 or 143.

`message` says what is wrong and where, `hint` what to do about it.
"""

from __future__ import annotations

import errno


class TokenflowBatchError(Exception):
    """Base of all errors that are shown to the user as a message instead of a traceback."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  → {self.hint}"


class ManifestError(TokenflowBatchError):
    """The manifest, or a value on the command line, is wrong."""

    exit_code = 2


class ModelError(TokenflowBatchError):
    """A model is missing, unreadable, of a foreign kind, or too small for the request."""

    exit_code = 3


class VideoError(TokenflowBatchError):
    """A video can't be read, holds no picture, or can't be written."""

    exit_code = 4


class ClusterError(TokenflowBatchError):
    """Slurm is not there, does not answer in time, or refuses what is asked of it."""

    exit_code = 5


class StoreError(TokenflowBatchError):
    """The work folder can't be used as it is."""

    exit_code = 6


class DamagedUnit(StoreError):  # noqa: N818 - a state of the data, the runner's cue to recompute
    """A committed unit's files differ from what its commit record says."""

    def __init__(self, stage: str, key: str, unit: str, reason: str) -> None:
        super().__init__(
            f"{stage} {key}: unit {unit} is damaged: {reason}",
            hint="`tokenflow-batch run` computes it again; if it comes back, suspect the disk",
        )
        self.stage, self.key, self.unit, self.reason = stage, key, unit, reason


class MissingInput(StoreError):  # noqa: N818
    """A stage needs the result of an earlier one that has not been (wholly) computed."""


class NumericsMismatch(StoreError):  # noqa: N818
    """Half-done work was begun with another device, dtype, thread count or library version."""


class DiskFullError(TokenflowBatchError):
    """No space left on the device."""

    exit_code = 7


class OutOfMemoryError(TokenflowBatchError):
    """Too little memory for the settings; the hint names the setting to change."""

    exit_code = 8


class LockedError(TokenflowBatchError):
    """Another process holds the stage."""

    exit_code = 9


class LaunchError(TokenflowBatchError):
    """The launcher's processes are not what it announced."""

    exit_code = 10


def told(error: Exception) -> dict[str, str | None]:
    """An error as plain data for other processes: `error` (class), `message` and `hint`."""
    if isinstance(error, TokenflowBatchError):
        # Where the damage lies stays behind: nobody else can act on it.
        kind = "StoreError" if isinstance(error, DamagedUnit) else type(error).__name__
        return {"error": kind, "message": error.message, "hint": error.hint}
    kind = "StoreError" if isinstance(error, OSError) else "TokenflowBatchError"
    text = f"another process of this launch failed: {type(error).__name__}: {error}"
    return {"error": kind, "message": text, "hint": "its own message says more"}


def revived(kind: str, message: str, hint: str | None) -> TokenflowBatchError:
    """An error of another process, from its class's name and its texts."""
    known = globals().get(kind)
    wanted = known if isinstance(known, type) and issubclass(known, TokenflowBatchError) else None
    error = (wanted or TokenflowBatchError).__new__(wanted or TokenflowBatchError)
    TokenflowBatchError.__init__(error, message, hint=hint)
    return error


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def disk_full(error: BaseException) -> bool:
    """Whether `error`, or what caused it, is an operating-system "no space left" error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL:
            return True
        seen = seen.__cause__ or seen.__context__
    return False
