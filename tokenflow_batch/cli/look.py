"""Commands that only look: `status`."""

from __future__ import annotations

import json

import typer

from tokenflow_batch.cli.options import (
    JsonOption,
    ManifestArgument,
    OutputOption,
    WorkdirOption,
    load_batch,
    messages,
)
from tokenflow_batch.config import STAGES


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("status")(_status)


def _status(
    manifest: ManifestArgument,
    output: OutputOption = None,
    workdir: WorkdirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show which stages of which jobs are done, begun, waiting or damaged."""
    from tokenflow_batch.status import status

    with messages():
        rows = status(load_batch(manifest, output, workdir))
    if as_json:
        jobs = [
            {
                "clip": row.clip,
                "edit": row.edit,
                "published": row.published,
                "stages": {k: {"state": v.state, "units": v.units} for k, v in row.stages.items()},
            }
            for row in rows
        ]
        typer.echo(json.dumps({"jobs": jobs}, indent=1))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("job", *STAGES, "video")
    marks = {"done": "[green]done", "damaged": "[red]damaged"}
    marks |= {state: f"[dim]{state}" for state in ("waiting", "unknown")}
    for row in rows:
        cells = [marks.get(s.state, f"[yellow]begun ({s.units})") for s in row.stages.values()]
        table.add_row(escape(f"{row.clip}/{row.edit}"), *cells, "yes" if row.published else "no")
    Console().print(table)
