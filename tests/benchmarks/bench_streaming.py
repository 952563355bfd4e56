"""Memory and speed of a model that is read block by block: a random Llama, in shards, under a hard limit of memory.

Each job is the workflow's own, in a process of its own, in a control group with the limit (version 1 or 2, where this
process may make one) and otherwise with that limit of private memory (RLIMIT_DATA). By default the model is of 1.1 B
parameters, 22 blocks of width 2048; with several numbers of blocks it shows that the peak does not grow with them:

    python -m tests.benchmarks.bench_streaming --blocks 8 16 22 --samples 4 --limit-gib 3

With --rounds it compares instead the speed of the calibration with that of the same model held in memory:

    python -m tests.benchmarks.bench_streaming --blocks 8 --samples 4 --rounds 3
"""

import argparse
import contextlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.initialization import no_init_weights

from layerwise.calibration.block_stream import Stream
from layerwise.calibration.calibrate import shared
from layerwise.models.loading import load
from layerwise.models.streaming import LazyBlocks
from layerwise.models.structure import Blocks
from layerwise.study.grid import plan

GROUPS = {"/sys/fs/cgroup/memory": "memory.limit_in_bytes", "/sys/fs/cgroup": "memory.max"}  # version 1, version 2
GIB = 2**30


def write_model(folder: Path, blocks: int, width: int, vocabulary: int, length: int) -> int:
    """Save a random Llama in bfloat16 shards; returns its number of parameters."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 512),
        max_position_embeddings=length,
    )
    with no_init_weights():
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02) if parameter.ndim > 1 else parameter.data.fill_(1)
    model.save_pretrained(folder, max_shard_size="500MB")
    return sum(parameter.numel() for parameter in model.parameters())


@contextlib.contextmanager
def control_group(limit: int) -> Iterator[Path | None]:
    """A memory control group with a limit in bytes, or None where this process may not make one."""
    for root, file in GROUPS.items():
        group = Path(root) / f"layerwise-{os.getpid()}"
        try:
            group.mkdir()
            (group / file).write_text(str(limit))
        except OSError:
            with contextlib.suppress(OSError):
                group.rmdir()
            continue
        try:
            yield group
        finally:
            group.rmdir()
        return
    yield None


def run(command: list[str], limit: int, folder: Path, threads: int) -> tuple[float, float]:
    """(seconds, peak resident MB) of a module of the project, run in `folder` within a limit of memory in bytes."""
    with control_group(limit) as group:

        def begin() -> None:
            if group:
                (group / "cgroup.procs").write_text(str(os.getpid()))
            else:
                resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

        environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": str(threads)}
        start = time.perf_counter()
        process = subprocess.Popen([sys.executable, "-m", *command], cwd=folder, env=environment, preexec_fn=begin)
        _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(
            f"{command[0]} failed with status {os.waitstatus_to_exitcode(status)} under {limit / GIB:g} GiB."
        )
    return time.perf_counter() - start, used.ru_maxrss / 1e3


def cells(model: Path, methods: list[str], samples: int, length: int) -> list[tuple[str, str, str]]:
    """(method, mode, spec as JSON) of each cell."""
    study = {
        "models": {"random": {"path": str(model)}},
        "texts": {"words": {"path": "words.txt"}},
        "calibration": {"words": {"text": "words", "samples": samples, "length": length, "seed": 0}},
        "evaluation": {"words": {"text": "words", "length": length}},
        "modes": ["shared", "sequential"],
        "targets": [{"sparsity": 0.5}],
        "methods": dict.fromkeys(methods),
    }
    return [(cell.columns["method"], cell.columns["mode"], cell.params) for cell in plan(study).cells]


def study(folder: Path, blocks: int, args: argparse.Namespace) -> None:
    """Calibrate and compress a model by all methods in both modes, and print a row of each job."""
    limit = int(args.limit_gib * GIB)
    parameters = write_model(folder / "model", blocks, args.width, args.vocabulary, args.length)
    model = json.dumps({"name": "random", "path": "model", "dtype": "bfloat16", "trust_remote_code": False})
    drawn = torch.randint(args.vocabulary, (args.samples, args.length), dtype=torch.int64)
    info = {"dataset": "words", "sha256": "0" * 64, "seed": 0, "sampling": "stream"}
    info |= {"samples": args.samples, "length": args.length}
    save_file({"tokens": drawn}, folder / "tokens.safetensors", metadata={"info": json.dumps(info)})
    given = ["--model", model, "--fingerprint", "model.json", "--tokens", "tokens.safetensors"]
    given += ["--threads", str(args.threads)]
    run(["layerwise.sources.fingerprint", "--model", model, "--out", "model.json"], limit, folder, args.threads)
    jobs = [("calibrate", "", ["layerwise.calibration.calibrate", *given, "--out", "gram.json"])]
    for method, mode, spec in cells(folder / "model", args.methods, args.samples, args.length):
        gram = ["--gram", "gram.json"] if mode == "shared" else []
        out = ["--out", f"cells/{method}-{mode}"]
        jobs.append((method, mode, ["layerwise.cli.compress", "--cell", spec, *given, *gram, *out]))
    for name, mode, command in jobs:
        seconds, peak = run(command, limit, folder, args.threads)
        tokens = args.samples * args.length / seconds
        print(
            f"| {parameters / 1e9:.2f} | {blocks} | {name} | {mode} | {peak:.0f} | {seconds:.0f} | {tokens:.0f} |",
            flush=True,
        )


def compare(folder: Path, blocks: int, args: argparse.Namespace) -> None:
    """Print the tokens per second of a calibration, of the model read block by block and of the same held in memory.

    From the loaded model to the last Gram, in turns; where blocks are read, their reading is part of it.
    """
    write_model(folder / "model", blocks, args.width, args.vocabulary, args.length)
    spec = {"path": str(folder / "model")}
    sources = {"in memory": Blocks(load(spec)), "block by block": LazyBlocks(spec)}
    drawn = torch.randint(args.vocabulary, (args.samples, args.length))
    seconds: dict[str, list[float]] = {name: [] for name in sources}
    for _ in range(args.rounds):
        for name, source in sources.items():
            start = time.perf_counter()
            states = None if name == "in memory" else folder / "states"
            for taps in shared(Stream(source, drawn, folder=states)):
                del taps
            seconds[name].append(time.perf_counter() - start)
    for name, taken in seconds.items():
        print(f"{name}: {args.samples * args.length / statistics.median(taken):.1f} tokens/s (median of {args.rounds})")
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    print(f"block by block / in memory: {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, nargs="+", default=[8, 16, 22])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--limit-gib", type=float, default=3)
    parser.add_argument("--methods", nargs="*", default=["wanda", "sparsegpt"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, help="compare the calibration's speed with that in memory, so often")
    args = parser.parse_args()
    if args.rounds:
        torch.set_num_threads(args.threads)
        with tempfile.TemporaryDirectory(prefix="layerwise-") as folder, torch.no_grad():
            compare(Path(folder), args.blocks[-1], args)
        return
    print("| parameters (10^9) | blocks | job | mode | peak MB | seconds | tokens/s |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for blocks in args.blocks:
        with tempfile.TemporaryDirectory(prefix="layerwise-") as folder:
            study(Path(folder), blocks, args)


if __name__ == "__main__":
    main()
