"""The scripts of `submit`: equal to recorded ones, accepted by shellcheck; what is submitted.

After a change on purpose: `python tests/test_submit.py` records anew; read the difference.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from jobs import clip, command, write_manifest

from tokenflow_batch import slurm
from tokenflow_batch.errors import ClusterError, ManifestError
from tokenflow_batch.manifest import load
from tokenflow_batch.sbatch import Resources, Work
from tokenflow_batch.slurm import Missing, plan, queued, work_of

RECORDED = Path(__file__).with_name("recorded")
SCRIPTS = Path(__file__).parents[1] / "scripts"
WORK = Work(
    name="tokenflow-wolves-0123456789ab",
    manifest=Path("/home/ann/wolves 2026/wolves.yaml"),
    options=("--workdir", "/scratch/ann/work"),
    folder=Path("/scratch/ann/work/slurm"),
    logs=Path("/scratch/ann/work/slurm/logs"),
    binds=(Path("/home/ann/wolves 2026"), Path("/scratch/ann/work")),
)
MISSING = Missing(gpu=("wolf/*", "fox [[]1]/*"), cpu=("bear/*",), queued=(), complete=7)
FULL = Resources(
    partition="gpu",
    cpu_partition="cpu",
    account="film lab",
    qos="long",
    constraint="a100&ib",
    time="12:00:00",
    mem="3G",
    cpus=2,
    cpu_account="film",
    cpu_qos="short",
    cpu_constraint="ib",
    cpu_time="90:00",
    cpu_mem="2G",
    cpu_cpus=1,
    gpus="a100:1",
    throttle=4,
    grace=300,
    extra=("--nice=50", "--exclude=n1"),
    setup=("module load cuda/12.4", "source /home/ann/env/bin/activate"),
)
CASES = {
    "plain": Resources(),
    "full": FULL,
    "gpus": Resources(gpus="2", container="/images/tokenflow.sif"),
    "nodes": Resources(gpus="a100:2", nodes=2, time="1-0", cpus=2),
    "scratch": Resources(scratch="$TMPDIR/tokenflow", cpu_partition="cpu"),
    "near": Resources(
        gpus="2", nodes=2, container="/images/token flow.sif", scratch="/local/$USER"
    ),
}


def recorded():
    return {
        f"{name}-{number}-{one.array.part}.sbatch": one.text
        for name, resources in CASES.items()
        for number, one in enumerate(plan(resources, WORK, MISSING))
    }


def test_scripts_are_the_recorded_ones():
    found = {path.name: path.read_text() for path in RECORDED.glob("*.sbatch")}
    assert recorded() == found


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", sorted(recorded()))
def test_shellcheck_has_nothing_to_say(name):
    answer = subprocess.run(
        ["shellcheck", RECORDED / name],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, answer.stdout) == (0, "")


def test_stages_of_other_resources_are_arrays_of_their_own():
    parts = [(s.array.part, s.array.patterns, s.after) for s in plan(FULL, WORK, MISSING)]
    assert parts == [
        ("gpu", MISSING.gpu, None),
        ("cpu", MISSING.gpu, 0),
        ("cpu", MISSING.cpu, None),
    ]
    done = replace(MISSING, gpu=(), cpu=())
    assert plan(FULL, WORK, done) == plan(Resources(), WORK, done) == []
    (one,) = plan(FULL, WORK, replace(MISSING, gpu=()))
    assert (one.array.patterns, one.after) == (MISSING.cpu, None)


PROGRAMS = [
    *sorted(path for path in SCRIPTS.iterdir() if path.is_file() and path.suffix != ".py"),
    SCRIPTS.parent / ".ci" / "run",
]


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say_of_our_own_scripts(path):
    answer = subprocess.run(
        ["shellcheck", "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR", path],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, answer.stdout) == (0, "")


def several_gpus(*arguments, path=None, **more):
    here = str(Path(sys.executable).parent)
    return subprocess.run(
        [shutil.which("bash"), SCRIPTS / "multi_gpu.sh", *map(str, arguments)],
        env={"PATH": f"{here}:{os.environ['PATH']}" if path is None else str(path), **more},
        capture_output=True,
        text=True,
        check=False,
    )


def test_mistakes_with_several_gpus_are_told(tmp_path):
    answer = several_gpus()
    assert (answer.returncode, "usage: " in answer.stderr) == (2, True)
    (tmp_path / "tr").symlink_to(shutil.which("tr"))  # and no nvidia-smi
    answer = several_gpus("m.yaml", path=tmp_path)
    assert (answer.returncode, "no GPUs found: name them" in answer.stderr) == (2, True)
    answer = several_gpus(tmp_path / "no.yaml", GPUS="0 1")
    assert answer.returncode == 2
    assert "no.yaml" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [
        ("45", 2700),
        ("12:00", 720),
        ("12:00:05", 43205),
        ("1-0", 86400),
        ("1-2:30", 95400),
        ("2-03:04:05", 183845),
    ],
)
def test_a_limit_is_read_as_sbatch_reads_it(limit, seconds):
    Resources(time=limit, grace=seconds - 1)
    with pytest.raises(ManifestError, match=f"is {seconds} seconds"):
        Resources(time=limit, grace=seconds)


@pytest.mark.parametrize("limit", ["", "noon", "1:2:3:4", "-5", "1h", "1-"])
def test_a_limit_that_is_none_is_told(limit):
    with pytest.raises(ManifestError, match="--cpu-time"):
        Resources(cpu_partition="cpu", cpu_time=limit)


def test_what_is_for_the_cpu_partition_needs_one():
    with pytest.raises(ManifestError, match="--cpu-mem is for the jobs of --cpu-partition"):
        Resources(cpu_mem="2G")


@pytest.mark.parametrize("option", ["", "exclude=n1", "-x n1", "--exclude=n1\n#SBATCH --uid=0"])
def test_an_option_that_is_none_is_told(option):
    with pytest.raises(ManifestError, match="--sbatch"):
        Resources(extra=(option,))


@pytest.mark.parametrize("gpus", ["", "a100", "-1", "a100:", "1,2", "1 2", "x y:1"])
def test_a_wrong_number_of_gpus_is_told(gpus):
    with pytest.raises(ManifestError, match="gpus-per-job"):
        Resources(gpus=gpus)


@pytest.mark.parametrize(
    "scratch", ["", "here", "$(reboot)", "/a b", '/a"', "/`id`", "/a;id", "/a\nb", "$", "/${x:-/}"]
)
def test_a_scratch_that_is_no_folder_is_told(scratch):
    with pytest.raises(ManifestError, match="--scratch"):
        Resources(scratch=scratch)


@pytest.mark.parametrize(
    ("scratch", "code", "folder"),
    [("$NEAR/x", 0, "/local/job 1/x"), ("${NEAR}_2", 0, "/local/job 1_2"), ("$NOWHERE/x", 2, "")],
)
def test_scratch_is_where_the_node_says(scratch, code, folder):
    (one,) = plan(Resources(scratch=scratch), WORK, replace(MISSING, cpu=()))
    text = one.text[one.text.index("scratch=$(") : one.text.index("export scratch")]
    answer = subprocess.run(
        ["bash", "-c", f'{text}echo "$scratch"'],
        env={"NEAR": "/local/job 1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (answer.returncode, answer.stdout.strip()) == (code, folder)
    assert ("NOWHERE: unbound variable" in answer.stderr) == bool(code)


MANY = Missing(tuple(f"clip {n}/*" for n in range(2500)), ("bear/*",), (), 0)


def sizes(wanted):
    return [(s.array.part, len(s.array.patterns), s.after, s.behind) for s in wanted]


def test_more_clips_than_an_array_may_have_become_several():
    wanted = plan(Resources(), WORK, MANY)
    assert sizes(wanted) == [("all", 1001, None, None)] * 2 + [("all", 499, None, None)]
    assert sum((s.array.patterns for s in wanted), ()) == MANY.gpu + MANY.cpu
    assert len({s.array.list for s in wanted}) == 3
    assert [s.text.partition("--array=")[2].split()[0] for s in wanted] == [
        "0-1000", "0-1000", "0-498"
    ]  # fmt: skip


def test_arrays_of_other_resources_are_cut_alike_and_the_throttle_holds_over_all():
    free = plan(Resources(cpu_partition="cpu"), WORK, MANY, 1250)
    assert sizes(free) == [
        ("gpu", 1250, None, None),
        ("cpu", 1250, 0, None),
        ("gpu", 1250, None, None),
        ("cpu", 1250, 2, None),
        ("cpu", 1, None, None),
    ]
    wanted = plan(Resources(cpu_partition="cpu", throttle=8), WORK, MANY, 1250)
    assert [(s.after, s.behind) for s in wanted] == [
        (None, None), (0, None), (None, 0), (2, 1), (None, None)
    ]  # fmt: skip
    assert all("%8" in s.text for s in wanted)
    assert free[0].array.patterns == free[1].array.patterns
    numbers = ["11", "12", "13", "14"]
    assert slurm.dependency(wanted[3], numbers) == (
        "--dependency=aftercorr:13,afterany:12",
        "--kill-on-invalid-dep=yes",
    )
    assert slurm.dependency(wanted[2], numbers)[0] == "--dependency=afterany:11"
    assert slurm.dependency(free[2], numbers) == ()


def test_what_a_script_cannot_hold_is_told():
    with pytest.raises(ManifestError, match="account"):
        plan(Resources(account='a"\n#SBATCH --uid=0'), WORK, MISSING)


CLIPS = [
    {"video": f"{name}.mp4", "edits": [{"name": e, "prompt": e} for e in ("blue", "red")]}
    for name in ("one", "two [2]", "three")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("submit")
    for entry in CLIPS:
        clip(folder / entry["video"], 2)
    return folder


@pytest.fixture(scope="module")
def manifest(folder, tiny_model):
    """One clip whole, one edited but not rendered, one not begun."""
    clips = [{**c, "video": c["video"].replace("[", "[[]")} for c in CLIPS]
    path = write_manifest(folder, tiny_model, clips=clips, steps=1)
    for options in (["--only", "one"], ["--only", "two*", "--until", "edit"]):
        answer = command("run", path, *options)
        assert answer.exit_code == 0, answer.output
    return path


def test_only_what_is_missing_is_submitted(manifest):
    batch = load(manifest)
    found = slurm.missing(batch, frozenset())
    assert found == Missing(("three/*",), ("two [[]2]/*",), (), 1)
    found = slurm.missing(batch, frozenset({"three/*", "one/*"}))
    assert found == Missing((), ("two [[]2]/*",), ("three/*",), 1)
    # What the pattern means to `run --only` is that clip.
    assert {j.clip for j in batch.only(("two [[]2]/*",)).jobs} == {"two [2]"}


def test_an_edit_that_was_not_published_is_missing(manifest):
    video = manifest.parent / "out" / "one" / "red.mp4"
    aside = video.rename(video.with_suffix(".aside"))
    try:
        assert slurm.missing(load(manifest), frozenset()).cpu == ("one/*", "two [[]2]/*")
    finally:
        aside.rename(video)


def test_dry_run_prints_the_scripts_and_writes_nothing(manifest, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))  # no Slurm there
    work = manifest.parent / "out" / ".work"
    answer = command("submit", manifest, "--dry-run", "--cpu-partition", "cpu", "--time", "1:00:00")
    assert answer.exit_code == 0, answer.output
    batch = load(manifest)
    wanted = plan(
        Resources(cpu_partition="cpu", time="1:00:00"),
        work_of(manifest, batch, ()),
        slurm.missing(batch, frozenset()),
    )
    assert len(wanted) == 3
    assert all(one.text in answer.stdout for one in wanted)
    assert answer.stdout.startswith("#!/bin/bash\n")
    assert "--dependency=aftercorr:JOB1 " in answer.stdout
    assert not (work / "slurm").exists()


def test_options_of_run_come_along(manifest, tmp_path):
    table = manifest.with_name("table.csv")
    table.write_text("video,prompt\none.mp4,blue\n")
    model = load(manifest).jobs[0].model
    given = ["--model", model, "--disk-budget", "20GB", "--logs", tmp_path / "a%b", "--sbatch"]
    answer = command("submit", table, "--dry-run", *given, "--exclude=n7")
    assert answer.exit_code == 0, answer.output
    assert f"table.csv --model {model} --disk-budget 20GB --only" in answer.stdout
    assert f"#SBATCH --output={tmp_path}/a%%b/%x-%A_%a.log\n" in answer.stdout
    assert "#SBATCH --exclude=n7\n" in answer.stdout
    answer = command("submit", manifest, "--dry-run", "--disk-budget", "much")
    assert answer.exit_code == 2


def test_tasks_find_this_installation(monkeypatch, tmp_path):
    here = Path(sys.executable).parent
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert slurm._path() == f"{here}:/usr/bin:/bin"
    monkeypatch.setenv("PATH", f"{tmp_path}:{here}")
    assert slurm._path() == f"{tmp_path}:{here}"
    other = tmp_path / "tokenflow-batch"
    other.write_text("#!/bin/sh\n")
    other.chmod(0o755)
    assert slurm._path() == f"{here}:{tmp_path}:{here}"


def test_without_slurm_submit_says_so(manifest, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    answer = command("submit", manifest)
    assert answer.exit_code == 5
    assert "there is no `squeue` here" in answer.output
    assert "Traceback" not in answer.output


def test_a_work_folder_that_is_none_is_told(manifest):
    answer = command("submit", manifest, "--workdir", manifest / "inside")
    assert answer.exit_code == 6
    assert "Not a directory" in answer.output
    assert "Traceback" not in answer.output


def test_a_silent_or_refusing_slurm_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(slurm, "PATIENCE", 0.5)
    program = tmp_path / "squeue"
    program.write_text("#!/bin/sh\nexec sleep 20\n")
    program.chmod(0o755)
    with pytest.raises(ClusterError, match="no answer within"):
        queued(WORK)
    monkeypatch.setattr(slurm, "PATIENCE", 20)
    program.write_text("#!/bin/sh\necho 'squeue: error: Unable to contact' >&2\nexit 1\n")
    with pytest.raises(ClusterError, match="refused: Unable to contact"):
        queued(WORK)


def test_a_container_sees_all_that_a_task_reads_and_writes(manifest, tiny_model, tmp_path):
    batch = load(manifest, output=tmp_path / "out", workdir=tmp_path / "work")
    binds = work_of(manifest, batch, ()).binds
    assert set(binds) == {manifest.parent, tiny_model, tmp_path / "out", tmp_path / "work"}
    odd = replace(WORK, binds=(Path("/data/a:b"),))
    with pytest.raises(ManifestError, match="/data/a:b: a container can't"):
        plan(Resources(container="x.sif"), odd, MISSING)


def test_a_container_sees_the_hubs_cache(manifest, tiny_model, tmp_path):
    """Snapshots there are links to files beside them."""
    cache = tmp_path / "models--owner--tiny"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "a1"
    shutil.copytree(tiny_model, blobs)
    shutil.copytree(
        tiny_model,
        snapshot,
        copy_function=lambda source, to: Path(to).symlink_to(
            blobs / Path(source).relative_to(tiny_model)
        ),
    )
    batch = load(manifest)
    jobs = tuple(replace(job, model=str(snapshot)) for job in batch.jobs)
    assert tmp_path in work_of(manifest, replace(batch, jobs=jobs), ()).binds


def test_two_manifests_or_work_folders_do_not_share_a_name(manifest, tmp_path):
    batch = load(manifest)
    names = {
        work_of(manifest, batch, ()).name,
        work_of(manifest.with_name("other.yaml"), batch, ()).name,
        work_of(manifest, replace(batch, workdir=tmp_path), ()).name,
    }
    assert len(names) == 3
    assert work_of(manifest, batch, ("--threads", "1")).name in names


if __name__ == "__main__":
    RECORDED.mkdir(exist_ok=True)
    for old in RECORDED.glob("*.sbatch"):
        old.unlink()
    for name, text in recorded().items():
        (RECORDED / name).write_text(text)
