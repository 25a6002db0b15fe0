"""A batch's inputs on this disk: where the model lies, and the digests that make the keys.

Torch-free, so that `status` can tell what is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tokenflow_batch.config import Batch, Job, StageName
from tokenflow_batch.files import DigestMemory
from tokenflow_batch.keys import Identity, StageKey, stage_keys
from tokenflow_batch.model_files import ModelFiles, locate
from tokenflow_batch.paths import Workspace

_DENOISER = ("unet", "text_encoder", "tokenizer", "scheduler")


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
        workspace = Workspace(batch.output, batch.workdir)
        model = locate(job.model, job.base_config, download=download)
        return cls(batch, model, workspace, DigestMemory(workspace.digests))

    def keys(self, job: Job) -> Mapping[StageName, StageKey]:
        """The keys of a job's stages; reads files that are not remembered.

        Raises:
            VideoError: the video can't be read.
        """
        identity = Identity(
            video=self.memory.digest(job.video),
            vae=self.model.fingerprint(self.memory, "vae"),
            denoiser=self.model.fingerprint(self.memory, *_DENOISER),
        )
        return stage_keys(job, identity, self.batch.runtime.dtype)

    def known_keys(self, job: Job) -> Mapping[StageName, StageKey] | None:
        """The same without reading any large file; None if something is not remembered."""
        files = [job.video, *(f for c in ("vae", *_DENOISER) for f in self.model.files(c))]
        if any(self.memory.peek(file) is None for file in files):
            return None
        return self.keys(job)
