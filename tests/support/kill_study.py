"""Kill a whole study, Snakemake and all its jobs, at random moments; the next run must finish as if nothing had been.

    python -m tests.support.kill_study FOLDER --kills 20 --against OTHER

FOLDER: a clone of the project, where the study runs; OTHER: one where it ran to its end undisturbed. Each run is killed
after a random time until the kills are spent; then one runs to its end, and all tables are compared, down to the last
bit of every number but those that no two runs share (times, memory). A study that ends before is started again.
--signal TERM tells all processes to end instead, and waits until they have.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import psutil

# Of two runs never the same.
MEASURED = {"seconds", "peak_mb", "peak_gpu_mb", "commit", "dirty"}
TIMES = {"solve_seconds", "job_seconds"}  # metrics of the table `cells`


def kill_tree(process: subprocess.Popen, by: signal.Signals = signal.SIGKILL) -> None:
    """A signal to a process and all that it has started, the process first, so that it starts nothing more."""
    tree = psutil.Process(process.pid)
    tree.suspend()
    for one in [*tree.children(recursive=True), tree]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.send_signal(by)
    with contextlib.suppress(psutil.NoSuchProcess):
        tree.resume()  # to see a signal that it may handle
    process.wait()


def heed() -> None:
    """Ctrl-C ends the process that is begun, also where this one was begun in the background, to be deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def disturbed(
    folder: Path,
    arguments: Sequence[str],
    kills: int,
    longest: float,
    chance: random.Random,
    by: signal.Signals = signal.SIGKILL,
) -> list[str]:
    """Run a study in a folder, killing it so often; returns what ran each time, the last to its end.

    longest: seconds after which a run is killed at the latest, more after runs in which no job came to its end: some
    job may take longer. Raises AssertionError when the last run fails.
    """
    told, patience = [], longest
    for number in range(kills + 1):
        command = [sys.executable, "-m", "snakemake", "--cores", "2", *arguments]
        with (folder / f"run-{number}.log").open("w+") as log:
            process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, preexec_fn=heed)
            try:
                process.wait(None if number == kills else chance.uniform(0, patience))
            except subprocess.TimeoutExpired:
                kill_tree(process, by)
            log.seek(0)
            told.append(log.read())
        patience = longest if "Finished jobid" in told[-1] else 1.2 * patience
        if process.returncode == 0:
            break
        assert number < kills, told[-1]
        assert process.returncode == -by or by != signal.SIGKILL, told[-1]
    return told


def tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The study's tables, without what is measured."""
    found = {}
    for path in sorted((folder / "results/tables").glob("*.parquet")):
        table = pd.read_parquet(path)
        if "metric" in table:
            table = table[~table["metric"].isin(list(TIMES))].reset_index(drop=True)
        found[path.stem] = table.drop(columns=list(MEASURED & set(table.columns)))
    return found


def assert_same_tables(folder: Path, other: Path) -> None:
    ours, theirs = tables(folder), tables(other)
    assert ours and ours.keys() == theirs.keys()
    for name, table in ours.items():
        pd.testing.assert_frame_equal(table, theirs[name], check_exact=True, obj=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--against", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest", type=float, default=60, help="seconds to a kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--signal", choices=("KILL", "TERM", "INT"), default="KILL")
    args, rest = parser.parse_known_args()
    start = time.perf_counter()
    by = signal.Signals[f"SIG{args.signal}"]
    chance, spent = random.Random(args.seed), 0
    while spent < args.kills:  # a study that ends before is started again
        subprocess.run(["make", "clean"], cwd=args.folder, check=True, stdout=subprocess.DEVNULL)
        spent += len(disturbed(args.folder, rest, args.kills - spent, args.longest, chance, by)) - 1
        resumed = sum(path.read_text(errors="replace").count("Resuming after") for path in args.folder.rglob("*.log"))
        assert_same_tables(args.folder, args.against)
        seconds = time.perf_counter() - start
        print(f"{spent} kills, {seconds:.0f} s, {resumed} jobs went on within a model: all tables are the same.")


if __name__ == "__main__":
    main()
