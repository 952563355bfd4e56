"""A plain implementation of the layer problem: its error, and the best error of any mask of a small layer."""

from __future__ import annotations

import itertools

import torch

from layerwise.contract.layer import Layer, Target


def output_error(layer: Layer, weight: torch.Tensor) -> float:
    gram, dense = layer.gram.matrix.double(), layer.weight.double()
    lost = dense - weight.double()
    return float(((lost @ gram) * lost).sum() / ((dense @ gram) * dense).sum())


def best_error_of_rank(layer: Layer, rank: int) -> float:
    """Smallest output_error of all matrices of a rank, from the truncated SVD of W times a root of G."""
    weight, gram = layer.weight.double(), layer.gram.matrix.double()
    values, vectors = torch.linalg.eigh(gram)
    sizes = torch.linalg.svdvals(weight @ (vectors * values.clamp(min=0).sqrt()) @ vectors.T).square()
    return float(sizes[rank:].sum() / sizes.sum())


def best_error(layer: Layer, target: Target, refit: bool) -> float:
    """Smallest output_error of all masks of the target, with W's own weights or (refit) the best ones for the mask."""
    weight, gram = layer.weight.double(), layer.gram.matrix.double()
    inputs = weight.shape[1]

    def lost(row: torch.Tensor, pruned: list[int]) -> float:
        """Quadratic loss of a row without the inputs `pruned`."""
        if not pruned:
            return 0.0
        kept = [j for j in range(inputs) if j not in pruned]
        part = gram[pruned][:, pruned]
        if refit:  # Schur complement: the kept weights compensate as far as they can
            part = part - gram[pruned][:, kept] @ torch.linalg.solve(gram[kept][:, kept], gram[kept][:, pruned])
        return float(row[pruned] @ part @ row[pruned])

    if target.pattern == "layer":
        entries = list(itertools.product(range(len(weight)), range(inputs)))
        choices = itertools.combinations(entries, int(target.sparsity * weight.numel()))
        best = min(
            sum(lost(row, [j for i, j in choice if i == index]) for index, row in enumerate(weight))
            for choice in choices
        )
    else:
        best = sum(min(lost(row, pruned) for pruned in pruned_sets(inputs, target)) for row in weight)
    return float(best / ((weight @ gram) * weight).sum())


def pruned_sets(inputs: int, target: Target) -> list[list[int]]:
    """Every set of inputs that a row may lose."""
    if target.n_of_m is None:
        return [list(chosen) for chosen in itertools.combinations(range(inputs), int(target.sparsity * inputs))]
    kept, of = target.n_of_m
    groups = [itertools.combinations(range(start, start + of), of - kept) for start in range(0, inputs, of)]
    return [list(itertools.chain(*chosen)) for chosen in itertools.product(*groups)]
