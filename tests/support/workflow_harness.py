"""A copy of the project with a tiny model and texts, and real Snakemake runs in it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import torch
import yaml
from numba.core.caching import _CacheLocator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import layerwise.kernels.rows  # noqa: F401 (it says where Numba keeps what is compiled)
from tests.support.paths import ROOT

# What a run reads, the embedded model apart.
PARTS = ("Snakefile", "layerwise", "methods", "allocators", "workflow", "profiles", "config", "resources/published.csv")
CORES = 2
HEADER = re.compile(r"^job\s+count\s*$")  # of Snakemake's table of jobs
CONFIG = Path("config/tiny.yaml")
WITHOUT_FIGURES = ("results/tables/cells.parquet", "--configfile", str(CONFIG))  # arguments of Snakemake
# Characters that a shell would act on: every path must arrive as it is.
MODEL = Path("a model; touch pwned")
TEXTS = {"train": Path("it's text/train $(touch pwned).txt"), "held-out": Path("it's text/held out.txt")}


@dataclass(frozen=True)
class Run:
    """What a call of Snakemake gave; output: stdout and stderr together."""

    status: int
    output: str
    seconds: float

    @property
    def jobs(self) -> dict[str, int]:
        """Rule -> number of jobs, from the table that Snakemake prints; empty where nothing is to be done."""
        lines = self.output.splitlines()
        starts = [number for number, line in enumerate(lines) if HEADER.match(line)]
        counts: dict[str, int] = {}
        for line in lines[starts[0] + 2 :] if starts else []:
            rule, _, count = line.rpartition(" ")
            if not count.isdigit():
                break
            counts[rule.strip()] = int(count)
        counts.pop("total", None)
        return counts


def copy_project(to: Path) -> Path:
    """The code of the project, without what runs leave behind, in a folder of its own."""
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, to / part, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (to / part).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / part)
    share_compiled(compiled_folder(), to)
    return to


def compiled_folder() -> Path:
    """Where Numba keeps what is compiled."""
    # Numba makes its settings when it is imported, which no type says.
    return Path(numba.config.CACHE_DIR)  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]


def share_compiled(cache: Path, to: Path, within: Path | None = None) -> None:
    """Give a copy of the project the loops that are compiled in this one, for which it would take minutes.

    cache: where Numba keeps them, under a name of the project's place; within: where it will look for the copy's
    (default: there, if NUMBA_CACHE_DIR says so, else in the copy).
    """
    own = cache / place_of(ROOT)
    if within is None:
        within = cache if "NUMBA_CACHE_DIR" in os.environ else to / cache.relative_to(ROOT)
    if own.is_dir():
        shutil.copytree(own, within / place_of(to), dirs_exist_ok=True)


def place_of(project: Path) -> str:
    return _CacheLocator.get_suitable_cache_subpath(str(project / "layerwise/kernels/rows.py"))


def snakemake(folder: Path, *arguments: str | Path, **environment: str) -> Run:
    """Run Snakemake in `folder`, on CORES cores unless the arguments say another number."""
    cores = [] if "--cores" in arguments else ["--cores", str(CORES)]
    # The project must find itself, and no test may need the network.
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH" and not key.startswith("SNAKEMAKE")}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *cores, *map(str, arguments)],
        cwd=folder,
        env={**clean, "HF_HUB_OFFLINE": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return Run(done.returncode, done.stdout, time.perf_counter() - start)


def words(count: int, seed: int) -> str:
    """A text of so many made-up words that follow one another with some regularity."""
    generator = torch.Generator().manual_seed(seed)
    known = [a + b for a in ("ka", "lo", "mi", "nu", "po", "ri") for b in ("", "n", "sa", "te", "x")]
    steps = torch.randint(1, 4, (count,), generator=generator).cumsum(0)
    return " ".join(known[int(step) % len(known)] for step in steps)


def write_tokenizer(folder: Path, text: str) -> int:
    """Train a byte-level BPE tokenizer, save it as Hugging Face does and return its vocabulary's size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator([text], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return tokenizer.get_vocab_size()


def write_model(folder: Path, vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    """Save a random Llama of two blocks of width 32."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def tiny_study() -> dict[str, Any]:
    """The config of a study of 7 cells and one skipped pair: paths are relative to the project's copy."""
    return {
        "study": "tiny",
        "modes": ["shared", "sequential"],
        "models": {"tiny": {"path": str(MODEL)}},
        "texts": {name: {"path": str(path)} for name, path in TEXTS.items()},
        "calibration": {"words": {"text": "train", "samples": 4, "length": 16, "seed": 0}},
        "evaluation": {"held-out": {"text": "held-out", "length": 16, "samples": 4}},
        "targets": [{"sparsity": 0.5, "pattern": "row"}, {"pattern": "2:4"}],
        "methods": {"dense": None, "magnitude": {"targets": [{"pattern": "2:4"}, {"bits": 4}]}, "wanda": None},
    }


def write_config(folder: Path, study: Mapping[str, Any], path: Path = CONFIG) -> Path:
    """Write a study as YAML into the project's copy and return its path there."""
    (folder / path).write_text(yaml.safe_dump(dict(study), sort_keys=False), "utf-8")
    return path


def tiny_project(folder: Path) -> Path:
    """A copy of the project with the tiny model, its texts and its study in config/tiny.yaml."""
    copy_project(folder)
    train = words(600, seed=0)
    for path, text in zip(TEXTS.values(), (train, words(300, seed=1)), strict=True):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(text, "utf-8")
    write_model(folder / MODEL, write_tokenizer(folder / MODEL, train))
    write_config(folder, tiny_study())
    return folder
