"""Correspondence search and extended attention against the machine's own speed.

    python benchmarks/kernels.py [--device cpu] [--threads 2] [--keyframes 16] [--json FILE]

Ceilings: the rate of a large square matrix product, and of a copy. The product of the search's own
shape, 4096 × 320 × 4096, is given too. All are measured in turn with what is compared to them, and
the best of all rounds counts.

Correspondence: one query frame against one keyframe, normalised tokens, for the token counts and
widths of the blocks of SD 1.x at 512×512 and of the demo model. Attention: the keyframes of one
window in the finest block of SD 1.x (HW 4096, 8 heads × 40), all queries against all keys, as
`KeyframePass` asks for it, in a process of its own, where the peak of memory is seen. It takes up
to a minute, in which a machine changes its pace: it is timed in parts, products in between, and
both rates are averages; what else there is (torch's own SDPA on a CPU, xformers on a GPU) in the
same parts, for comparison.

Must hold: at 4096 tokens × 320 the fastest backend reaches 60 % of the square product's rate, and
so does attention; its peak shows no copy of K or V, less than half of one. The exit code says so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import gc
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor

from tokenflow_batch.tokenflow.attention import AttentionBackend, choose_attention
from tokenflow_batch.tokenflow.correspondence import (
    Backend,
    faiss_available,
    nearest,
    normalise,
    triton_works,
)
from tokenflow_batch.tokenflow.passes import KeyframePass

SIZES: Final[tuple[tuple[int, int], ...]] = (
    (64, 96),
    (256, 96),
    (1024, 32),
    (256, 1280),
    (1024, 640),
    (4096, 320),
)
FINEST: Final = (4096, 320)
"""Tokens and width of the finest block of SD 1.x at 512×512."""
HEADS: Final = 8
BOUND: Final = 0.6
COPIES: Final = 0.5
"""Bytes above the output that attention may take, as a share of the keys'."""
PARTS: Final = 4
"""The keyframes' queries are timed in so many parts, products before and after each."""
PRODUCTS: Final = 4

Run = Callable[[], object]


@dataclass(frozen=True)
class Machine:
    """Where and in what is measured."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    threads: int = 2

    def prepare(self) -> None:
        """Make this process compute so."""
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        with contextlib.suppress(ImportError):  # FAISS is optional
            import faiss

            faiss.omp_set_num_threads(self.threads)

    @property
    def gpu(self) -> bool:
        """Whether it is one."""
        return self.device.startswith("cuda")

    def random(self, *shape: int, seed: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers."""
        generator = torch.Generator(self.device).manual_seed(seed)
        x = torch.randn(shape, generator=generator, device=self.device)
        return x.to(dtype or self.dtype)

    def seconds(self, run: Run) -> float:
        """Of one call, finished."""
        self.wait()
        began = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        """Until the device has done all that it was told to."""
        if self.gpu:
            torch.cuda.synchronize()


