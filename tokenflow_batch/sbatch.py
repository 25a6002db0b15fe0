"""The text of the scripts that Slurm runs: a pure function of what is asked for.

Nothing here looks at the cluster, the disk or the clock; `slurm.py` does.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from string import Template
from typing import Literal

from tokenflow_batch.errors import ManifestError

Part = Literal["all", "gpu", "cpu"]
"""Which stages an array runs: all, up to `edit`, or `render` and `report`."""

_STAGES: dict[Part, tuple[str, ...]] = {
    "all": (),
    "gpu": ("--until", "edit"),
    "cpu": ("--from", "render", "--device", "cpu"),
}
_SCRATCH = re.compile(r"(?:/|\$\w|\$\{\w+\})(?:[\w./@+:=-]|\$\w|\$\{\w+\})*")
_GPUS = re.compile(r"(?:[A-Za-z][\w.-]*:)?(\d{1,3})")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class Resources:
    """What to ask Slurm for; None leaves it to the cluster's defaults.

    Attributes:
        partition, account, qos, constraint, time, mem, cpus: as sbatch takes them.
        cpu_partition: where `render` and `report` run, in an array of their own.
        cpu_account, cpu_qos, cpu_constraint, cpu_time, cpu_mem, cpu_cpus: what differs there from
            the GPU stages.
        gpus: GPUs of a job on each of its nodes, as `NUMBER` or `TYPE:NUMBER`.
        nodes: nodes of a job; more than one shares each clip among them.
        throttle: at most so many tasks at once.
        grace: seconds before the time limit at which the work is stopped and queued again.
        setup: lines of shell before the work (`module load cuda`).
        container: image that apptainer runs the work in.
        scratch: folder on a node's own disk; may name variables that the node sets (`$TMPDIR`).
        extra: further options of sbatch, for all jobs (`--exclude=n7`).
    """

    partition: str | None = None
    cpu_partition: str | None = None
    cpu_account: str | None = None
    cpu_qos: str | None = None
    cpu_constraint: str | None = None
    cpu_time: str | None = None
    cpu_mem: str | None = None
    cpu_cpus: int | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: str | None = None
    mem: str | None = None
    cpus: int | None = None
    gpus: str = "1"
    nodes: int = 1
    throttle: int | None = None
    grace: int = 120
    setup: tuple[str, ...] = ()
    container: str | None = None
    scratch: str | None = None
    extra: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.scratch is not None and not _SCRATCH.fullmatch(self.scratch):
            raise ManifestError(
                f"--scratch {self.scratch!r} is no folder that a script can name",
                hint="an absolute path or a variable of the node, such as '$TMPDIR' or "
                "'/local/$USER'; no spaces, quotes or commands",
            )
        if not _GPUS.fullmatch(self.gpus):
            raise ManifestError(
                f"--gpus-per-job {self.gpus!r} is neither a number nor a type and a number",
                hint="such as 1, 0 or a100:2",
            )
        for name, limit in (("--time", self.time), ("--cpu-time", self.cpu_time)):
            self._check_limit(name, limit)
        for option in self.extra:
            if not re.fullmatch(r"--[a-z].*", option) or not option.isprintable():
                raise ManifestError(
                    f"--sbatch {option!r} is no option of sbatch", hint="such as --exclude=n7"
                )
        there = ("account", "qos", "constraint", "time", "mem", "cpus")
        given = [f"cpu_{name}" for name in there if getattr(self, f"cpu_{name}") is not None]
        if self.cpu_partition is None and given:
            raise ManifestError(
                f"--{given[0].replace('_', '-')} is for the jobs of --cpu-partition",
                hint="name that partition too",
            )

    @property
    def on_cpus(self) -> Resources:
        """What the jobs of `cpu_partition` ask for."""
        return replace(
            self,
            partition=self.cpu_partition,
            account=self.cpu_account or self.account,
            qos=self.cpu_qos or self.qos,
            constraint=self.cpu_constraint,
            time=self.cpu_time or self.time,
            mem=self.cpu_mem or self.mem,
            cpus=self.cpu_cpus or self.cpus,
            nodes=1,
        )

    def _check_limit(self, name: str, limit: str | None) -> None:
        """A task that is stopped as soon as it starts would be queued again for ever."""
        if limit is None:
            return
        seconds = _seconds(limit)
        if seconds is None:
            raise ManifestError(
                f"{name} {limit!r} is no time", hint="such as 12:00:00 (hours first) or 1-12:00:00"
            )
        if 0 < seconds <= self.grace:  # 0 is no limit
            raise ManifestError(
                f"{name} {limit} is {seconds} seconds, and a task is stopped {self.grace} before",
                hint="12:00 are twelve minutes, 12:00:00 hours; or give a smaller --grace",
            )

    @property
    def processes(self) -> int:
        """Processes on each node: one a GPU, and one where there is none."""
        match = _GPUS.fullmatch(self.gpus)
        return max(1, int(match[1])) if match else 1


def _seconds(limit: str) -> int | None:
    """A time as sbatch takes it: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S."""
    match = _TIME.fullmatch(limit)
    if match is None:
        return None
    numbers = [int(part) for part in match.groups()[1:] if part is not None]
    if match[1] is None and len(numbers) < 3:
        numbers.insert(0, 0)  # minutes come first
    hours, minutes, seconds = [*numbers, 0, 0][:3]
    return ((int(match[1] or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


@dataclass(frozen=True)
class Work:
    """What the scripts of a manifest have in common.

    Attributes:
        name: the jobs' name in Slurm.
        manifest: absolute.
        options: `--output`, `--workdir` and the like, for `tokenflow-batch run`.
        folder: for lists of clips, and for notes of tasks.
        logs: for the tasks' logs.
        binds: folders that a container must see.
    """

    name: str
    manifest: Path
    options: tuple[str, ...]
    folder: Path
    logs: Path
    binds: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Array:
    """One array job: a task for every clip.

    Attributes:
        part: which stages.
        patterns: what `run --only` gets, one a task.
        list: the file that has them, a line each.
        comment: what the queue shows, to find the list again.
    """

    part: Part
    patterns: tuple[str, ...]
    list: Path
    comment: str


class _Script(Template):
    delimiter = "@"


_TEXT = _Script(r"""#!/bin/bash
@directives
clips=@list
task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
failures=@failures/$task
work='' stopped=''

