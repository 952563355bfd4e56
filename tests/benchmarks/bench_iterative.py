"""Frank-Wolfe, AWP, ALPS and ADMM against their published loops in plain torch and against the products they need.

Every case is (name, size, callable). Run as a module it prints medians, taken in turns, in milliseconds; with --errors
the seconds of whole runs to the published error; with --shared what a second layer of the same Gram still costs.

    python -m tests.benchmarks.bench_iterative 1024 2048 --rounds 3 --threads 2
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from layerwise.checks.layer_cases import Recipe, make
from layerwise.contract.layer import Gram, Layer, Method, Target
from layerwise.methods.admm import ADMM
from layerwise.methods.alps import ALPS
from layerwise.methods.awp import AWP
from layerwise.methods.frank_wolfe import FrankWolfe
from layerwise.methods.wanda import Wanda

TARGETS = {"60% row": Target(0.6), "2:4": Target(pattern="2:4")}
STEPS = 4  # of a published loop in one call: they all cost the same
MORE = 20  # of our own steps in one call
KEEP = 0.9
EXCHANGES = FrankWolfe(Wanda(), KEEP, step="pairwise")


def build(inputs: int) -> Layer:
    """The tests' correlated layer, square, with twice as many tokens as inputs."""
    return make(Recipe(out=inputs, inputs=inputs, sequences=8, length=inputs // 4), f"{inputs}")


def afresh(layer: Layer) -> Layer:
    """The layer with nothing kept on its Gram, so that eigenvalues and factors are part of what is timed."""
    return Layer(layer.name, layer.weight, Gram(layer.gram.matrix, layer.gram.tokens))


def first(method: Method, layer: Layer, target: Target) -> Tensor:
    """The weight that the method gives to the first layer of a Gram."""
    return method.compress(afresh(layer), target, torch.Generator()).weight


def lines(matrix: Tensor, target: Target) -> tuple[Tensor, int]:
    """The matrix with its comparison groups along the last axis, and how many of each stay."""
    if target.n_of_m:
        return matrix.unflatten(1, (-1, target.n_of_m[1])), target.n_of_m[0]
    return matrix, matrix.shape[1] - int(target.sparsity * matrix.shape[1])


def baseline_frank_wolfe(layer: Layer, target: Target, steps: int = STEPS) -> Tensor:
    """The relaxed mask [out, in] after so many of algorithm 2's steps: one product (W o M) G each, in float32."""
    weight, gram = layer.weight, layer.gram.matrix
    started = Wanda().compress(layer, target, torch.Generator()).mask
    assert started is not None
    fixed = FrankWolfe(Wanda(), KEEP).fixed(layer, started, target, torch.Generator())
    dense, relaxed = weight @ gram, started.float()
    for t in range(steps):
        gradient = -2 * weight * (dense - (weight * relaxed) @ gram)
        gradient.masked_fill_(fixed, -torch.inf)
        compared, kept = lines(gradient, target)
        chosen = compared.topk(kept, dim=-1, largest=False).indices
        vertex = torch.zeros_like(compared).scatter_(-1, chosen, 1.0).view_as(gradient) * (gradient < 0)
        relaxed = relaxed + 2 / (t + 2) * (vertex - relaxed)
    return relaxed


def baseline_awp(layer: Layer, target: Target, steps: int = STEPS) -> Tensor:
    """Theta [out, in] after so many published steps."""
    weight, gram = layer.weight, layer.gram.matrix
    theta = Wanda().compress(layer, target, torch.Generator()).weight
    size = 2 / float(gram.norm())
    for _ in range(steps):
        gradient = (weight - theta) @ gram
        if float(gradient.norm() / weight.norm()) < 1e-4:
            break
        compared, kept = lines(theta + size * gradient, target)
        chosen = compared.abs().topk(kept, dim=-1).indices
        theta = torch.zeros_like(compared).scatter_(-1, chosen, compared.gather(-1, chosen)).view_as(weight)
    return theta


def floor_product(layer: Layer) -> Tensor:
    """One gradient of AWP's, or of a Frank-Wolfe step that keeps nothing."""
    return layer.weight @ layer.gram.matrix


def floor_spectrum(layer: Layer) -> Tensor:
    """What ALPS needs of a Gram once."""
    return torch.linalg.eigh(layer.gram.matrix.double())[1]


def cases(sizes: tuple[int, ...] = (1024,)) -> list[tuple[str, str, Callable[[], object]]]:
    """(name, size, callable) of the methods, of their baselines and of their floors."""
    found: list[tuple[str, str, Callable[[], object]]] = []
    for size in sizes:
        layer = build(size)

        def add(name: str, call: Callable[[Layer], object], layer: Layer = layer) -> None:
            found.append((name, layer.name, partial(call, layer)))

        def run(method: Method, target: Target) -> Callable[[Layer], object]:
            return partial(first, method, target=target)

        add("floor: product", floor_product)
        for label, target in TARGETS.items():
            add(f"awp {label}, {STEPS} published steps", partial(baseline_awp, target=target))
            add(f"awp {label}, {MORE} steps", run(AWP(Wanda(), iterations=MORE, tolerance=0.0), target))
            add(f"awp {label}, no step", run(AWP(Wanda(), iterations=0, tolerance=0.0), target))
            add(f"frank_wolfe {label}, {STEPS} published steps", partial(baseline_frank_wolfe, target=target))
            add(f"frank_wolfe {label}, {MORE} steps", run(FrankWolfe(Wanda(), KEEP, MORE), target))
            add(f"frank_wolfe {label}, pairwise", run(EXCHANGES, target))
    return found


def shared(size: int) -> list[tuple[str, str, Callable[[], object]]]:
    """ALPS and ADMM on the first layer of a Gram, and on another, as q, k and v have the same one."""
    layer, target = build(size), Target(0.6)
    found: list[tuple[str, str, Callable[[], object]]] = [("floor: spectrum", f"{size}", lambda: floor_spectrum(layer))]
    for method in (ALPS(), ADMM()):
        name, rng = type(method).__name__.lower(), torch.Generator()
        method.compress(layer, target, rng)
        found.append((f"{name}, first of its Gram", f"{size}", partial(first, method, layer, target)))
        found.append((f"{name}, second of its Gram", f"{size}", partial(method.compress, layer, target, rng)))
    return found


def to_the_error(size: int) -> None:
    """Print seconds to the error of whole published runs.

    Frank-Wolfe's published loop is timed over few and some more steps, of which the difference is that of the steps.
    """
    layer, rng = build(size), torch.Generator()
    for label, target in TARGETS.items():
        baseline_frank_wolfe(layer, target)
        taken = []
        for steps in (STEPS, 6 * STEPS):
            start = time.perf_counter()
            baseline_frank_wolfe(layer, target, steps)
            taken.append(time.perf_counter() - start)
        published = 2000 * (taken[1] - taken[0]) / (5 * STEPS)
        for method in (FrankWolfe(Wanda(), KEEP), EXCHANGES):
            start = time.perf_counter()
            result = method.compress(afresh(layer), target, rng)
            seconds = time.perf_counter() - start
            print(
                f"{size:6d}  frank_wolfe {label}, {method.step}: {seconds:.2f} s, {published / seconds:.1f} times less "
                f"than 2000 steps in torch ({published:.0f} s); rounded error {result.info['rounded_objective']:.6g}",
                flush=True,
            )
        plain = AWP(Wanda()).compress(afresh(layer), target, rng).trace
        goal, until = min(error for *_, error in plain), plain[-1][1]
        for step in ("frobenius", "spectral"):
            trace = AWP(Wanda(), step, acceleration="momentum").compress(afresh(layer), target, rng).trace
            t, seconds, error = next((row for row in trace if row[2] <= goal), trace[-1])
            reached = f"{until / seconds:.1f} times less" if error <= goal else "not reached"
            print(
                f"{size:6d}  awp {label}, momentum, {step}: {t} iterations, {seconds:.2f} s to {error:.6g}; plain "
                f"{plain[-1][0]}, {until:.2f} s to {goal:.6g}: {reached}",
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", type=int, default=[1024])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=[""], help="parts of the cases' names")
    parser.add_argument("--errors", action="store_true", help="whole runs instead, to the published error")
    parser.add_argument("--shared", action="store_true", help="ALPS and ADMM instead")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.errors:
        for size in args.sizes:
            to_the_error(size)
        return
    made = [case for size in args.sizes for case in shared(size)] if args.shared else cases(tuple(args.sizes))
    # One thread is timed by its own clock, which stands still while other programs have their turns.
    clock = time.process_time if args.threads == 1 else time.perf_counter
    seconds: dict[tuple[str, str], list[float]] = {}
    for _ in range(args.rounds):
        for name, size, call in made:
            if any(part in name for part in args.only):
                start = clock()
                call()
                seconds.setdefault((size, name), []).append(clock() - start)
    middle = {case: 1000 * statistics.median(taken) for case, taken in seconds.items()}
    for (size, name), taken in middle.items():
        print(f"{size:>6s}  {name:45s} {taken:10.1f} ms")
    for (size, name), taken in middle.items():
        method, found, _ = name.partition(f", {MORE} steps")
        start, product = middle.get((size, f"{method}, no step")), middle.get((size, "floor: product"))
        if found and start and product:
            print(f"{size:>6s}  {method}: an iteration takes {(taken - start) / MORE / product:.2f} bare products")


if __name__ == "__main__":
    main()
