"""`init`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from tokenflow_batch.cli.options import messages


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("init")(_init)


def _init(
    videos: Annotated[
        Path, typer.Argument(help="A video, a folder, or a glob in quotes.", show_default=False)
    ],
    prompt: Annotated[
        list[str], typer.Option(help="What a video shall show; repeat for more edits of each.")
    ],
    model: Annotated[
        str, typer.Option(help="Hub id, folder, single .safetensors file, or demo.")
    ] = "stable-diffusion-v1-5/stable-diffusion-v1-5",
    manifest: Annotated[Path, typer.Option(help="The file to write.")] = Path("manifest.yaml"),
) -> None:
    """Write a first manifest, with comments, to run or to change."""
    from tokenflow_batch.starter import write_starter

    with messages():
        jobs = write_starter(manifest, videos, prompt, model)
    typer.echo(f"{manifest}: {jobs} jobs; next: tokenflow-batch plan {shlex.quote(str(manifest))}")
