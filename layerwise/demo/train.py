"""The recipe of the embedded demo model: a byte-level BPE tokenizer of 4096 and a Llama of 7.3 M parameters.

Trained on the docstrings of the scientific packages with Muon (matrices of the blocks) and AdamW (the rest), constant
rate and linear decay, bfloat16 autocast over float32 weights. Resumes from its checkpoint; the decay alone depends on
--steps, so the run can be prolonged until it begins.
"""

import argparse
import csv
import hashlib
import itertools
import json
import lzma
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from layerwise.figures import style
from layerwise.runtime.errors import report_errors
from layerwise.runtime.files import whole_file, write_atomic

END_OF_TEXT = "<|endoftext|>"
VOCABULARY = 4096
LENGTH = 512
# The pre-tokenizer of Llama 3: words with their leading space, numbers in threes, runs of blanks, line ends apart.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONFIG = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=LENGTH,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=0,
    eos_token_id=0,
)


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, model_max_length=LENGTH
    )


def encode(tokenizer: PreTrainedTokenizerFast, path: Path) -> torch.Tensor:
    """Token ids [n] of a split; each module is a document that begins with the end-of-text token."""
    documents = path.read_text("utf-8").split("\n\n\n\n")
    return torch.cat([torch.tensor([0, *tokenizer.encode(d, add_special_tokens=False)]) for d in documents])


def mean_loss(model: LlamaForCausalLM, window: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy in nats of window[:, 1:] [batch, LENGTH] given what precedes, under bfloat16 autocast."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(window[:, :-1], use_cache=False).last_hidden_state
        logits = hidden @ model.lm_head.weight.to(torch.bfloat16).T
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), window[:, 1:].flatten())


