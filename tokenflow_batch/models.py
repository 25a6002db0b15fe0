"""Loading Stable Diffusion 1.x / 2.x by diffusers, and the few calls the stages make of it.

Nothing here assumes 77 tokens, a VAE factor of 8, 512 pixels, square frames or four latent
channels. Shape suffixes: N frames, H W pixels, C latent channels, h w latent size, T prompt
tokens, E embedding width.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tokenflow_batch.clock import measured, use_marks
from tokenflow_batch.config import Runtime
from tokenflow_batch.errors import ModelError
from tokenflow_batch.model_files import ModelFiles
from tokenflow_batch.tokenflow.attention import AttentionBackend, choose_attention
from tokenflow_batch.tokenflow.compiled import compile_parts
from tokenflow_batch.tokenflow.correspondence import Backend, choose_backend
from tokenflow_batch.tokenflow.ddim import Schedule
from tokenflow_batch.tokenflow.injection import attention_sites, conv_module

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Compute:
    """A `Runtime` resolved on this machine."""

    device: torch.device
    dtype: torch.dtype
    threads: int
    attention: AttentionBackend
    matching: Backend
    channels_last: bool = True
    compile: bool = False

    def numerics(self) -> dict[str, Any]:
        """Everything about this process that decides bits, for the record beside the results."""
        packages = ["torch", "diffusers", "transformers", "numpy", "zarr", "av", "pillow"]
        packages += ["xformers"] if self.attention == "xformers" else []
        backends: dict[str, str] = {
            "attention": self.attention,
            "correspondence": self.matching,
        }
        if self.matching == "faiss":
            import faiss

            backends["faiss"] = faiss.__version__
        if self.matching == "triton":
            backends["triton"] = importlib.metadata.version("triton")
        if self.compile:
            backends["compile"] = "torch.compile, a graph for every shape"
        if not self.channels_last:
            backends["memory_format"] = "channels first"
        return {
            "device": _device_name(self.device),
            "dtype": str(self.dtype).removeprefix("torch."),
            "threads": self.threads,
            **backends,
            **{name: importlib.metadata.version(name) for name in packages},
        }


def _device_name(device: torch.device) -> str:
    """What decides bits of a device: a GPU's kind and libraries, a CPU's vector instructions."""
    if device.type != "cuda":
        return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"
    name = torch.cuda.get_device_name(device)
    return f"{name}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"


def resolve(runtime: Runtime, local_rank: int = 0) -> Compute:
    """Choose device, dtype and backends, and set this process's thread count.

    Args:
        runtime: as configured.
        local_rank: of this process on its machine; each has a GPU of its own.

    Raises:
        ModelError: the device isn't there, or a backend was asked for that can't work on it.
    """
    name = runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{local_rank % max(1, torch.cuda.device_count())}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
        dtype = _DTYPES[_dtype_name(runtime.dtype, device)]
        attention = choose_attention(runtime.attention, device.type, dtype)
        matching = choose_backend(runtime.correspondence, device.type)
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(f"runtime: {str(error).splitlines()[0]}") from None
    if runtime.compile and not _can_compile(device):
        raise ModelError(
            f"runtime: torch.compile has no compiler for {device.type} here",
            hint="install a C++ compiler (g++), on a GPU Triton; or leave `compile` off",
        )
    set_threads(runtime.threads)
    use_marks(_cuda_mark if device.type == "cuda" else None)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = False  # it picks kernels by timing: other bits each run
    torch.backends.cudnn.deterministic = True
    return Compute(
        device,
        dtype,
        runtime.threads,
        attention,
        matching,
        _channels_last(runtime, device),
        runtime.compile,
    )


def _channels_last(runtime: Runtime, device: torch.device) -> bool:
    """On a CPU a fifth faster; on an H100 a tenth slower, but for compiled parts."""
    if runtime.channels_last is not None:
        return runtime.channels_last
    return device.type == "cpu" or runtime.compile


def _dtype_name(wanted: str, device: torch.device) -> str:
    if wanted != "auto":
        return wanted
    return "fp16" if device.type == "cuda" else "fp32"


def _can_compile(device: torch.device) -> bool:
    """Whether what torch.compile makes can be built: by Triton on a GPU, else by a C++ compiler."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    return any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++")))


