"""Command line: parse, call, print. Heavy imports happen inside commands.

`options` has what commands share; the other modules one group of commands each.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from tokenflow_batch.cli import cluster, demo, init, look, plan, run

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Edit long videos by text with a pretrained image diffusion model (TokenFlow).",
    epilog="Exit codes: 0 done, 1 bug, 2 manifest or usage, 3 model, 4 video, 5 Slurm, "
    "6 work folder, 7 disk full, 8 memory, 9 locked, 10 launch, 20 + N: N failures, 130 stopped.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from tokenflow_batch import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)


for _group in (init, run, plan, look, cluster, demo):
    _group.register(app)


def main() -> None:
    """Entry point."""
    app()