@torch.no_grad()
def bits_per_byte(
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    tokenizer: PreTrainedTokenizerFast,
    ids: torch.Tensor,
    limit: int | None = None,
) -> float:
    """Bits needed per UTF-8 byte of `ids` [n]: every token but the first is predicted once, from its window alone.

    The tokens that begin documents cost bits and count no bytes. Whole batches of 16 windows are scored.
    """
    windows = ids[: (len(ids) - 1) // LENGTH * LENGTH + 1].unfold(0, LENGTH + 1, LENGTH)[:limit]  # [n, LENGTH + 1]
    nats = sum(loss_of(chunk).item() * chunk[:, 1:].numel() for chunk in windows.split(16) if len(chunk) == 16)
    scored = windows[: len(windows) // 16 * 16, 1:].flatten().tolist()
    size = len(str(tokenizer.decode([t for t in scored if t != 0])).encode("utf-8"))
    return nats / math.log(2) / size


def batches(ids: torch.Tensor, batch: int, seed: int):
    """Endless batches [batch, LENGTH + 1]: each epoch cuts the text from a new random offset and shuffles the cuts."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(LENGTH, (1,), generator=generator))
        windows = ids[offset:].unfold(0, LENGTH + 1, LENGTH)
        order = torch.randperm(len(windows), generator=generator)
        for chosen in order[: len(order) // batch * batch].split(batch):
            yield windows[chosen]


def rate(step: int, warmup: int, decay: int, steps: int) -> float:
    """Share of the peak rate: linear warm-up, constant, linear decay to zero over the last `decay` steps."""
    return min((step + 1) / warmup, 1.0, (steps - step) / decay)


def optimizers(model: LlamaForCausalLM, muon_rate: float, adam_rate: float) -> list[torch.optim.Optimizer]:
    blocks = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(blocks, lr=muon_rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@dataclass
class Run:
    """A training run: what is trained, and how far it is. curve: a point per validation; seconds: spent so far."""

    model: LlamaForCausalLM
    optimizers: list[torch.optim.Optimizer]
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def save(self, checkpoint: Path) -> None:
        state = {"step": self.step, "seconds": self.seconds, "curve": self.curve, "model": self.model.state_dict()}
        with whole_file(checkpoint) as part:
            torch.save(state | {"optimizers": [own.state_dict() for own in self.optimizers]}, part)

    def load(self, checkpoint: Path) -> None:
        state = torch.load(checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        for own, saved in zip(self.optimizers, state["optimizers"], strict=True):
            own.load_state_dict(saved)
        self.step, self.seconds, self.curve = state["step"], state["seconds"], state["curve"]


def train(args: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Train from the start, or from the checkpoint in `args.out`; writes checkpoints and curve.csv there."""
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(CONFIG)
    loss_of = torch.compile(lambda window: mean_loss(model, window))
    run = Run(model, optimizers(model, args.muon_rate, args.adam_rate))
    peaks = [own.param_groups[0]["lr"] for own in run.optimizers]
    train_ids, held_out = (encode(tokenizer, args.text / f"{s}.txt") for s in ("train", "validation"))
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        run.load(checkpoint)
    start = time.perf_counter() - run.seconds
    for window in itertools.islice(batches(train_ids, args.batch, args.seed), run.step, args.steps):
        share = rate(run.step, args.warmup, args.decay, args.steps)
        loss = update(run, loss_of, window, [peak * share for peak in peaks])
        run.seconds = time.perf_counter() - start
        if run.step % 10 == 0:
            print(f"step {run.step} loss {loss:.3f} seconds {run.seconds:.0f}", flush=True)
        if run.step % args.every == 0 or run.step == args.steps:
            bits = bits_per_byte(loss_of, tokenizer, held_out, limit=96)
            run.seconds = time.perf_counter() - start
            point = {"step": run.step, "tokens": run.step * args.batch * LENGTH, "seconds": round(run.seconds)}
            run.curve.append(point | {"train_loss": round(loss, 4), "validation_bits_per_byte": round(bits, 4)})
            print(run.curve[-1], flush=True)
            run.save(checkpoint)
    write_curve(run.curve, args.out / "curve.csv")
    return model


def update(
    run: Run, loss_of: Callable[[torch.Tensor], torch.Tensor], window: torch.Tensor, rates: Sequence[float]
) -> float:
    """One step on a batch with these rates of the optimisers. Returns the loss before it."""
    for own, rate_of_step in zip(run.optimizers, rates, strict=True):
        own.param_groups[0]["lr"] = rate_of_step
    loss = loss_of(window)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    for own in run.optimizers:
        own.step()
        own.zero_grad()
    run.step += 1
    return loss.item()


def write_curve(curve: Sequence[Mapping[str, float]], path: Path) -> None:
    with whole_file(path) as part, part.open("w", newline="") as file:
        writer = csv.DictWriter(file, curve[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(curve)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder of train.txt, validation.txt, test.txt")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=1600)
    parser.add_argument("--decay", type=int, default=300)
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 512 tokens per step")
    parser.add_argument("--muon-rate", type=float, default=0.01)
    parser.add_argument("--adam-rate", type=float, default=0.003)
    parser.add_argument("--every", type=int, default=100, help="steps between validations and checkpoints")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if (args.out / "tokenizer.json").exists():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(args.out)
    else:
        tokenizer = train_tokenizer((args.text / "train.txt").read_text("utf-8"))
        tokenizer.save_pretrained(args.out)
    model = train(args, tokenizer)
    model.bfloat16().save_pretrained(args.out)
    describe(model, tokenizer, args)


def describe(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> None:
    """Write training.json, what the model card says in numbers, and the training curve as a figure."""
    test = (args.text / "test.txt").read_bytes()
    loss_of = torch.compile(lambda window: mean_loss(model, window))
    figures = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "test_bits_per_byte": round(bits_per_byte(loss_of, tokenizer, encode(tokenizer, args.text / "test.txt")), 4),
        "xz_9e_bits_per_byte": round(8 * len(lzma.compress(test, preset=9 | lzma.PRESET_EXTREME)) / len(test), 4),
        "sha256": hashlib.sha256((args.out / "model.safetensors").read_bytes()).hexdigest(),
        "recipe": {key: value for key, value in vars(args).items() if key not in ("text", "out")},
    }
    write_atomic(args.out / "training.json", json.dumps(figures, indent=2) + "\n")
    curve = pd.read_csv(args.out / "curve.csv")
    with style.styled():
        figure, axes = plt.subplots(figsize=(style.WIDTH / 2, 2.4), layout="constrained")
        axes.plot(curve["tokens"] / 1e6, curve["validation_bits_per_byte"], marker=".")
        axes.axhline(figures["xz_9e_bits_per_byte"], color="0.5", linestyle="--")
        axes.text(axes.get_xlim()[1], figures["xz_9e_bits_per_byte"], "xz -9e (test)", ha="right", va="bottom")
        axes.set(xlabel="training tokens (millions)", ylabel="validation bits per byte")
        with whole_file(args.out / "curve.svg") as part:
            style.save(figure, part, ".svg")


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
