"""Commands of a login node: `submit` and `fetch`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tokenflow_batch.cli.options import (
    DeviceOption,
    DiskBudgetOption,
    JsonOption,
    ManifestArgument,
    ModelOption,
    OutputOption,
    ThreadsOption,
    WorkdirOption,
    load_batch,
    messages,
)

if TYPE_CHECKING:
    from tokenflow_batch.slurm import Missing, Submission

Text = str | None
_SLURM = "What to ask Slurm for"


def _option(name: str, text: str, metavar: str) -> typer.models.OptionInfo:
    return typer.Option(name, help=text, metavar=metavar, rich_help_panel=_SLURM)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("submit")(_submit)
    app.command("fetch")(_fetch)


def _fetch(manifest: ManifestArgument, model: ModelOption = None) -> None:
    """Bring a manifest's model into the local cache, for machines without a network."""
    batch = load_batch(manifest, model=model)
    with messages():
        from tokenflow_batch.model_files import locate

        job = batch.jobs[0]
        found = locate(job.model, job.base_config, download="first")
    typer.echo(f"{job.model}: {found.path}")
    if found.base_config is not None:
        typer.echo(f"{job.base_config}: {found.base_config}")


def _submit(
    manifest: ManifestArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    workdir: WorkdirOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    disk_budget: DiskBudgetOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the scripts; needs no Slurm.")
    ] = False,
    partition: Annotated[Text, _option("--partition", "For the GPU stages.", "NAME")] = None,
    cpu_partition: Annotated[
        Text, _option("--cpu-partition", "For render and report, as jobs of their own.", "NAME")
    ] = None,
    cpu_account: Annotated[Text, _option("--cpu-account", "Who pays there.", "NAME")] = None,
    cpu_qos: Annotated[Text, _option("--cpu-qos", "Quality of service there.", "NAME")] = None,
    cpu_constraint: Annotated[Text, _option("--cpu-constraint", "Kind of node.", "TEXT")] = None,
    cpu_time: Annotated[Text, _option("--cpu-time", "Limit of a task there.", "TIME")] = None,
    cpu_mem: Annotated[Text, _option("--cpu-mem", "Memory of a task there.", "SIZE")] = None,
    cpu_cpus: Annotated[
        int | None,
        typer.Option(min=1, help="CPU cores of a task there.", rich_help_panel=_SLURM),
    ] = None,
    account: Annotated[Text, _option("--account", "Who pays.", "NAME")] = None,
    qos: Annotated[Text, _option("--qos", "Quality of service.", "NAME")] = None,
    constraint: Annotated[Text, _option("--constraint", "Kind of GPU node.", "TEXT")] = None,
    time: Annotated[Text, _option("--time", "Limit of a task; it goes on after.", "TIME")] = None,
    mem: Annotated[Text, _option("--mem", "Memory of a node.", "SIZE")] = None,
    cpus: Annotated[
        int | None,
        typer.Option(min=1, help="CPU cores of a task, on each node.", rich_help_panel=_SLURM),
    ] = None,
    gpus: Annotated[
        str, _option("--gpus-per-job", "GPUs on each node of a task.", "[TYPE:]N")
    ] = "1",
    multi_node: Annotated[
        int, typer.Option(min=1, help="Nodes that share a clip.", rich_help_panel=_SLURM)
    ] = 1,
    throttle: Annotated[
        int | None, typer.Option(min=1, help="So many tasks at once.", rich_help_panel=_SLURM)
    ] = None,
    grace: Annotated[
        int,
        typer.Option(
            min=10,
            max=3600,
            help="Seconds before the limit at which a task is stopped and queued again.",
            rich_help_panel=_SLURM,
        ),
    ] = 120,
    setup: Annotated[
        list[str] | None,
        _option("--setup", "Shell line before the work, such as `module load cuda`.", "LINE"),
    ] = None,
    container: Annotated[Text, _option("--container", "Image, for apptainer.", "IMAGE")] = None,
    scratch: Annotated[
        Text, _option("--scratch", "Folder on a node's own disk, such as '$TMPDIR'.", "DIR")
    ] = None,
    logs: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder for the tasks' logs (WORKDIR/slurm/logs).",
            rich_help_panel=_SLURM,
        ),
    ] = None,
    sbatch: Annotated[
        list[str] | None,
        _option("--sbatch", "Any other option of sbatch, such as `--exclude=n7`.", "OPTION"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Submit what is missing to Slurm: an array of jobs, one task a clip."""
    batch = load_batch(manifest, output, workdir, device=device, threads=threads, model=model)
    given: dict[str, Path | str | int | None] = {
        "model": model,  # a path is relative to the table
        "output": output and output.resolve(),
        "workdir": workdir and workdir.resolve(),
        "device": device,
        "threads": threads,
        "disk-budget": disk_budget,
    }
    options = [w for k, v in given.items() if v is not None for w in (f"--{k}", str(v))]
    with messages():
        from tokenflow_batch import slurm
        from tokenflow_batch.disk import parse_size
        from tokenflow_batch.sbatch import Resources

        if disk_budget is not None:
            parse_size(disk_budget)  # a mistake is told here rather than by every task
        resources = Resources(
            partition=partition,
            cpu_partition=cpu_partition,
            cpu_account=cpu_account,
            cpu_qos=cpu_qos,
            cpu_constraint=cpu_constraint,
            cpu_time=cpu_time,
            cpu_mem=cpu_mem,
            cpu_cpus=cpu_cpus,
            account=account,
            qos=qos,
            constraint=constraint,
            time=time,
            mem=mem,
            cpus=cpus,
            gpus=gpus,
            nodes=multi_node,
            throttle=throttle,
            grace=grace,
            setup=tuple(setup or ()),
            container=container,
            scratch=scratch,
            extra=tuple(sbatch or ()),
        )
        work = slurm.work_of(manifest, batch, options, logs)
        if dry_run:
            found = slurm.missing(batch, frozenset())
            _print_scripts(slurm.plan(resources, work, found))
            return
        _say(*slurm.submit(batch, resources, work), as_json)


def _print_scripts(wanted: list[Submission]) -> None:
    from tokenflow_batch.slurm import dependency

    for number, one in enumerate(wanted):
        if number:
            typer.echo("")
        typer.echo(one.text)
        waiting = dependency(one, [f"JOB{n + 1}" for n in range(number)])
        if waiting:
            typer.echo(f"# sbatch {' '.join(waiting)}, where JOB1 is the number of script 1")
        typer.echo(f"# {one.array.list}:")
        typer.echo("\n".join(f"#   {pattern}" for pattern in one.array.patterns))


def _say(found: Missing, done: list[Submission], as_json: bool) -> None:
    if as_json:
        jobs = [{"job": d.job, "part": d.array.part, "only": d.array.patterns} for d in done]
        answer = {"submitted": jobs, "queued": found.queued, "complete": found.complete}
        typer.echo(json.dumps(answer, indent=1))
        return
    names = {"all": "all stages", "gpu": "encode to edit", "cpu": "render and report"}
    for one in done:
        typer.echo(f"job {one.job}: {names[one.array.part]} of {_clips(len(one.array.patterns))}")
    if not done:
        typer.echo("nothing to submit")
    if len({(one.array.part, one.after is None) for one in done}) < len(done):
        longest = max(len(one.array.patterns) for one in done)
        typer.echo(f"in several arrays: this cluster takes at most {longest} tasks in one")
    typer.echo(f"complete: {_clips(found.complete)}; in the queue already: {len(found.queued)}")


def _clips(number: int) -> str:
    return f"{number} clip{'' if number == 1 else 's'}"
