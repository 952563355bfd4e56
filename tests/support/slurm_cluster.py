"""A SLURM cluster of its own on this machine: munged, slurmctld and a few slurmd on the loopback, stopped at the end.

    python -m tests.support.slurm_cluster -- snakemake --workflow-profile profiles/slurm --slurm-status-command squeue

It needs Debian's slurm-wlm and munge (apt-get install --no-install-recommends slurm-wlm munge) and nothing else: no
systemd, no cgroups, no accounting database, no rights beyond those of the user who calls it. Several fit on a machine.
"""

from __future__ import annotations

import argparse
import contextlib
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

PROGRAMS = ("setpriv", "munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol")
DAEMONS = "/usr/sbin"  # not on every user's PATH
SECONDS = 30  # until every node is idle

CONFIG = """\
ClusterName=layerwise
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdPidFile={folder}/%n.pid
SlurmdLogFile={folder}/%n.log
SlurmdSpoolDir={folder}/%n
# A container has no cgroups of its own, and sacct no database: squeue keeps an ended job for MinJobAge seconds.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
MinJobAge=300
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SchedulerParameters=batch_sched_delay=0,sched_min_interval=200000
# A node may have more processors than the machine, and one that dies is noticed, and its jobs queued again, at once.
SlurmdParameters=config_overrides
SlurmdTimeout=5
KillWait=2
ReturnToService=2
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> list[str]:
    """The programs of SLURM that are not installed."""
    return [name for name in PROGRAMS if program(name) is None]


def program(name: str) -> str | None:
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), DAEMONS]))


def free_ports(count: int) -> list[int]:
    """Ports of the loopback that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Cluster:
    """As a context: a running cluster; `environment` makes SLURM's commands speak to it.

    nodes: virtual ones, with as many processors and megabytes each as given, whatever the machine has.
    Raises RuntimeError with the daemons' logs when the nodes are not idle within SECONDS.
    """

    def __init__(self, nodes: int = 2, processors: int = 4, megabytes: int = 32_000) -> None:
        self.nodes, self.processors, self.megabytes = [f"n{i}" for i in range(1, nodes + 1)], processors, megabytes
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.folder = Path()

    @property
    def environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(self.folder / "bin"), os.environ.get("PATH", os.defpath)])
        return {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": path}

    def __enter__(self) -> Cluster:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path is short
        self.folder.chmod(0o755)
        self.before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by which the context ends too
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the jobs, then the daemons, and forget all of it."""
        if "slurmctld" in self.daemons:
            with contextlib.suppress(subprocess.SubprocessError):
                self.ask("scancel", "--user", getpass.getuser(), timeout=10)
                self.wait(lambda: not self.ask("squeue", "--noheader", "--states=R,CG"), 10)
        for name in reversed(list(self.daemons)):
            self.stop(name)
        shutil.rmtree(self.folder, ignore_errors=True)
        signal.signal(signal.SIGTERM, self.before)

    def start(self) -> None:
        (self.folder / "state").mkdir()
        for node in self.nodes:
            (self.folder / node).mkdir()
        port, *ports = free_ports(1 + len(self.nodes))
        size = f"CPUs={self.processors} RealMemory={self.megabytes} State=UNKNOWN"
        nodes = [
            f"NodeName={node} NodeHostname={socket.gethostname().split('.')[0]} NodeAddr=127.0.0.1 Port={own} {size}"
            for node, own in zip(self.nodes, ports, strict=True)
        ]
        config = CONFIG.format(
            host=socket.gethostname().split(".")[0],
            port=port,
            user=getpass.getuser(),
            folder=self.folder,
            nodes="\n".join(nodes),
        )
        (self.folder / "slurm.conf").write_text(config, "utf-8")
        # The plugin's job steps drop SLURM_*, the place of the configuration included.
        srun = self.folder / "bin" / "srun"
        srun.parent.mkdir()
        srun.write_text(f'#!/bin/sh\nSLURM_CONF={self.folder}/slurm.conf exec {program("srun")} "$@"\n', "utf-8")
        srun.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        own = {name: str(self.folder / f"munge.{name}") for name in ("socket", "log", "pid", "seed")}
        files = [f"--{name}-file={own[name]}" for name in ("log", "pid", "seed")]
        # --force: it would rather have its folder where nobody else may write, and /tmp is none
        self.run("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={own['socket']}", *files)
        self.wait(lambda: Path(own["socket"]).exists(), SECONDS)
        self.run("slurmctld", "-D", "-i")
        for node in self.nodes:
            self.start_node(node)
        self.wait(lambda: self.ask("sinfo", "--noheader", "--format=%T").split() == ["idle"], SECONDS)

    def start_node(self, node: str) -> None:
        self.run("slurmd", "-D", "-N", node, name=node)

    def run(self, command: str, *arguments: str, name: str | None = None) -> None:
        name, path = name or command, program(command)
        if path is None:
            raise RuntimeError(f"{command} is not installed (Debian: apt-get install slurm-wlm munge).")
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                ["setpriv", "--pdeathsig", "TERM", path, *arguments],  # whatever ends this process ends them
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,  # a Ctrl-C is for the one who called
            )

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """End a daemon."""
        daemon = self.daemons.pop(name)
        daemon.send_signal(how)
        try:
            daemon.wait(10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def kill_node(self, node: str) -> None:
        """As by a cut of its power: its slurmd and all that it runs are gone, and SLURM knows, as it would in time."""
        self.stop(node, signal.SIGKILL)
        # Before its jobs: what is left of it would still report that they have failed.
        self.ask("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=killed")
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                variables = (process / "environ").read_bytes().split(b"\0")
                if {f"SLURM_CONF={self.folder}/slurm.conf".encode(), f"SLURMD_NODENAME={node}".encode()} <= {
                    *variables
                }:
                    os.kill(int(process.name), signal.SIGKILL)
        for job in self.ask("squeue", "--noheader", "--states=PD", "--format=%i").split():
            self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # else two minutes after the node's end

    def ask(self, *command: str, timeout: float = 30) -> str:
        """Output of one of SLURM's commands; empty where it fails."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=timeout
        )
        return done.stdout if done.returncode == 0 else ""

    def wait(self, ready, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                raise RuntimeError(f"SLURM was not ready within {seconds} seconds:\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        files = sorted([*self.folder.glob("*.log"), *self.folder.glob("*.out")])
        return "\n".join(f"--- {file.name}\n{file.read_text('utf-8', 'replace')[-2000:]}" for file in files)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.slurm_cluster", description=__doc__)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--processors", type=int, default=4, help="of each node (default: 4)")
    parser.add_argument("--megabytes", type=int, default=32_000, help="of each node (default: 32000)")
    parser.add_argument("command", nargs="+", help="what to run while the cluster is there")
    args = parser.parse_args(argv)
    if missing():
        sys.exit(f"error: SLURM is not installed: {', '.join(missing())} cannot be found.")
    with Cluster(args.nodes, args.processors, args.megabytes) as cluster:
        return subprocess.run(args.command, env={**os.environ, **cluster.environment}).returncode


if __name__ == "__main__":
    sys.exit(main())