def best(machine: Machine, runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Fewest seconds of each over `rounds` rounds in turn, after one to warm up."""
    for run in runs.values():
        run()
    taken = [{n: machine.seconds(run) for n, run in runs.items()} for _ in range(rounds)]
    return {name: min(t[name] for t in taken) for name in runs}


def ceiling_runs(machine: Machine, side: int) -> tuple[dict[str, Run], dict[str, float]]:
    """The machine's own work, and how much of it a call is: FLOPs, or bytes read and written."""
    a, b = (machine.random(side, side, seed=s) for s in (0, 1))
    square = torch.empty_like(a)
    tokens, width = FINEST
    q, k = (machine.random(tokens, width, seed=s) for s in (2, 3))
    similar = torch.empty(tokens, tokens, dtype=machine.dtype, device=machine.device)
    source = machine.random(min(1 << 26, 4 * side**2))
    target = torch.empty_like(source)
    runs: dict[str, Run] = {
        "matmul_square": lambda: torch.mm(a, b, out=square),
        "matmul_same_shape": lambda: torch.mm(q, k.T, out=similar),
        "copy": lambda: target.copy_(source),
    }
    amounts = {
        "matmul_square": 2.0 * side**3,
        "matmul_same_shape": 2.0 * tokens**2 * width,
        "copy": 2.0 * source.numel() * source.element_size(),
    }
    return runs, amounts


def correspondence(
    machine: Machine, rounds: int, side: int = 4096, sizes: Sequence[tuple[int, int]] = SIZES
) -> dict[str, Any]:
    """Milliseconds of every backend at every size, and what share of the ceiling they are."""
    own, amounts = ceiling_runs(machine, side)
    searches: dict[tuple[int, int], dict[str, Run]] = {}
    for tokens, width in sizes:
        q, k = (machine.random(tokens, width, seed=s, dtype=torch.float32) for s in (4, 5))
        searches[tokens, width] = searching(machine, q, k)
    runs = {**own}
    for size, by_backend in searches.items():
        runs.update({f"{size}{backend}": run for backend, run in by_backend.items()})
    seconds = best(machine, runs, rounds)
    rates = {name: amounts[name] / seconds[name] / 1e9 for name in own}
    rows = []
    for (tokens, width), by_backend in searches.items():
        ms = {b: seconds[f"{(tokens, width)}{b}"] * 1e3 for b in by_backend}
        fastest = min(ms, key=ms.__getitem__)
        reached = 2 * tokens**2 * width / ms[fastest] / 1e6
        rows.append(
            {
                "tokens": tokens,
                "width": width,
                "ms": ms,
                "fastest": fastest,
                "gflops": reached,
                "share_of_square": reached / rates["matmul_square"],
                "share_of_same_shape": reached / rates["matmul_same_shape"],
            }
        )
    return {"ceilings_gflops_gbytes": rates, "sizes": rows}


def searching(machine: Machine, query: Tensor, candidates: Tensor) -> dict[str, Run]:
    """A search by every backend that works here."""
    kind = "cuda" if machine.gpu else "cpu"
    q, k = normalise(query), normalise(candidates)
    backends: list[Backend] = ["torch"]
    if faiss_available(kind):
        backends.append("faiss")
    if triton_works(kind):
        backends.append("triton")
    runs: dict[str, Run] = {b: lambda b=b: nearest(q, k, b) for b in backends}  # type: ignore[misc]
    if triton_works(kind):
        half = query.half(), candidates.half()
        runs["triton, half precision as it comes"] = lambda: nearest(*half, "triton")
    return runs


def attention(
    machine: Machine, keyframes: int, tokens: int = FINEST[0], side: int = 4096
) -> dict[str, Any]:
    """Rate and memory of one branch's extended attention; call it in a process of its own.

    Args:
        machine: where.
        keyframes: K, of `tokens` tokens each.
        tokens: HW.
        side: of the square product.
    """
    machine.prepare()
    backend = choose_attention("auto", "cuda" if machine.gpu else "cpu", machine.dtype)
    width = FINEST[1] // HEADS
    q, k, v = (  # as `split_heads` leaves them
        machine.random(keyframes, tokens, HEADS, width, seed=s).transpose(1, 2) for s in range(3)
    )
    run = extended(q, k, v, backend)
    own, amounts = ceiling_runs(machine, side)
    product = own["matmul_square"]
    product()
    extended(q[:1], k[:1], v[:1], backend)()  # libraries allocate at the first call
    memory = _memory(machine, run)
    parts, seconds, others = (
        q.split(-(-keyframes // PARTS)),
        0.0,
        dict.fromkeys(_others(machine), 0.0),
    )
    if machine.gpu:  # and look for the best kernel at the first of every shape
        for name in ("", *others):
            _part(machine, name, parts[0], k, v)
    products = [machine.seconds(product) for _ in range(PRODUCTS)]
    for part in parts:
        seconds += _part(machine, "", part, k, v)
        for name in others:
            others[name] += _part(machine, name, part, k, v)
        products += [machine.seconds(product) for _ in range(PRODUCTS)]
    ceiling = amounts["matmul_square"] * len(products) / sum(products)
    flops = 4 * (keyframes * tokens) ** 2 * FINEST[1]
    return {
        "keyframes": keyframes,
        "tokens": tokens,
        "backend": backend,
        "seconds": seconds,
        "gflops": flops / seconds / 1e9,
        "matmul_square_gflops": ceiling / 1e9,
        "share_of_square": flops / seconds / ceiling,
        "others_share_of_square": {name: flops / s / ceiling for name, s in others.items()},
        "keys_bytes": k.numel() * k.element_size(),
        **memory,
    }


def _others(machine: Machine) -> list[str]:
    """What else could attend here, for comparison."""
    if not machine.gpu:
        return ["torch's sdpa"]
    with contextlib.suppress(ValueError):
        return [choose_attention("xformers", "cuda", machine.dtype)]
    return []


def _part(machine: Machine, other: str, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Seconds of a part of the queries, by what we take or by another."""
    if other == "torch's sdpa":
        with patch("tokenflow_batch.tokenflow.attention.fits", lambda *_: False):
            return machine.seconds(extended(q, k, v, "sdpa"))
    backend: AttentionBackend = "xformers" if other == "xformers" else "sdpa"
    return machine.seconds(extended(q, k, v, backend))


def extended(q: Tensor, k: Tensor, v: Tensor, backend: AttentionBackend) -> Callable[[], Tensor]:
    """The attention of keyframes to each other, (K, H, L, D) each, as `KeyframePass` does it."""
    joint = KeyframePass(
        branches=1,
        inject_qk=False,
        inject_conv=False,
        stored_conv_KChw=None,
        attention=backend,
        guided=False,
    )
    scale = SimpleNamespace(scale=q.shape[-1] ** -0.5)
    return lambda: joint._together(scale, q, k, v)


def _memory(machine: Machine, run: Callable[[], Tensor]) -> dict[str, Any]:
    """How far one call's peak is above what was there, and above its result."""
    gc.collect()
    if not machine.gpu:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before and kept would hide as much
    reset_peak(machine)
    present = peak(machine)
    result = run()
    machine.wait()
    above = peak(machine) - present
    return {
        "peak_above_inputs_bytes": above,
        "peak_above_output_bytes": above - result.numel() * result.element_size(),
    }


def reset_peak(machine: Machine) -> None:
    """Begin to look for the peak of memory from here."""
    if machine.gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak(machine: Machine) -> int:
    """Most bytes since then: torch's on a GPU, the process's resident ones on a CPU."""
    if machine.gpu:
        return int(torch.cuda.max_memory_allocated())
    found = re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text("ascii"))
    assert found is not None
    return int(found[1]) * 1024


def judge(found: Mapping[str, Any], attended: Mapping[str, Any]) -> dict[str, bool]:
    """The bounds, by name."""
    finest = next(r for r in found["sizes"] if (r["tokens"], r["width"]) == FINEST)
    return {
        "correspondence": finest["share_of_square"] >= BOUND,
        "attention": attended["share_of_square"] >= BOUND,
        "no copy of K or V": attended["peak_above_output_bytes"] < COPIES * attended["keys_bytes"],
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--keyframes", type=int, default=16, help="of the attention")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the result here")
    args = parser.parse_args()
    machine = Machine(args.device, getattr(torch, args.dtype), args.threads)
    machine.prepare()
    found = correspondence(machine, args.rounds)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own_process:
        attended = own_process.submit(attention, machine, args.keyframes).result()
    holds = judge(found, attended)
    report = {
        "date": datetime.datetime.now(tz=datetime.UTC).date().isoformat(),
        "machine": {**asdict(machine), "dtype": args.dtype},
        "torch": torch.__version__,
        "ceiling": "matmul_square, 4096 × 4096 × 4096",
        "correspondence": found,
        "attention": attended,
        "bounds": {"share_of_square": BOUND, "copies": COPIES},
        "holds": holds,
    }
    text = json.dumps(report, indent=1)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")
    raise SystemExit(0 if all(holds.values()) else 1)


if __name__ == "__main__":
    main()
