"""SparseGPT, GPTQ, their selection and their grids against the published loops and against what no code can leave out.

`baseline_*` are the published loops in plain torch; `floor_*` the factorisation and the products, or one reading of the
weight. Every case is (name, size, callable); run as a module it prints medians, taken in turns, in milliseconds:

    python -m tests.benchmarks.bench_columns 4096 --rounds 5 --threads 2
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from layerwise.contract.layer import Gram, Layer, Method, Target
from layerwise.methods.gptq import GPTQ
from layerwise.methods.magnitude import Magnitude
from layerwise.methods.rtn import RTN
from layerwise.methods.sparsegpt import SparseGPT
from layerwise.methods.wanda import Wanda
from layerwise.numerics.obs import SPAN

BLOCK, DAMPING, GROUP = 128, 0.01, 128
GRID = Target(bits=4, group=GROUP)
HALVES = {"row": Target(0.5), "layer": Target(0.5, "layer"), "2:4": Target(pattern="2:4")}


def build(out: int, inputs: int) -> Layer:
    """A layer with correlated inputs of unequal scale: neighbours share a part of what they are, some are large."""
    rng = torch.Generator().manual_seed(0)
    tokens = torch.randn(inputs + 512, inputs, generator=rng)
    shared = torch.randn(inputs + 512, inputs // 16, generator=rng) @ torch.randn(inputs // 16, inputs, generator=rng)
    tokens = (tokens + shared / (inputs // 16) ** 0.5) * torch.exp(torch.randn(inputs, generator=rng))
    weight = 0.02 * torch.randn(out, inputs, generator=rng)
    return Layer(f"{out} x {inputs}", weight, Gram(tokens.T @ tokens / len(tokens), len(tokens)))


def afresh(layer: Layer) -> Layer:
    """The layer with nothing kept on its Gram, so that the factorisation is part of what is timed."""
    return Layer(layer.name, layer.weight, Gram(layer.gram.matrix, layer.gram.tokens))


def published_factor(gram: Tensor) -> Tensor:
    """[in, in] upper factor of the damped inverse as the released codes have it: three factorisations, in float32."""
    damped = gram.clone()
    damped.diagonal().add_(DAMPING * gram.diagonal().mean())
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)


def baseline_columns(layer: Layer, begin: Callable, settle: Callable) -> Tensor:
    """The published loop: begin(start, block, factor) as a block begins, settle(j, i, ...) for each column."""
    weight, factor = layer.weight.clone(), published_factor(layer.gram.matrix)
    for start in range(0, weight.shape[1], BLOCK):
        end = min(start + BLOCK, weight.shape[1])
        block, within = weight[:, start:end].clone(), factor[start:end, start:end]
        settled, errors = torch.zeros_like(block), torch.zeros_like(block)
        begin(start, block, within)
        for i in range(end - start):
            w = block[:, i]
            settled[:, i] = settle(start + i, i, w, block, within, weight)
            error = (w - settled[:, i]) / within[i, i]
            block[:, i:] -= error.unsqueeze(1).matmul(within[i, i:].unsqueeze(0))
            errors[:, i] = error
        weight[:, start:end] = settled
        weight[:, end:] -= errors.matmul(factor[start:end, end:])
    return weight


def baseline_sparsegpt(layer: Layer, target: Target) -> Tensor:
    """Weight [out, in] of the released fasterprune; in `row` each row of a block gives its half."""
    prune = torch.zeros(0)

    def begin(start: int, block: Tensor, factor: Tensor) -> None:
        nonlocal prune
        prune = torch.zeros_like(block, dtype=torch.bool)
        if not target.n_of_m:
            score = block**2 / factor.diagonal().reshape(1, -1) ** 2
            lines = score.flatten()[None] if target.pattern == "layer" else score
            threshold = lines.sort(1).values[:, int(lines.shape[1] * target.sparsity) - 1, None]
            prune = (lines <= threshold).view_as(score)

    def settle(j: int, i: int, w: Tensor, block: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
        if target.n_of_m and i % target.n_of_m[1] == 0:
            kept, of = target.n_of_m
            score = block[:, i : i + of] ** 2 / factor.diagonal()[i : i + of].reshape(1, -1) ** 2
            prune.scatter_(1, i + torch.topk(score, of - kept, dim=1, largest=False)[1], True)
        settled = w.clone()
        settled[prune[:, i]] = 0
        return settled

    return baseline_columns(layer, begin, settle)


def baseline_gptq(layer: Layer, target: Target) -> Tensor:
    """Weight [out, in] of the released fasterquant, with its asymmetric min-max Quantizer."""
    most, scale, zero = 2 ** (target.bits or 0) - 1, torch.zeros(0), torch.zeros(0)

    def settle(j: int, i: int, w: Tensor, block: Tensor, factor: Tensor, weight: Tensor) -> Tensor:
        nonlocal scale, zero
        if j % (target.group or weight.shape[1]) == 0:
            run = weight[:, j : j + (target.group or weight.shape[1])]
            low, high = run.min(1)[0].clamp(max=0), run.max(1)[0].clamp(min=0)
            scale = ((high - low) / most).unsqueeze(1)
            zero = torch.round(-low.unsqueeze(1) / scale)
        codes = torch.clamp(torch.round(w.unsqueeze(1) / scale) + zero, 0, most)
        return (scale * (codes - zero)).flatten()

    return baseline_columns(layer, lambda *_: None, settle)


def baseline_wanda(layer: Layer, target: Target) -> Tensor:
    """Weight [out, in] of the released code: a sort of each row, or topk of each group."""
    weight = layer.weight.clone()
    score = weight.abs() * layer.gram.diagonal.sqrt().reshape(1, -1)
    prune = torch.zeros_like(score, dtype=torch.bool)
    if target.n_of_m:
        kept, of = target.n_of_m
        for i in range(0, weight.shape[1], of):
            prune.scatter_(1, i + torch.topk(score[:, i : i + of], of - kept, dim=1, largest=False)[1], True)
    else:
        order = torch.sort(score, dim=-1, stable=True)[1]
        prune.scatter_(1, order[:, : int(weight.shape[1] * target.sparsity)], True)
    weight[prune] = 0
    return weight


def baseline_magnitude(layer: Layer, target: Target) -> Tensor:
    """Weight [out, in] of the released code: a sort of all entries of the layer."""
    score = layer.weight.abs()
    threshold = torch.sort(score.flatten()).values[int(score.numel() * target.sparsity)]
    return torch.where(score <= threshold, 0.0, layer.weight)


def baseline_rtn(layer: Layer, target: Target) -> Tensor:
    """Weight [out, in], group after group."""
    pieces, most = [], 2 ** (target.bits or 0) - 1
    for run in layer.weight.split(target.group or layer.weight.shape[1], 1):
        low, high = run.min(1, keepdim=True)[0].clamp(max=0), run.max(1, keepdim=True)[0].clamp(min=0)
        scale = (high - low) / most
        zero = torch.round(-low / scale)
        pieces.append(scale * (torch.clamp(torch.round(run / scale) + zero, 0, most) - zero))
    return torch.cat(pieces, 1)


def floor_factorisation(layer: Layer) -> Tensor:
    """One Cholesky factorisation in float64: `Gram.factor`."""
    return afresh(layer).gram.factor(DAMPING)[0]


def floor_products(layer: Layer, factor: Tensor) -> Tensor:
    """errors @ factor[columns, before] for every span of columns: half of weight @ factor."""
    weight, lost = layer.weight, torch.empty_like(layer.weight)
    for start in range(SPAN, weight.shape[1], SPAN):
        end = min(start + SPAN, weight.shape[1])
        torch.mm(weight[:, :start], factor[start:end, :start].T, out=lost[:, start:end])
    return lost


def floor_columns(layer: Layer) -> Tensor:
    """Factorisation and products."""
    return floor_products(layer, floor_factorisation(layer))


def floor_copy(layer: Layer) -> Tensor:
    """The weight read and written once."""
    return layer.weight.clone()


def floor_sum(layer: Layer) -> Tensor:
    """The weight read once."""
    return layer.weight.sum()


def method(built: Method, target: Target) -> Callable[[Layer], object]:
    return lambda layer: built.compress(afresh(layer), target, torch.Generator())


def cases(sizes: tuple[tuple[int, int], ...] = ((4096, 4096),)) -> list[tuple[str, str, Callable[[], object]]]:
    """(name, size, callable) of the methods, of their baselines and of their floors."""
    found = []
    for out, inputs in sizes:
        layer = build(out, inputs)

        def add(name: str, call: Callable, layer: Layer = layer) -> None:
            found.append((name, layer.name, lambda: call(layer)))

        add("floor: factorisation and products", floor_columns)
        for pattern, target in HALVES.items():
            add(f"sparsegpt {pattern}", method(SparseGPT(), target))
            add(f"sparsegpt {pattern}, published", lambda layer, target=target: baseline_sparsegpt(layer, target))
        add("gptq 4 bits g128", method(GPTQ(), GRID))
        add("gptq 4 bits g128, published", lambda layer: baseline_gptq(layer, GRID))
        add("gptq 4 bits g128 mse", method(GPTQ(mse=True), GRID))
        add("floor: sum", floor_sum)
        add("floor: copy", floor_copy)
        for pattern, target in HALVES.items():
            add(f"wanda {pattern}", method(Wanda(), target))
            add(f"magnitude {pattern}", method(Magnitude(), target))
        for pattern in ("row", "2:4"):
            add(f"wanda {pattern}, published", lambda layer, t=HALVES[pattern]: baseline_wanda(layer, t))
        add("magnitude layer, published", lambda layer: baseline_magnitude(layer, HALVES["layer"]))
        add("rtn 4 bits g128", method(RTN(), GRID))
        add("rtn 4 bits g128, published", lambda layer: baseline_rtn(layer, GRID))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["4096"], help="in, or OUTxIN")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the cases' names")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = tuple((int(size.split("x")[0]), int(size.split("x")[-1])) for size in args.sizes)
    # One thread is timed by its own clock, which stands still while other programs have their turns.
    clock = time.process_time if args.threads == 1 else time.perf_counter
    chosen = [case for case in cases(sizes) if any(part in case[0] for part in args.only)]
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for name, size, call in chosen:
            start = clock()
            call()
            seconds.setdefault((name, size), []).append(clock() - start)
    for (name, size), times in seconds.items():
        print(f"{size:>13}  {name:<36}{1e3 * statistics.median(times):10.1f} {1e3 * min(times):10.1f}")
    print(f"{args.threads} threads, medians and minima of {args.rounds} rounds, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
