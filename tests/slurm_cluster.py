"""A private Slurm on this machine: two nodes with two fake GPUs each.

Real daemons, with keys, sockets, ports and state of their own in one folder; nothing outside it is
read or changed, so several can run side by side. Needs root, as the daemons are to start jobs.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir

import pytest
from filelock import FileLock

NODES = ("n1", "n2")
ARRAY_SIZE = 4
"""Tasks that an array may have here: few, so that longer batches are cut."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
INSTALL = ("apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "-y", "--no-install-recommends")
INSTALL += ("slurm-wlm", "munge")

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
KillWait=15
MessageTimeout=100
MinJobAge=3600
MaxArraySize={array_size}
JobAcctGatherType=jobacct_gather/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} {node}
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} {node}
PartitionName=gpu Nodes=n1,n2 Default=YES PriorityTier=1 DefaultTime=60
PartitionName=cpu Nodes=n1,n2 PriorityTier=1 DefaultTime=60
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF DefaultTime=60
"""
NODE = "CPUs=2 RealMemory=4000 Gres=gpu:a100:2 Feature=a100,ib State=UNKNOWN"


def missing():
    """Why no Slurm can be had here, or None; installs Debian's packages where that is possible."""
    if os.geteuid() != 0:
        return "a private Slurm needs root"
    if shutil.which("apt-get") is None:
        absent = [name for name in PROGRAMS if shutil.which(name) is None]
        return (
            f"there is no {', '.join(absent)}, and no apt-get to install Slurm" if absent else None
        )
    # apt doesn't wait for itself: tests in several processes install one after another.
    with FileLock(Path(gettempdir()) / "tokenflow-batch-tests-apt.lock"):
        return _install()


def _install():
    if all(map(shutil.which, PROGRAMS)):
        return None
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        for command in (("apt-get", "update"), INSTALL):
            answer = subprocess.run(
                command, capture_output=True, text=True, timeout=600, check=False, env=quiet
            )
    except (subprocess.SubprocessError, OSError) as error:
        return f"Slurm can't be installed: {error}"
    absent = [name for name in PROGRAMS if shutil.which(name) is None]
    said = " ".join(answer.stderr.split()[-20:])
    return f"Slurm can't be installed, there is no {', '.join(absent)}: {said}" if absent else None


def free_ports(count):
    """Ports that nobody listens on now, all different."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in sockets]


@dataclass
class Cluster:
    """The daemons, and Slurm's commands that talk to them."""

    folder: Path
    daemons: list[subprocess.Popen] = field(default_factory=list)

    @property
    def env(self):
        """The environment in which Slurm's commands mean this cluster."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))}
        return {**clean, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self):
        """Start everything; returns when both nodes are idle."""
        self._write()
        files = {"socket": "sock", "key-file": "key", "pid-file": "pid"}
        files |= {"log-file": "log", "seed-file": "seed"}
        given = [f"--{name}={self.folder}/munge.{suffix}" for name, suffix in files.items()]
        self._daemon("munged", "--foreground", *given)
        self._until(lambda: (self.folder / "munge.sock").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self("sinfo", "-h", "-o", "%T %D", "-p", "gpu") == "idle 2", "nodes")

    def _write(self):
        for name in ("state", "dev", *(f"spool-{node}" for node in NODES)):
            (self.folder / name).mkdir()
        for number in (0, 1):
            (self.folder / "dev" / f"nvidia{number}").symlink_to("/dev/null")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        host = socket.gethostname().partition(".")[0]
        conf = SLURM_CONF.format(
            host=host, folder=self.folder, ports=free_ports(3), node=NODE, array_size=ARRAY_SIZE
        )
        (self.folder / "slurm.conf").write_text(conf)
        gpus = f"Name=gpu Type=a100 File={self.folder}/dev/nvidia[0-1] Flags=nvidia_gpu_env"
        (self.folder / "gres.conf").write_text(f"NodeName=n[1-2] {gpus}\n")

    def _daemon(self, *command):
        with (self.folder / f"{command[0]}.out").open("ab") as out:
            self.daemons.append(
                subprocess.Popen(command, stdout=out, stderr=out, env=self.env, cwd=self.folder)
            )

    def _until(self, true, what, seconds=30):
        end = time.monotonic() + seconds
        while not true():
            dead = [str(d.args) for d in self.daemons if d.poll() is not None]
            if dead or time.monotonic() > end:
                files = [*self.folder.glob("*.out"), *self.folder.glob("*.log")]
                logs = "\n".join(f"{p.name}: {p.read_text()[-2000:]}" for p in files)
                raise RuntimeError(f"Slurm does not start ({what}; ended: {dead}):\n{logs}")
            time.sleep(0.1)

    def stop(self):
        """Cancel all jobs and end the daemons that `start` started, last first."""
        self("scancel", "--partition=gpu,cpu,high", check=False)
        end = time.monotonic() + 10
        while self("squeue", "-h", "-o", "%i", check=False) and time.monotonic() < end:
            time.sleep(0.2)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def __call__(self, *command, check=True, **changes):
        """Run one of Slurm's commands; what it said, without the last newline."""
        answer = subprocess.run(
            [str(c) for c in command],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={**self.env, **changes},
        )
        if check and answer.returncode:
            raise RuntimeError(f"{command}: {answer.stderr or answer.stdout}")
        return answer.stdout.strip()

    def jobs(self):
        """Every task of every array, ended ones too: `12_3` → its state."""
        lines = self("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def details(self, job):
        """`scontrol show job` as a dict (the first of values that are given twice)."""
        words = self("scontrol", "show", "job", job, "-o").split()
        pairs = [word.partition("=")[::2] for word in words if "=" in word]
        return dict(reversed(pairs))

    def release(self, job):
        """Let a requeued job begin now instead of after Slurm's two minutes."""
        self("scontrol", "update", f"jobid={job}", "StartTime=now", check=False)


@pytest.fixture(scope="session")
def slurm():
    """A running cluster; where there can be none, the test is skipped and says why."""
    why = missing()
    if why:
        pytest.skip(why)
    # Not in pytest's folder: munged wants its socket where everybody can reach it.
    with TemporaryDirectory(prefix="slurm-") as folder:
        cluster = Cluster(Path(folder))
        try:
            cluster.start()
            yield cluster
        finally:
            cluster.stop()
