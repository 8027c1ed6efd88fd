"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd with ports, keys and
folders of their own, as any user.

    with two_nodes(folder) as slurm:
        job = slurm.submit(script, flags, "--time=5")
        slurm.call("scancel", job)
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.helpers.gloo import free_port
from tests.helpers.tools import called

PROGRAMS = "munged mungekey slurmctld slurmd sbatch srun scancel scontrol squeue"
"""Of Debian's packages slurm-wlm and munge."""

SBIN = "/usr/sbin"

NODES = ("127.0.0.1", "127.0.0.2")
"""Names of nodes must be addresses of theirs."""

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=2
GresTypes=gpu
MailProg=/bin/true
NodeName={nodes[0]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 Gres=gpu:8
NodeName={nodes[1]} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 Gres=gpu:8
PartitionName=main Nodes=ALL Default=YES
"""


def trouble():
    """Why this machine cannot do it, if it cannot."""
    path = f"{os.environ['PATH']}:{SBIN}"
    missing = [name for name in PROGRAMS.split() if not shutil.which(name, path=path)]
    if missing:
        return f"no Slurm here (apt install slurm-wlm munge): {', '.join(missing)}"
    return None


@dataclass(frozen=True)
class Slurm:
    folder: Path

    def call(self, *words):
        """What a command of Slurm prints."""
        conf = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        done = called(words, env={**os.environ, **conf}, cwd=self.folder)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, script, flags, *options):
        """The number of a job."""
        return self.call("sbatch", "--parsable", *options, script, *flags).strip()

    def state(self, job):
        """The fields that `scontrol show job` prints."""
        return dict(
            re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job))
        )

    def wait(self, job, state, limit_s=150):
        """Until the job's state begins with a word; its fields then."""
        until = time.monotonic() + limit_s
        while not (now := self.state(job))["JobState"].startswith(state):
            assert time.monotonic() < until, (now, self.log(job))
            time.sleep(0.2)
        return now

    def log(self, job):
        """What the job has printed."""
        path = Path(self.state(job)["StdOut"])
        return path.read_text() if path.exists() else ""


@contextlib.contextmanager
def two_nodes(folder):
    """Within it the daemons run; then they and all that they have started are ended."""
    ports = [free_port() for _ in range(3)]
    host = socket.gethostname()
    user = getpass.getuser()
    conf = CONF.format(host=host, user=user, folder=folder, ports=ports, nodes=NODES)
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")
    for number in range(8):
        (folder / f"gpu{number}").touch()
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    key = folder / "munge.key"
    subprocess.run([f"{SBIN}/mungekey", "--create", f"--keyfile={key}"], check=True)
    files = [
        f"--{option}={folder}/munge.{suffix}"
        for option, suffix in (
            ("socket", "socket"),
            ("key-file", "key"),
            ("pid-file", "pid"),
            ("log-file", "log"),
            ("seed-file", "seed"),
        )
    ]
    with contextlib.ExitStack() as stack:
        _start(stack, folder, "munged", "--foreground", "--force", *files)
        while not (folder / "munge.socket").exists():
            time.sleep(0.05)
        options = ["-D", "-f", str(folder / "slurm.conf")]
        _start(stack, folder, "slurmctld", *options)
        for node in NODES:
            _start(stack, folder, "slurmd", *options, "-N", node)
        slurm = Slurm(folder)
        _await_nodes(slurm)
        yield slurm
        for job in slurm.call("squeue", "--noheader", "--format=%i").split():
            slurm.call("scancel", "--signal=KILL", "--full", job)


def _await_nodes(slurm):
    until = time.monotonic() + 60
    while True:
        with contextlib.suppress(AssertionError):
            found = slurm.call("scontrol", "show", "nodes")
            if found.count("State=IDLE ") == len(NODES):
                return
        assert time.monotonic() < until, "the nodes did not come up"
        time.sleep(0.2)


def _start(stack, folder, program, *options):
    with (folder / f"{program}.out").open("a") as file:
        process = subprocess.Popen(
            [f"{SBIN}/{program}", *options],
            stdout=file,
            stderr=file,
            env={**os.environ, "SLURM_CONF": str(folder / "slurm.conf")},
        )
    stack.callback(_end, process)


def _end(process):
    """End a daemon, and the steps of jobs, which slurmd leaves alive."""
    steps = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for step in steps:
        with contextlib.suppress(psutil.NoSuchProcess):
            step.kill()
