"""The test cluster itself: a trivial array runs on it, each task with a GPU of its own."""

import pytest
from slurm_cluster import slurm

pytestmark = pytest.mark.slow
__all__ = ["slurm"]

SCRIPT = """#!/bin/sh
task=$SLURM_ARRAY_TASK_ID
echo "$task $CUDA_VISIBLE_DEVICES ${SLURM_RESTART_COUNT:-0}" > "$1/$task"
"""


def test_a_trivial_array_runs(slurm, tmp_path):
    script = tmp_path / "array.sh"
    script.write_text(SCRIPT)
    slurm("sbatch", "--wait", "--array=0-3%2", "--gpus=1", "-o", "/dev/null", script, tmp_path)
    said = [(tmp_path / str(task)).read_text().split() for task in range(4)]
    assert [s[0] for s in said] == ["0", "1", "2", "3"]
    assert {s[1] for s in said} <= {"0", "1"}
    assert {s[2] for s in said} == {"0"}
    assert set(slurm.jobs().values()) == {"COMPLETED"}
