"""What jobs ask of the model, made sure of before anything runs rather than after hours."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tokenflow_batch.config import Job
from tokenflow_batch.errors import ModelError, TokenflowBatchError
from tokenflow_batch.inputs import Inputs
from tokenflow_batch.ledger import StageFolder
from tokenflow_batch.models import Model
from tokenflow_batch.results import JobResult, Outcome, outcome_of, say_failed
from tokenflow_batch.stage_names import STAGES, StageName


def refused(
    inputs: Inputs, model: Callable[[], Model], jobs: Sequence[Job], stages: Sequence[StageName]
) -> dict[str, Outcome]:
    """Outcomes of jobs whose prompts are too long for the model, or whose `conv_site` it lacks.

    Args:
        inputs: of the batch.
        model: loads the model; only called if a job is to be edited still.
        jobs: of the batch.
        stages: that are to run.
    """
    if not set(stages) & set(STAGES[: STAGES.index("render")]):
        return {}
    asking = [job for job in jobs if job.video.is_file() and not _edited(inputs, job)]
    if not asking:
        return {}
    try:
        loaded = model()
    except Exception:  # which every job will meet again, and tell
        return {}
    failed = {}
    for job in asking:
        try:
            _check(loaded, job)
        except ModelError as error:
            failed[job.name] = outcome_of(JobResult(job), inputs.workspace, error)
            say_failed(job, inputs.workspace, failed[job.name])
    return failed


def _check(model: Model, job: Job) -> None:
    s = job.settings
    for prompt in (s.source_prompt, s.negative_prompt, s.prompt):
        model.check_prompt(prompt)
    model.check_conv_site(s.conv_site)


def _edited(inputs: Inputs, job: Job) -> bool:
    """Whether the job is known to be edited; videos are not read for it."""
    keys = inputs.known_keys(job)
    if keys is None:
        return False
    key = keys["edit"].key
    try:
        return StageFolder(inputs.workspace.stage("edit", key), "edit", key).finished
    except TokenflowBatchError:
        return False