# Sent shortly before the time limit, and when the task has to make room for another job.
stop() {
  stopped=yes
  [ -z "$work" ] || @stop
}
trap stop TERM

# Queue this task again: unless somebody cancelled it, or Slurm has queued it already.
again() {
  trap '' TERM # requeueing ends this script
  if [ "$(timeout 60 squeue --noheader --jobs="$task" --format=%T)" = RUNNING ]; then
    timeout 60 scontrol requeue "$task"
  fi
  exit 143
}

only=$(sed -n "$((SLURM_ARRAY_TASK_ID + 1))p" "$clips")
if [ -z "$only" ]; then
  echo "no line $((SLURM_ARRAY_TASK_ID + 1)) in $clips" >&2
  exit 2
fi
echo "$(date -Is) task $task on $(hostname): $only, start $((${SLURM_RESTART_COUNT:-0} + 1))"
@setup
[ -z "$stopped" ] || again

@run &
work=$!
[ -z "$stopped" ] || stop
wait "$work"
code=$?
while kill -0 "$work" 2>/dev/null; do # a signal has ended `wait`, not the work
  wait "$work"
  code=$?
done

[ "$code" -eq 0 ] && exit 0
[ -z "$stopped" ] || again
# Worth three more tries: 137 and 143, killed; 9, another process still holds the clip@why.
case $code in
  @retried)
    if echo "$code" >>"$failures" && [ "$(wc -l <"$failures")" -le 3 ]; then
      again
    fi
    ;;