def _cuda_mark() -> torch.cuda.Event:
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def set_threads(threads: int) -> None:
    """Set the CPU threads of every library that computes: launchers change them silently."""
    torch.set_num_threads(threads)
    with contextlib.suppress(ImportError):  # FAISS is optional
        import faiss

        faiss.omp_set_num_threads(threads)


class Model:
    """A loaded model.

    Attributes:
        unet: the denoising UNet, in eval mode.
        prediction_type: what it predicts.
        latent_channels: C.
        vae_factor: pixels per latent in each direction.
        multiple: what working width and height must be multiples of.
    """

    def __init__(self, pipeline: Any, compute: Compute) -> None:
        self.compute = compute
        self.unet: nn.Module = _frozen(pipeline.unet, compute)
        if compute.compile:
            compile_parts(self.unet)
        self._vae = _frozen(pipeline.vae, compute)
        self._text_encoder = _frozen(pipeline.text_encoder, compute)
        self._tokenizer = pipeline.tokenizer
        self._scheduler = _ddim(pipeline.scheduler)
        self.prediction_type: str = self._scheduler.config.prediction_type
        vae, unet = pipeline.vae.config, pipeline.unet.config
        self.latent_channels: int = vae.latent_channels
        self.vae_factor = 2 ** (len(vae.block_out_channels) - 1)
        self.multiple = self.vae_factor * 2 ** (len(unet.block_out_channels) - 1)
        try:
            attention_sites(self.unet)
            conv_module(self.unet)
        except ValueError as error:
            raise ModelError(str(error)) from None
        if unet.in_channels != self.latent_channels:
            raise ModelError(
                f"the UNet takes {unet.in_channels} channels and the VAE gives "
                f"{self.latent_channels}: an inpainting or depth model can't be used here"
            )

    def timesteps(self, steps: int) -> list[int]:
        """The scheduler's timesteps for `steps` steps, noisiest first."""
        self._scheduler.set_timesteps(steps)
        return [int(t) for t in self._scheduler.timesteps]

    def frame_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of one frame's latents at a working (width, height) in pixels."""
        width, height = size
        return self.latent_channels, height // self.vae_factor, width // self.vae_factor

    def schedule(self, steps: int) -> Schedule:
        """The model's own timesteps for `steps` sampling steps.

        Raises:
            ModelError: the noise schedule can't do that.
        """
        scheduler = self._scheduler
        trained: int = scheduler.config.num_train_timesteps
        # With an offset of 1, as Stable Diffusion's, one step a timestep would end past the last.
        if steps > trained or max(timesteps := self.timesteps(steps)) >= trained:
            raise ModelError(f"{steps} steps are too many for this model's {trained} timesteps")
        alphas = [float(scheduler.alphas_cumprod[t]) for t in timesteps]
        if min(alphas) <= 0:
            raise ModelError("a noise schedule with zero terminal signal is not supported")
        return Schedule(tuple(timesteps), tuple(alphas), float(scheduler.final_alpha_cumprod))

    @measured("vae")
    @torch.no_grad()
    def encode(self, frames: NDArray[np.uint8], what: str = "encoding") -> Tensor:
        """Posterior means times the scaling factor: (N, H, W, 3) uint8 → (N, C, h, w) float32.

        Raises:
            ModelError: they are not finite; it begins with `what`.
        """
        x_NCHW = torch.from_numpy(frames).permute(0, 3, 1, 2).to(self.compute.device)
        x_NCHW = (x_NCHW.float() / 127.5 - 1).to(self.compute.dtype)
        mean: Tensor = self._vae.encode(x_NCHW).latent_dist.mean
        require_finite(mean, what)
        return (mean.float() * self._vae.config.scaling_factor).cpu()

    @measured("vae")
    @torch.no_grad()
    def decode(self, latents_NChw: Tensor, what: str = "decoding") -> NDArray[np.uint8]:
        """(N, C, h, w) → (N, H, W, 3) uint8.

        Raises:
            ModelError: the pixels are not finite; it begins with `what`.
        """
        z = latents_NChw.to(self.compute.device, torch.float32) / self._vae.config.scaling_factor
        x_NCHW: Tensor = self._vae.decode(z.to(self.compute.dtype)).sample
        require_finite(x_NCHW, what)
        scaled = (x_NCHW.float().clamp(-1, 1) + 1) * 127.5
        pixels: NDArray[np.uint8] = scaled.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return pixels

    @torch.no_grad()
    def embed(self, prompt: str) -> Tensor:
        """Text embedding (T, E) of a prompt, padded to the text encoder's length.

        Raises:
            ModelError: the prompt is longer than that.
        """
        limit = self.check_prompt(prompt)
        ids = self._tokenizer(
            prompt, padding="max_length", max_length=limit, return_tensors="pt"
        ).input_ids
        embedded: Tensor = self._text_encoder(ids.to(self.compute.device))[0]
        return embedded[0]

    def check_conv_site(self, site: str) -> None:
        """Make sure that the UNet has the residual block whose features PnP injects.

        Raises:
            ModelError: it hasn't.
        """
        try:
            conv_module(self.unet, site)
        except ValueError as error:
            raise ModelError(str(error), hint="conv_site: up_blocks.1.resnets.1 is usual") from None

    def check_prompt(self, prompt: str) -> int:
        """Make sure that a prompt fits; returns the text encoder's length T.

        Raises:
            ModelError: it doesn't.
        """
        limit: int = min(
            self._tokenizer.model_max_length, self._text_encoder.config.max_position_embeddings
        )
        length = len(self._tokenizer(prompt).input_ids)
        if length > limit:
            raise ModelError(
                f"prompt of {length} tokens, the model takes {limit} "
                f"(two of them mark start and end): {prompt!r}",
                hint="shorten the prompt: what is over the limit would be ignored",
            )
        return limit


