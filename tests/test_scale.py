"""What looking at a batch costs: thousands of clips, and nothing heavy imported for a glance."""

import os
import resource
import subprocess
import sys

import pytest

CLIPS, EDITS = 2000, 5
BARE = """
import typer
app = typer.Typer()
@app.command()
def one(name: str = "x"): ...
@app.command()
def two(name: str = "x"): ...
app()
"""


def cost(*arguments, folder):
    """Processor seconds of a Python process, and what it printed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        cwd=folder,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": ""},
        check=True,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, done.stdout


@pytest.mark.slow
def test_status_of_ten_thousand_written_out_edits_takes_five_seconds(tmp_path):
    lines = ["version: 1", "model: demo", "clips:"]
    for clip in range(CLIPS):
        lines += [f"  - video: clip{clip}.mp4", "    edits:"]
        for edit in range(EDITS):
            lines += [f"      - name: edit{edit}", f'        prompt: "style {edit} of {clip}"']
        (tmp_path / f"clip{clip}.mp4").write_bytes(bytes(1000 + clip))
    (tmp_path / "m.yaml").write_text("\n".join(lines))
    # A process of its own also measures the peak: another child may have been larger.
    seconds, said = cost(
        "-c",
        "import resource, runpy, sys\n"
        "sys.argv = ['tokenflow_batch', 'status', 'm.yaml']\n"
        "try: runpy.run_module('tokenflow_batch', run_name='__main__')\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "assert used * 1024 < 500e6, used",
        folder=tmp_path,
    )
    assert said.count(b"\n") == CLIPS * EDITS + 1
    assert seconds < 5


@pytest.mark.slow
def test_help_costs_at_most_twice_a_bare_typer_app(tmp_path):
    (tmp_path / "bare.py").write_text(BARE)
    ours, bare = [], []
    for _ in range(3):
        bare.append(cost("bare.py", "--help", folder=tmp_path)[0])
        ours.append(cost("-m", "tokenflow_batch", "--help", folder=tmp_path)[0])
    assert min(ours) <= 2 * min(bare)
