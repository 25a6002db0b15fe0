"""A batch's inputs on this disk: where the model lies, and the digests that make the keys.

Torch-free, so that `status` can tell what is done.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenflow_batch.config import Batch, Job
from tokenflow_batch.errors import ModelError, VideoError
from tokenflow_batch.files import DigestMemory
from tokenflow_batch.keys import Identity, StageKey, stage_keys
from tokenflow_batch.model_files import ModelFiles, locate
from tokenflow_batch.paths import Workspace
from tokenflow_batch.stage_names import StageName

_DENOISER = ("unet", "text_encoder", "tokenizer", "scheduler")
Keys = Mapping[StageName, StageKey]


@dataclass(frozen=True)
class Inputs:
    """What the jobs of a batch have in common on this disk.

    Attributes:
        batch: the resolved manifest.
        model: the model's files (a manifest has one model).
        workspace: where everything lies.
        memory: file digests.
    """

    batch: Batch
    model: ModelFiles
    workspace: Workspace
    memory: DigestMemory

    @classmethod
    def of(cls, batch: Batch, *, download: bool = True) -> Inputs:
        """Find the model and open the digest memory.

        Raises:
            ModelError: the model can't be found.
        """
        job = batch.jobs[0]
        workspace = Workspace(batch.output, batch.workdir, batch.naming, batch.scratch)
        try:
            model = locate(job.model, job.base_config, download=download)
        except ModelError as error:
            where = batch.where.get("model", "--model")
            raise ModelError(f"{where}: {error.message}", hint=error.hint) from None
        return cls(batch, model, workspace, DigestMemory(workspace.digests))

    @cached_property
    def _model_digests(self) -> tuple[str, str]:
        """Fingerprints of the autoencoder and of the rest."""
        return (
            self.model.fingerprint(self.memory, "vae"),
            self.model.fingerprint(self.memory, *_DENOISER),
        )

    @cached_property
    def _model_is_known(self) -> bool:
        files = (f for c in ("vae", *_DENOISER) for f in self.model.files(c))
        return all(self.memory.peek(file) is not None for file in files)

    def keys(self, job: Job) -> Keys:
        """The keys of a job's stages; reads files that are not remembered.

        Raises:
            VideoError: the video can't be read.
        """
        return self._keys(job, self.memory.digest(job.video))

    def different(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Jobs of a clip parted so that no two of a part are the same edit."""
        parts: list[dict[str, Job]] = []
        for job in jobs:
            key = job.name
            with suppress(VideoError):  # which the job will meet again, and tell
                key = self.keys(job)["edit"].key
            fitting = next((part for part in parts if key not in part), None)
            if fitting is None:
                parts.append(fitting := {})
            fitting[key] = job
        return [list(part.values()) for part in parts]

    def known_keys(self, job: Job) -> Keys | None:
        """The same without reading any large file; None if something is not remembered."""
        digest = self.memory.peek(job.video) if self._model_is_known else None
        return None if digest is None else self._keys(job, digest)

    def planned_keys(self) -> list[Keys | None]:
        """Keys of all jobs for a plan, in order; None where the video can't be read.

        A video that was never read has no digest, and reading 200 of them takes hours. Nothing of
        it can be done yet unless another file of its size was read; so only such files are read
        now, and a stand-in serves for the others.
        """
        sizes, digests = Counter[int](), dict[Path, str | None]()
        videos = dict.fromkeys(job.video for job in self.batch.jobs)
        for video in videos:
            with suppress(OSError):
                sizes[video.stat().st_size] += 1
        seen, known = dict[tuple[int, int], str](), self.memory.sizes()
        for video in videos:
            digests[video] = self._planned_digest(video, sizes, known, seen)
        if seen:
            self.memory.save()
        found = ((job, digests[job.video]) for job in self.batch.jobs)
        return [None if digest is None else self._keys(job, digest) for job, digest in found]

    def _planned_digest(
        self, video: Path, sizes: Counter[int], known: set[int], seen: dict[tuple[int, int], str]
    ) -> str | None:
        """`seen` are digests read just now, by device and inode: links are read once."""
        try:
            stat = video.stat()
            remembered = self.memory.peek(video)
            if remembered is not None:
                return remembered
            if sizes[stat.st_size] == 1 and stat.st_size not in known:
                return f"not read: {video}"
            inode = (stat.st_dev, stat.st_ino)
            if inode not in seen:
                seen[inode] = self.memory.digest(video, save=False)
            self.memory.keep(video, [stat.st_size, stat.st_mtime_ns], {"sha256": seen[inode]})
            return seen[inode]
        except (OSError, VideoError):
            return None

    def _keys(self, job: Job, video: str) -> Keys:
        vae, denoiser = self._model_digests
        return stage_keys(job, Identity(video, vae, denoiser), self.batch.runtime.dtype)