def load(files: ModelFiles, compute: Compute) -> Model:
    """Load a model onto the device.

    Raises:
        ModelError: diffusers can't make a Stable Diffusion pipeline of the files.
    """
    _quiet_libraries()
    from diffusers import StableDiffusionPipeline

    common = {"dtype": compute.dtype, "local_files_only": True, "use_safetensors": True}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside the libraries
            if files.path.is_file():
                pipeline = StableDiffusionPipeline.from_single_file(
                    str(files.path),
                    config=str(files.base_config),
                    safety_checker=None,
                    feature_extractor=None,
                    **common,
                )
            else:
                pipeline = StableDiffusionPipeline.from_pretrained(
                    str(files.path),
                    variant=files.variant,
                    safety_checker=None,
                    feature_extractor=None,
                    image_encoder=None,
                    requires_safety_checker=False,
                    **common,
                )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # diffusers raises almost anything on files it can't read
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{files.path}: can't be loaded as Stable Diffusion: {reason}") from error
    if pipeline.unet.dtype != compute.dtype:
        raise ModelError(f"{files.path}: loaded as {pipeline.unet.dtype}, not {compute.dtype}")
    return Model(pipeline, compute)


def require_finite(x: Tensor, what: str) -> None:
    """Stop before a NaN or an overflow is stored, blended and rendered black.

    Raises:
        ModelError: some value is not finite.
    """
    if not bool(torch.isfinite(x).all()):
        raise ModelError(
            f"{what}: the model gave values that are not finite",
            hint="half precision may overflow: set runtime.dtype to bf16 or fp32",
        )


def _quiet_libraries() -> None:
    """Keep the libraries' own bars and advice (torchvision, …) off the user's terminal."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for chatter in (diffusers_logging, transformers_logging):
        chatter.set_verbosity_error()
        chatter.disable_progress_bar()


def _frozen(module: Any, compute: Compute) -> Any:
    module = module.to(compute.device).eval().requires_grad_(False)
    if not compute.channels_last:
        return module
    return module.to(memory_format=torch.channels_last)


def _ddim(scheduler: Any) -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_config(scheduler.config)
