"""Finding a model's files and identifying them by content, without torch.

A model is a folder in the diffusers layout (a hub id's local snapshot is one) or a single
checkpoint file. Only safetensors are ever used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tokenflow_batch.errors import ModelError, VideoError
from tokenflow_batch.files import DigestMemory, digest_json

DEMO = Path(__file__).parent / "demo" / "model"
COMPONENTS = ("vae", "unet", "text_encoder", "tokenizer", "scheduler")
_WEIGHTS = {
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
    "text_encoder": "model",
}
_FILES = {".safetensors", ".ckpt", ".bin", ".pt", ".pth", ".yaml", ".json"}
_SMALL = ("*.json", "*.txt", "*.model")
_KINDS = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")


@dataclass(frozen=True)
class ModelFiles:
    """A model on this disk.

    Attributes:
        path: the folder, or the single file.
        base_config: for a single file, the folder with its component configs.
        variant: the weights' file variant (`fp16`), or None for the plain files.
    """

    path: Path
    base_config: Path | None = None
    variant: str | None = None

    def files(self, component: str) -> list[Path]:
        """The files that decide what `component` computes, sorted."""
        if self.path.is_file():
            assert self.base_config is not None  # noqa: S101 - locate() sees to it
            return [self.path, *_configs(self.base_config / component)]
        found = _configs(self.path / component)
        if component in _WEIGHTS:
            found += _weights(self.path / component, self.variant)
        return found

    def fingerprint(self, memory: DigestMemory, *components: str) -> str:
        """Digest of the given components' names and contents; where they lie doesn't matter."""
        try:
            parts = {
                f"{component}/{'weights' if file == self.path else file.name}": memory.digest(file)
                for component in components
                for file in self.files(component)
            }
        except VideoError as error:
            raise ModelError(error.message) from None
        return digest_json(parts)


def locate(
    model: str, base_config: str | None = None, *, download: bool | Literal["first"] = True
) -> ModelFiles:
    """Find a model: `demo`, a folder, a single `.safetensors` file, or a hub id.

    Args:
        model: as in the manifest.
        base_config: for a single file, where its component configs are.
        download: whether a hub id that is not in the local cache is downloaded; `first` asks the
            hub even if it is there, so that what a broken download lacks is fetched.

    Raises:
        ModelError: not found, not a Stable Diffusion 1.x / 2.x model, or without safetensors.
    """
    if model == "demo":
        return _folder(DEMO, model)
    path = Path(model)
    if path.is_dir():
        return _folder(path, model)
    if path.is_file():
        return _single_file(path, base_config, download=download)
    looks_like_a_file = path.suffix in _FILES or model.startswith((".", "/", "~"))
    if looks_like_a_file or model.count("/") != 1:
        raise ModelError(
            f"model {model!r}: no such folder or file, and not a hub id (owner/name)",
            hint="paths are relative to the manifest",
        )
    return _folder(_snapshot(model, download=download), model)


def _single_file(
    path: Path, base_config: str | None, *, download: bool | Literal["first"]
) -> ModelFiles:
    if path.suffix != ".safetensors":
        raise ModelError(
            f"{path}: only .safetensors files are loaded, never pickles",
            hint="convert the checkpoint once with diffusers' conversion script",
        )
    if base_config is None:
        raise ModelError(
            f"{path}: a single file holds weights alone",
            hint="set `base_config` to a folder or hub id whose component configs fit it, "
            "such as stable-diffusion-v1-5/stable-diffusion-v1-5",
        )
    if base_config == "demo":
        base = DEMO
    elif Path(base_config).is_dir():
        base = Path(base_config)
    else:
        base = _snapshot(base_config, download=download, weights=False)
    return ModelFiles(path, base)


def _folder(path: Path, model: str) -> ModelFiles:
    kind = _pipeline_class(path)
    if kind is not None and kind not in _KINDS:
        raise ModelError(f"model {model!r}: a {kind}, not Stable Diffusion 1.x / 2.x")
    missing = [c for c in COMPONENTS if not (path / c).is_dir()]
    if not (path / "model_index.json").is_file() or missing:
        what = f"no {', '.join(missing)}" if missing else "no model_index.json"
        raise ModelError(f"model {model!r}: {path} is not a diffusers pipeline folder: {what}")
    for variant in (None, "fp16"):
        if all(_weights(path / component, variant) for component in _WEIGHTS):
            return ModelFiles(path, None, variant)
    raise ModelError(
        f"model {model!r}: {path} has no complete set of safetensors weights",
        hint="pickled weights (.bin, .ckpt) are never loaded; save the pipeline with "
        "`save_pretrained(..., safe_serialization=True)`",
    )


def _pipeline_class(path: Path) -> str | None:
    try:
        raw = json.loads((path / "model_index.json").read_text("utf-8"))
        return str(raw["_class_name"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # reported as what else is missing


def _weights(folder: Path, variant: str | None) -> list[Path]:
    """The weights of one component: a file, or numbered shards."""
    stem = _WEIGHTS[folder.name]
    suffix = f".{variant}" if variant else ""
    whole = folder / f"{stem}{suffix}.safetensors"
    if whole.is_file():
        return [whole]
    return sorted(folder.glob(f"{stem}{suffix}-*-of-*.safetensors"))


def _configs(folder: Path) -> list[Path]:
    return sorted(file for pattern in _SMALL for file in folder.glob(pattern))


def _snapshot(repo: str, *, download: bool | Literal["first"], weights: bool = True) -> Path:
    """The local snapshot of a hub repository, only the files that are needed."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["model_index.json", *(f"{c}/{p}" for c in COMPONENTS for p in _SMALL)]
    if weights:
        patterns += [f"{c}/{stem}*.safetensors" for c, stem in _WEIGHTS.items()]
    ignore = ["*.non_ema*", "*.fp16.*"]
    last: Exception | None = None
    tries = {True: (True, False), False: (True,), "first": (False,)}
    for local in tries[download]:
        try:
            path = Path(
                snapshot_download(
                    repo, allow_patterns=patterns, ignore_patterns=ignore, local_files_only=local
                )
            )
            whole = not weights or any(path.glob("unet/*.safetensors"))
            if not local or ((path / "model_index.json").is_file() and whole):
                return path
        except (OSError, ValueError, HFValidationError) as error:  # network, 404, gated, not cached
            last = error
    reason = str(last).splitlines()[0] if last else "not in the local cache"
    raise ModelError(
        f"model {repo!r}: can't be had from the hub: {reason}",
        hint="check the id and the network, or give a local folder",
    )
