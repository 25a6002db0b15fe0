"""Commands that only look: `status`, `gc` (which removes), `schema`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from tokenflow_batch.cli.options import (
    JsonOption,
    ManifestArgument,
    ModelOption,
    OutputOption,
    WorkdirOption,
    end,
    load_batch,
    messages,
)
from tokenflow_batch.cli.text import columns, size
from tokenflow_batch.stage_names import STAGES

if TYPE_CHECKING:
    from tokenflow_batch.status import StageStatus


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("status")(_status)
    app.command("gc")(_gc)
    app.command("schema")(_schema)


def _status(
    manifest: ManifestArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    workdir: WorkdirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which stages of which jobs are done, running, begun, waiting, damaged; and errors."""
    from tokenflow_batch.status import status

    with messages():
        batch = load_batch(manifest, output, workdir, model=model, tolerant=True)
        rows = status(batch)
    if as_json:
        jobs = [
            {
                "clip": row.clip,
                "edit": row.edit,
                "published": row.published,
                "error": row.error,
                "stages": {stage: _as_json(found) for stage, found in row.stages.items()},
            }
            for row in rows
        ]
        typer.echo(json.dumps({"jobs": jobs, "mistakes": batch.mistakes}, indent=1))
        end(batch)
    table = [["job", *STAGES, "video"]]
    for row in rows:
        cells = [_state(found) for found in row.stages.values()]
        table.append([f"{row.clip}/{row.edit}", *cells, "yes" if row.published else "no"])
    columns(table)
    for row in rows:
        for stage, found in row.stages.items():
            if found.where is not None:
                typer.echo(f"{row.clip}/{row.edit}: {stage} runs on {found.where}")
    for row in rows:
        if row.error is not None:
            typer.echo(f"{row.clip}/{row.edit} failed: {row.error}")
    end(batch)


def _state(found: StageStatus) -> str:
    if found.state not in ("begun", "running"):
        return found.state
    return f"{found.state} {found.units}{'' if found.total is None else f'/{found.total}'}"


def _as_json(found: StageStatus) -> dict[str, object]:
    return {
        "state": found.state,
        "units": found.units,
        "total": found.total,
        "where": found.where,
    }


def _gc(
    manifest: ManifestArgument,
    model: ModelOption = None,
    output: OutputOption = None,
    workdir: WorkdirOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what may go; remove nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Remove without asking.")] = False,
) -> None:
    """Remove intermediate results that no job of the manifest needs."""
    from tokenflow_batch.garbage import remove, unneeded
    from tokenflow_batch.paths import Workspace

    batch = load_batch(manifest, output, workdir, model=model)
    with messages():
        found = unneeded(batch)
        for item in found:
            typer.echo(f"{item.path}  {size(item.bytes)}")
        total = size(sum(item.bytes for item in found))
        typer.echo(f"{len(found)} folders, {total}, are needed by no job of {manifest}")
        if not found or dry_run:
            return
        if not yes:
            typer.confirm("Remove them? Other manifests may use this work folder.", abort=True)
        workspace = Workspace(batch.output, batch.workdir)
        for item in found:
            if not remove(workspace, item):
                typer.echo(f"{item.path}: another process works in it, left alone", err=True)


def _schema() -> None:
    """Print the JSON Schema of manifests, for completion in editors."""
    from tokenflow_batch.manifest_schema import manifest_schema

    typer.echo(json.dumps(manifest_schema(), indent=1))
