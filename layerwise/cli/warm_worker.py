"""Run jobs as forks of a process that has already imported torch and transformers, which takes longer than many jobs.

A run of Snakemake on this machine starts one server per environment of its jobs, usually one per number of threads,
when the first job requests it. A job passes its arguments, its folder and its standard streams, and ends with its
fork's status. A server imports only third-party packages before a fork, so that each job runs the project's current
code. A job that finds no server runs in its own process, with the same result. The servers end with the run.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import json
import os
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

FOLDER = Path(".snakemake/warm-workers")  # relative, because the path of a socket has at most 107 bytes
LAUNCHER = "launcher"
SHELL = {"_", "SHLVL", "PWD", "OLDPWD"}  # variables that a shell sets and no library reads
SERVERS = 4  # at most; each takes about 400 MB, most of it shared with its forks
LONGEST = 1 << 20  # bytes of a message
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
ENDED = "error: the process that ran this job ended: run again."

TABLES = ("pandas", "pyarrow.parquet", "jsonschema", "yaml")
MODELS = (
    "torch",
    "safetensors.torch",
    "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils",
    "numba",
)
TASKS = ("lm_eval.tasks", "lm_eval.evaluator", "lm_eval.models.huggingface")
WITH_TORCH = ("allocate", "calibrate", "certificate", "check-model", "dense-states", "export", "fisher")
# Job -> packages that a server imports before its fork. Other jobs run in their own process.
PACKAGES = {
    **dict.fromkeys(WITH_TORCH, (*MODELS, *TABLES)),
    "compress": (*MODELS, *TABLES, *TASKS),  # this job also evaluates
    "figure": (*TABLES, "matplotlib.figure", "matplotlib.backends.backend_agg"),
}


class Launcher:
    """Runs in the process of a run and starts servers when jobs request them. They end when it is closed or ends."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder
        self.servers: dict[str, subprocess.Popen[bytes]] = {}
        self.listening: socket.socket | None = None

    def start(self) -> None:
        """Listen for jobs. Does nothing if the folder does not support sockets or the system has no process
        descriptors."""
        if not hasattr(os, "pidfd_open"):
            return
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder.mkdir(mode=0o700, parents=True)  # no other user may submit jobs
            self.listening = _listen(self.folder / LAUNCHER)
            threading.Thread(target=self._launch, args=(self.listening,), daemon=True).start()
            atexit.register(self.close)

    def close(self) -> None:
        """Let the servers end, and remove their folder. Can be called repeatedly."""
        atexit.unregister(self.close)
        if self.listening:
            self.listening.close()
        for server in self.servers.values():
            assert server.stdin
            server.stdin.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _launch(self, listening: socket.socket) -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:  # closed
                return
            with connection, contextlib.suppress(OSError):  # the job has ended; others are waiting
                environment = json.loads(connection.recv(LONGEST) or b"{}")
                name = _name(environment)
                if environment and (name in self.servers or len(self.servers) < SERVERS):
                    self._serve(name, environment)
                    connection.send(b"ready")

    def _serve(self, name: str, environment: Mapping[str, str]) -> None:
        if name in self.servers:
            return
        with _listen(self.folder / name) as listening:
            self.servers[name] = subprocess.Popen(
                [sys.executable, "-m", "layerwise.cli.warm_worker", str(listening.fileno())],
                stdin=subprocess.PIPE,
                env=environment,
                pass_fds=[listening.fileno()],
            )


def _listen(address: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.bind(str(address))
    listening.listen(64)
    return listening


def _name(environment: Mapping[str, str]) -> str:
    """The name of the server for an environment, from all variables that a library may read."""
    read = sorted((name, value) for name, value in environment.items() if name not in SHELL)
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:16]


# ----------------------------------------------------------------------------------------------------------- the job


