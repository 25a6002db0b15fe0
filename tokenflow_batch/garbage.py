"""What may go: stage folders that no job of a manifest needs."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from tokenflow_batch.config import Batch
from tokenflow_batch.errors import StoreError, VideoError
from tokenflow_batch.files import tree_bytes
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.keys import KEY_LENGTH
from tokenflow_batch.paths import Workspace
from tokenflow_batch.stage_names import STAGES, StageName

_STAGE_FOLDER = re.compile(rf"[0-9a-f]{{{KEY_LENGTH}}}(\.removed)?")
"""Names that runs give; where work and output folder are one, clips' folders lie beside them."""


@dataclass(frozen=True)
class Unneeded:
    """A stage folder that may go.

    Attributes:
        stage: whose result it is.
        path: the folder.
        bytes: what removing it frees.
    """

    stage: StageName
    path: Path
    bytes: int


def unneeded(batch: Batch) -> list[Unneeded]:
    """Every stage folder of the work folder that no job of the batch needs.

    Videos that are not remembered are read: a guess at their digest might remove their results.

    Raises:
        ModelError: the model is not on this disk.
        StoreError: a job's folders can't be told from others because its video can't be read.
    """
    inputs = Inputs.of(batch, download=False)
    needed: set[Path] = set()
    for job in batch.jobs:
        try:
            keys = inputs.keys(job)
        except VideoError as error:
            raise StoreError(
                f"{error.message}, so which results are {job.name}'s is not known",
                hint=f"bring it back, or take the clip out of the manifest ({job.where})",
            ) from None
        needed |= {inputs.workspace.stage(stage, key.key) for stage, key in keys.items()}
    found: list[Unneeded] = []
    for stage in STAGES:
        root = inputs.workspace.work / stage
        there = sorted(root.iterdir()) if root.is_dir() else []
        found += [
            Unneeded(stage, path, tree_bytes(path))
            for path in there
            if _STAGE_FOLDER.fullmatch(path.name) and path.is_dir() and path not in needed
        ]
    return found


def remove(workspace: Workspace, item: Unneeded) -> bool:
    """Remove a folder; False where another process works in it.

    Raises:
        StoreError: it can't be removed.
    """
    key = item.path.name.removesuffix(".removed")
    lock = FileLock(workspace.lock(item.stage, key), timeout=0)
    try:
        with lock:
            aside = item.path.with_name(f"{key}.removed")
            if item.path != aside:
                if aside.exists():  # of a removal that was killed
                    shutil.rmtree(aside)
                item.path.rename(aside)  # first, so that a kill leaves no half of it
            shutil.rmtree(aside)
    except Timeout:
        return False
    except FileNotFoundError:
        return True  # others have removed it, or are just at it
    except OSError as error:
        raise StoreError(f"{item.path}: can't be removed: {error.strerror}") from None
    return True
