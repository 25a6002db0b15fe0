"""The benchmarks of kernels and of one GPU run, at a small size on a CPU, and judge rightly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import gpu
import kernels


def test_bounds_are_judged_at_the_finest_block():
    rows = [{"tokens": 64, "width": 96, "share_of_square": 0.1}]
    rows += [{"tokens": 4096, "width": 320, "share_of_square": 0.6}]
    attended = {"share_of_square": 0.59, "peak_above_output_bytes": 49, "keys_bytes": 100}
    found = kernels.judge({"sizes": rows}, attended)
    assert found == {"correspondence": True, "attention": False, "no copy of K or V": True}


def test_extended_attention_is_that_of_all_keyframes_tokens_together():
    machine = kernels.Machine(threads=torch.get_num_threads())
    q, k, v = (machine.random(3, 2, 5, 8, seed=s) for s in range(3))
    got = kernels.extended(q, k, v, "sdpa")()
    together = [x.transpose(0, 1).flatten(1, 2) for x in (q, k, v)]
    expected = torch.softmax(together[0] @ together[1].mT / 8**0.5, -1) @ together[2]
    torch.testing.assert_close(got, expected.unflatten(1, (3, 5)).permute(1, 2, 0, 3).flatten(2))


def test_rates_and_shares_are_of_one_run():
    machine = kernels.Machine(threads=torch.get_num_threads())
    found = kernels.correspondence(machine, 1, 64, ((64, 8),))
    (row,) = found["sizes"]
    assert set(row["ms"]) >= {"torch"}
    assert row["gflops"] == pytest.approx(2 * 64 * 64 * 8 / min(row["ms"].values()) / 1e6)
    square = found["ceilings_gflops_gbytes"]["matmul_square"]
    assert row["share_of_square"] == pytest.approx(row["gflops"] / square)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_gpu_benchmark_runs_small_on_a_cpu(tmp_path):
    gpu.main(["--small", "--threads", "1", "--frames", "8", "--json", str(tmp_path / "gpu.json")])
    report = json.loads((tmp_path / "gpu.json").read_text("utf-8"))
    runs = {run["mode"]: run for run in report["clips"]["runs"]}
    # 25 steps: target and negative, and a keyframe of eight frames, the source for twelve steps;
    # frames keep their own attention in the last four.
    assert runs["default"]["edit_rows"] == 25 * (2 + 2 / 8) + 12 / 8 + 4 * (1 + 1 / 8)
    assert runs["official"]["edit_rows"] == 50 * 3 * (1 + 1 / 8)
    assert runs["official"]["seconds_per_frame"] > runs["default"]["seconds_per_frame"]
    assert set(report["half_against_float32"]["flipped_correspondences"]) == {"64", "16", "4", "1"}


@pytest.mark.slow
def test_the_benchmark_of_the_whole_product_runs_small_on_a_cpu(tmp_path):
    script = Path(kernels.__file__).with_name("full_size.py")
    done = subprocess.run(
        [sys.executable, script, "--small", "--json", tmp_path / "found.json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(found["holds"].values())
    assert found["cut"]["kills_at_work"] == 2
