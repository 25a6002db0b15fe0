"""Train the demo model from nothing: tokenizer, autoencoder, latents, UNet, contact sheet.

Run the stages in this order; each finds what the earlier ones left in the work folder. `vae` and
`unet` go on from their last checkpoint when they are started again after a kill. On a machine
without a GPU two processes of one thread train faster than one of two:

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no \\
        --dynamo_backend no scripts/train_demo_model.py unet

For 128 pixels, train at 64 first and then go on with
`latents --size 128 --name latents128` and
`unet --latents latents128 --init WORK/pipeline --out pipeline128`. `average` is for pipelines
that were trained one from the other.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tokenflow_batch.demo.stills import TRAINED

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False)

Work = Annotated[Path, typer.Option(help="Folder for everything that is made.")]
Seed = Annotated[int, typer.Option(help="Seed of initial weights and draws.")]
Threads = Annotated[int, typer.Option(help="CPU threads per process.")]
WORK = Path("runs/demo_model")


def _prepare(work: Path, threads: int) -> None:
    import torch

    work.mkdir(parents=True, exist_ok=True)
    # Explicit, because launchers set it behind one's back; it decides the last bits of sums.
    torch.set_num_threads(threads)


@app.command()
def tokenizer(work: Work = WORK) -> None:
    """Train the tokenizer's merges (a second)."""
    from demo_training.tokenizer import build

    work.mkdir(parents=True, exist_ok=True)
    print(f"{len(build(work / 'tokenizer'))} tokens")


@app.command()
def vae(
    work: Work = WORK,
    seed: Seed = 0,
    threads: Threads = 1,
    size: Annotated[int, typer.Option(help="Image side in pixels.")] = 64,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 900,
    batch: Annotated[int, typer.Option(help="Images per step and process.")] = 8,
) -> None:
    """Train the autoencoder (about 5 minutes on 2 CPU cores at the defaults)."""
    _prepare(work, threads)
    from demo_training.vae import train

    train(work, seed=seed, size=size, steps=steps, batch=batch)


@app.command()
def latents(
    work: Work = WORK,
    seed: Seed = 0,
    threads: Threads = 1,
    size: Annotated[int, typer.Option(help="Image side in pixels.")] = 64,
    count: Annotated[int, typer.Option(help="Scenes to encode.")] = 24_000,
    pairs: Annotated[float, typer.Option(min=0, max=1, help="Share with two objects.")] = (
        TRAINED.pairs
    ),
    name: Annotated[str, typer.Option(help="Folder within the work folder.")] = "latents",
) -> None:
    """Render and encode the UNet's training set.

    On 2 CPU cores 3 minutes for 48,000 scenes at 64 pixels, 7 for 16,000 at 128.
    """
    _prepare(work, threads)
    from demo_training.data import LatentCache, encode_scenes

    encode_scenes(work / "vae", LatentCache(work / name, seed, count, size, pairs))


@app.command()
def unet(
    work: Work = WORK,
    seed: Seed = 0,
    threads: Threads = 1,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1500,
    batch: Annotated[int, typer.Option(help="Samples per step and process.")] = 20,
    learning_rate: Annotated[float, typer.Option(help="Peak of the schedule.")] = 1e-3,
    hold: Annotated[float, typer.Option(help="Share of steps before the rate falls.")] = 0.55,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    latents: Annotated[str, typer.Option(help="Name given to the latents stage.")] = "latents",
    init: Annotated[Path | None, typer.Option(help="Pipeline to start from.")] = None,
    out: Annotated[str, typer.Option(help="Folder within the work folder.")] = "pipeline",
) -> None:
    """Train UNet and text encoder, save the pipeline.

    On 2 CPU cores 25 minutes per 72,000 samples at 64 pixels, 35 per 20,000 at 128. The defaults
    are 60,000 samples on two processes: colours and grounds follow the prompt by then. Shapes take
    four times as many (--steps, or again with --init); then go on with 20,000 at 128 pixels.
    """
    _prepare(work, threads)
    from demo_training.data import LatentCache
    from demo_training.unet import train

    train(
        work,
        LatentCache.open(work / latents),
        work / out,
        seed=seed,
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        hold=hold,
        save_every=save_every,
        init=init,
    )


@app.command()
def average(
    pipelines: Annotated[
        list[Path], typer.Argument(help="Folders of pipelines, each trained from one before.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for their mean.")],
) -> None:
    """Save the mean of pipelines' weights (seconds)."""
    from demo_training.export import average_pipelines

    average_pipelines(pipelines, out)


@app.command()
def sheet(
    work: Work = WORK,
    seed: Seed = 0,
    threads: Threads = 2,
    pipeline: Annotated[str, typer.Option(help="Name given to the unet stage's --out.")] = (
        "pipeline"
    ),
    samples: Annotated[int, typer.Option(help="Images per prompt.")] = 4,
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = WORK / "report",
) -> None:
    """Plot the losses and sample prompts (1 minute)."""
    _prepare(work, threads)
    from demo_training.sheet import report

    report(work, work / pipeline, out, samples=samples, seed=seed)


if __name__ == "__main__":
    app()