def hand_over(argv: Sequence[str], folder: Path = FOLDER) -> None:
    """Run a worker's arguments in a fork of a server, and end this process with the fork's status.

    Returns only if the job must run in this process.
    """
    if not argv or argv[0] not in PACKAGES or "cuda" in argv:  # each process must start CUDA itself
        return
    try:
        order = {"argv": list(argv), "folder": os.getcwd(), "umask": os.umask(0o077), "shell": _of_shell()}
        os.umask(order["umask"])
        order["ignored"] = [number for number in SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
        server = _connect(folder)
        socket.send_fds(server, [json.dumps(order).encode()], [0, 1, 2])
        child = int(server.recv(32) or 0)
    except OSError:  # no server, or it has just ended
        return
    if child:
        _end_as(child, server)


def _of_shell() -> dict[str, str]:
    return {name: os.environ[name] for name in SHELL if name in os.environ}


def _connect(folder: Path) -> socket.socket:
    """A connection to a server. Raises OSError if there is none."""
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    address = str(folder / _name(os.environ))
    try:
        server.connect(address)
    except OSError:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as launcher:
            launcher.connect(str(folder / LAUNCHER))
            launcher.send(json.dumps(dict(os.environ)).encode())
            launcher.recv(32)
        server.connect(address)
    return server


def _end_as(child: int, server: socket.socket) -> None:
    """End this process with the fork's status, sent by the server; signals that end this process end the fork."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        # A terminal also sends it to the fork. A second one ends this process, and the server then kills the fork.
        signal.signal(signal.SIGINT, lambda *_: signal.signal(signal.SIGINT, signal.SIG_DFL))
    signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
    answer = server.recv(32)
    if not answer:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        sys.exit(ENDED)
    status = int(answer)
    if status < 0:
        if -status != signal.SIGKILL:
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


# -------------------------------------------------------------------------------------------------------- the server


class Server:
    """Forks for jobs until its standard input closes, and then until the last job has ended."""

    def __init__(self, listening: socket.socket) -> None:
        self.listening = listening
        self.waiting = selectors.DefaultSelector()
        self.waiting.register(listening, selectors.EVENT_READ, self._accept)
        self.waiting.register(sys.stdin, selectors.EVENT_READ, self._close)
        self.processes: dict[socket.socket, int] = {}  # connection of a job -> descriptor of its fork

    def serve(self) -> list[str] | None:
        """Returns a job's arguments in its fork, and None in the server at its end."""
        while self.processes or self.listening.fileno() >= 0:
            for key, _ in self.waiting.select():
                gone = self.waiting.get_map().get(key.fd) is not key  # an earlier event has closed this connection
                if not gone and (job := key.data(key.fileobj)):
                    return job
        return None

    def _close(self, stream: IO[str]) -> None:
        self.waiting.unregister(stream)
        self.waiting.unregister(self.listening)
        self.listening.close()

    def _accept(self, listening: socket.socket) -> list[str] | None:
        connection, _ = listening.accept()
        message, streams, _, _ = socket.recv_fds(connection, LONGEST, 3)
        if not message:  # the job has ended already
            connection.close()
            return None
        order = json.loads(message)
        try:
            for package in PACKAGES[order["argv"][0]]:
                importlib.import_module(package)
            child = os.fork()
        except Exception:  # the job reports the error in its own process; other jobs continue
            child = None
        if child is None:
            for stream in streams:
                os.close(stream)
            connection.close()
            return None
        if not child:
            connection.close()
            self._become(order, streams)
            return order["argv"]
        for stream in streams:
            os.close(stream)
        process = os.pidfd_open(child)
        self.processes[connection] = process
        self.waiting.register(connection, selectors.EVENT_READ, self._abandon)
        self.waiting.register(process, selectors.EVENT_READ, lambda _: self._end(connection, child))
        with contextlib.suppress(OSError):
            connection.send(str(child).encode())
        return None

    def _become(self, order: dict[str, Any], streams: Sequence[int]) -> None:
        """In a fork: close the server's files, and adopt the job's streams, folder and signals."""
        for key in list(self.waiting.get_map().values()):
            if key.fd:  # 0 is replaced below
                os.close(key.fd)
        self.waiting.close()
        for target, stream in enumerate(streams):
            os.dup2(stream, target)
            os.close(stream)
        for number in SIGNALS:
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, signal.SIG_IGN if number in order["ignored"] else usual)  # nohup ignores SIGHUP
        os.chdir(order["folder"])
        os.umask(order["umask"])
        os.environ.update(order["shell"])

    def _abandon(self, connection: socket.socket) -> None:
        """End the fork of a job whose submitting process is gone, usually killed."""
        self.waiting.unregister(connection)
        signal.pidfd_send_signal(self.processes[connection], signal.SIGKILL)

    def _end(self, connection: socket.socket, child: int) -> None:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        process = self.processes.pop(connection)
        self.waiting.unregister(process)
        os.close(process)
        with contextlib.suppress(KeyError):  # the job was abandoned
            self.waiting.unregister(connection)
        with contextlib.suppress(OSError), connection:
            connection.send(str(status).encode())


def main() -> None:
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # it ends when the run and its jobs have ended
    job = Server(socket.socket(fileno=int(sys.argv[1]))).serve()
    if job is not None:
        from layerwise.cli.worker import run

        run(job)


if __name__ == "__main__":
    main()