esac
exit "$code"
""")

_LAUNCH = (
    "accelerate launch --multi_gpu --num_machines {nodes} --num_processes {all} "
    "--mixed_precision no --dynamo_backend no --main_process_port {port}"
)
_PORT = '"$((20000 + SLURM_JOB_ID % 20000))"'
_ADDRESS = (
    "address=${TOKENFLOW_MASTER_ADDR:-"
    '$(timeout 60 scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}'
)

# What the node does not set is an error, not a folder of another name.
_NODE_SCRATCH = """scratch=$(set -u; echo "{}") || exit 2
export scratch"""


def script(resources: Resources, work: Work, array: Array) -> str:
    """The script of one array.

    Raises:
        ManifestError: a value can't be written into a script.
    """
    launched = array.part != "cpu" and resources.nodes * resources.processes > 1
    several = launched and resources.nodes > 1
    setup = [line for given in resources.setup for line in _checked(given)] + (
        [_ADDRESS] if several else []
    )
    if resources.scratch is not None:
        setup.append(_NODE_SCRATCH.format(resources.scratch))
    return _TEXT.substitute(
        directives="\n".join(f"#SBATCH {line}" for line in _directives(resources, work, array)),
        list=shlex.quote(str(array.list)),
        failures=shlex.quote(str(work.folder / "failures")),
        stop='scancel --signal=TERM "$task"' if several else 'kill -TERM "$work" 2>/dev/null',
        setup="\n".join(setup),
        run=_command(resources, work, array, launched=launched),
        why="; 1, one of several has died" if launched else "",
        retried="1 | 9 | 137 | 143" if launched else "9 | 137 | 143",
    ).replace("\n\n\n", "\n\n")


def _checked(line: str) -> list[str]:
    """A line of the user's; what it reads is no matter of shellcheck."""
    reads = re.match(r"\s*(source|\.)\s", line)
    return ["# shellcheck disable=SC1091 # a file of the node", line] if reads else [line]


def _directives(r: Resources, work: Work, array: Array) -> list[str]:
    on_gpus = array.part != "cpu"
    r = r if on_gpus else r.on_cpus
    wanted: dict[str, str | int | None] = {
        "job-name": work.name,
        "comment": array.comment,
        "array": f"0-{len(array.patterns) - 1}" + (f"%{r.throttle}" if r.throttle else ""),
        "partition": r.partition,
        "account": r.account,
        "qos": r.qos,
        "constraint": r.constraint,
        "nodes": r.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": r.cpus,
        "mem": r.mem,
        "gpus-per-node": r.gpus
        if on_gpus and not r.gpus.endswith(":0") and r.gpus != "0"
        else None,
        "time": r.time,
        "signal": f"B:TERM@{r.grace}",
        "output": str(work.logs).replace("%", "%%") + "/%x-%A_%a.log",
    }
    given = [f"--{name}={_quoted(name, v)}" for name, v in wanted.items() if v is not None]
    return [*given, *r.extra, "--requeue", "--open-mode=append"]


def _quoted(name: str, value: str | int) -> str:
    """A value in a `#SBATCH` line, which Slurm reads, not the shell."""
    text = str(value)
    if any(c in text for c in "\"'\\\n\r"):
        raise ManifestError(
            f"{name} {text!r} can't be written into a batch script",
            hint="quotes, backslashes and line ends have no place there",
        )
    return f'"{text}"' if re.search(r"[\s#]", text) else text


def _command(r: Resources, work: Work, array: Array, *, launched: bool) -> str:
    """The shell command that does the work of a task."""
    words = ["run", str(work.manifest), *work.options, *_STAGES[array.part]]
    arguments = f'{shlex.join(words)} --only "$only"'
    inside, first = "", ""
    if r.container is not None:
        for bind in work.binds:
            if re.search(r"[,:]", str(bind)):
                raise ManifestError(
                    f"{bind}: a container can't be given this folder", hint="no comma, no colon"
                )
        binds = shlex.join(["apptainer", "exec", "--nv", "--bind", ",".join(map(str, work.binds))])
        near = "" if r.scratch is None else ' --bind "$scratch"'
        inside = f"{binds}{near} {shlex.quote(r.container)} "
        first = "" if r.scratch is None else 'mkdir -p "$scratch"; '
    if r.scratch is not None:
        arguments += ' --scratch "$scratch"'
    if not launched:
        return f"{first}{inside}tokenflow-batch {arguments}"
    launch = _LAUNCH.format(nodes=r.nodes, all=r.nodes * r.processes, port=_PORT)
    if r.nodes == 1:
        return f"{first}{inside}{launch} -m tokenflow_batch {arguments}"
    cores = "" if r.cpus is None else f" --cpus-per-task={r.cpus}"
    here = '--machine_rank "$SLURM_NODEID" --main_process_ip "$0" -m tokenflow_batch "$@"'
    return (
        "# shellcheck disable=SC2016 # each node expands it\n"
        # Since Slurm 22.05 srun doesn't take this number from the job.
        f"srun --kill-on-bad-exit=1{cores} bash -c \\\n"
        f"  {shlex.quote(f'{first}exec {inside}{launch} {here}')} \\\n"
        f'  "$address" {arguments}'
    )
