"""`demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenflow_batch.cli.options import JsonOption, ThreadsOption, load_batch, messages
from tokenflow_batch.cli.run import run_or_tell
from tokenflow_batch.stage_names import STAGES


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("demo")(_demo)


def _demo(
    folder: Annotated[
        Path, typer.Argument(help="Where to put the clip, the manifest and the results.")
    ] = Path("outputs/demo"),
    frames: Annotated[int, typer.Option(min=1, help="Length of the generated clip.")] = 20,
    seed: Annotated[int, typer.Option(help="Which scene is generated.")] = 0,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Generate a clip and edit it with the small model that comes along; minutes on a CPU."""
    from tokenflow_batch.demo.job import write_demo

    with messages():
        manifest = write_demo(folder, frames=frames, seed=seed)
    run_or_tell(load_batch(manifest, threads=threads), STAGES, as_json=as_json)
