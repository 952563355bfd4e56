"""Published loops of the other methods in plain torch, and the floors of methods whose loops are elsewhere.

A baseline takes a layer and a target and returns the compressed weight [out, in]; it spares nothing that the released
code does not spare. A floor is the factorisations and products without which the method cannot be had: products in
float32, factorisations in float64. Where a released code scores with its tokens, the Gram replaces them.
"""

import torch
from torch import Tensor

from layerwise.contract.layer import Layer, Target
from tests.benchmarks.bench_columns import DAMPING, baseline_rtn
from tests.benchmarks.bench_iterative import floor_product, floor_spectrum

ADMM_DAMPING, ADMM_RHO = 0.1, 1.0
ALPS_RHO, ALPS_REFINEMENTS = 0.1, 10
THANOS_BLOCK = 512
CYCLES, THRESHOLD = 50, 0.1  # DSnoT's
RATIOS, RANGES, BATCH = 20, 10, 64  # AWQ's grid, its shrunk ranges, and the rows whose clips it searches at once


def lowest(score: Tensor, count: int) -> Tensor:
    """Mask [out, in], True for the `count` lowest of the layer and what ties with them: a sort of all entries."""
    return score <= torch.sort(score.flatten()).values[count - 1]


def damped(gram: Tensor, damping: float) -> Tensor:
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram))


def baseline_ria(layer: Layer, target: Target) -> Tensor:
    """Relative importance, a = 0.5, compared over the layer."""
    size = layer.weight.abs()
    score = (size / size.sum(0) + size / size.sum(1, keepdim=True)) * layer.gram.diagonal.sqrt() ** 0.5
    return layer.weight.masked_fill(lowest(score, int(target.sparsity * score.numel())), 0.0)


def baseline_dsnot(layer: Layer, target: Target) -> Tensor:
    """The released cycles by row: each row regrows and drops one weight, from whichever end its error asks for."""
    assert layer.statistics is not None
    weight, pruned = layer.weight, int(target.sparsity * layer.weight.shape[1])
    order = torch.sort(weight.abs() * layer.gram.diagonal.sqrt(), dim=1, stable=True).indices
    kept = torch.ones_like(weight, dtype=torch.bool).scatter_(1, order[:, :pruned], False)
    share = weight * layer.statistics.mean  # [out, in] of a weight in its row's expected output
    limit = THRESHOLD * share.norm(dim=1, keepdim=True)
    lost = share.masked_fill(kept, 0.0)
    error = lost.sum(1, keepdim=True)
    grow = torch.sort(lost / layer.statistics.sequence_variance, dim=1, stable=True).indices
    candidates, signs = order[:, pruned:], share.gather(1, order[:, pruned:]).sign()
    drop = [candidates.gather(1, torch.sort(side, dim=1, stable=True).indices) for side in (signs >= 0, signs <= 0)]
    drop = torch.cat([drop[0], drop[1].flip(1)], 1)  # negative shares from the left, positive ones from the right
    grow_at, drop_at = (torch.tensor([0, x.shape[1] - 1]).expand(len(weight), 2).clone() for x in (grow, drop))
    active = torch.ones_like(error, dtype=torch.bool)
    for _ in range(CYCLES):
        sides = (error > 0).long(), (error < 0).long()
        grown = grow.gather(1, grow_at.gather(1, sides[0]))
        dropped = drop.gather(1, drop_at.gather(1, sides[1]))
        after = error + share.gather(1, dropped) - share.gather(1, grown)
        active = active & (error.abs() > limit)
        if not active.any():
            break
        for at, side in ((grow_at, sides[0]), (drop_at, sides[1])):
            at.scatter_add_(1, side, 1 - 2 * side)
        kept.scatter_(1, dropped, kept.gather(1, dropped) & ~active)
        kept.scatter_(1, grown, kept.gather(1, grown) | active)
        error = torch.where(active, after, error)
    return torch.where(kept, weight, 0.0)


def baseline_gqsa(layer: Layer, target: Target) -> Tensor:
    """The paper's saliency, whole blocks and grids; there is no released code to follow."""
    assert target.block is not None
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(layer.gram.matrix, DAMPING)))
    score = layer.weight**2 / inverse.diagonal() ** 2
    blocks = score.unflatten(1, (-1, target.block)).mean(2)
    gone = blocks.topk(int(target.sparsity * blocks.shape[1]), dim=1, largest=False).indices
    kept = torch.ones_like(blocks, dtype=torch.bool).scatter_(1, gone, False).repeat_interleave(target.block, 1)
    values = baseline_rtn(Layer(layer.name, torch.where(kept, layer.weight, 0.0), layer.gram), target)
    return torch.where(kept, values, 0.0)


def asymmetric(weight: Tensor, bits: int) -> Tensor:
    """AWQ's pseudo-quantised weight [..., group]."""
    low, high, most = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True), 2**bits - 1
    scale = (high - low).clamp(min=1e-5) / most
    zero = (-torch.round(low / scale)).clamp(0, most)
    return (torch.clamp(torch.round(weight / scale) + zero, 0, most) - zero) * scale


def baseline_awq(layer: Layer, target: Target) -> Tensor:
    """auto_scale, each ratio by its product with the Gram; auto_clip, entry by entry on 512 tokens as released."""
    assert layer.statistics is not None and target.bits is not None and target.group is not None
    weight, bits, groups = layer.weight, target.bits, (-1, target.group)
    least, best = float("inf"), torch.ones(weight.shape[1])
    for step in range(RATIOS):
        scale = layer.statistics.absmean.pow(step / RATIOS).clamp(min=1e-4)
        scale = scale / (scale.max() * scale.min()).sqrt()
        lost = weight - asymmetric((weight * scale).unflatten(1, groups), bits).flatten(1) / scale
        error = float(((lost @ layer.gram.matrix) * lost).sum())
        if error < least:
            least, best = error, scale
    tokens = (layer.statistics.sample / best).unflatten(1, groups)[None]  # [1, tokens, groups, group]
    pieces = []
    for rows in (weight * best).unflatten(1, groups)[:, None].split(BATCH):  # [rows, 1, groups, group]
        largest = rows.abs().amax(-1, keepdim=True)
        limits, errors = largest.clone(), torch.full_like(largest, float("inf"))
        outputs = (tokens * rows).sum(-1)
        for step in range(RANGES):
            limit = largest * (1 - step / 20)
            tried = asymmetric(rows.clamp(-limit, limit), bits)
            error = ((tokens * tried).sum(-1) - outputs).square().mean(1)[:, None, :, None]
            better = error < errors
            limits, errors = torch.where(better, limit, limits), torch.where(better, error, errors)
        pieces.append(asymmetric(rows.clamp(-limits, limits), bits).flatten(1))
    return torch.cat(pieces) / best


def floor_awq(layer: Layer, target: Target) -> None:
    """A product with the Gram for each ratio, and one with the sample for each range of every group."""
    assert layer.statistics is not None and target.group is not None
    groups = (-1, target.group)
    weight, tokens = (x.unflatten(1, groups).transpose(0, 1) for x in (layer.weight, layer.statistics.sample))
    for _ in range(RATIOS):
        floor_product(layer)
    for _ in range(RANGES):
        torch.matmul(weight, tokens.mT)


def baseline_admm(layer: Layer, target: Target, iterations: int = 20) -> Tensor:
    """The released iterations in float32 over a layer at the full sparsity, the mask chosen in the first three
    quarters."""
    norm = layer.gram.diagonal.sqrt() + 1e-8
    gram = damped(layer.gram.matrix / norm / norm[:, None], ADMM_DAMPING)
    inverse = torch.inverse(gram + ADMM_RHO * torch.eye(len(gram)))
    weight = layer.weight * norm
    aim, dual, kept = weight @ gram, torch.zeros_like(weight), torch.ones_like(weight, dtype=torch.bool)
    for iteration in range(iterations):
        if iteration < 3 * iterations // 4:
            lowest = (weight + dual).abs().flatten().topk(int(target.sparsity * weight.numel()), largest=False)
            kept = torch.ones(weight.numel(), dtype=torch.bool)
            kept[lowest.indices] = False
            kept = kept.view_as(weight)
        split = (weight + dual) * kept
        dual = dual + (weight - split)
        weight = (aim + ADMM_RHO * (split - dual)) @ inverse
    return (weight + dual) * kept / norm


def floor_admm(layer: Layer, iterations: int) -> None:
    """One inverse by Cholesky and a product per iteration."""
    torch.cholesky_inverse(torch.linalg.cholesky(damped(layer.gram.matrix, ADMM_DAMPING).double()))
    for _ in range(iterations):
        floor_product(layer)


def baseline_alps(layer: Layer, target: Target, iterations: int = 300) -> Tensor:
    """The released iterations over a layer, and conjugate gradients on the support.

    As there: eigenvalues and inverses in float64, the other products in float32, the penalty by the change of the
    support, and every third iteration the error of the projected B, which is printed and not used.
    """
    gram = damped(layer.gram.matrix, DAMPING)
    norm = gram.diagonal().sqrt()
    gram, dense = gram / norm / norm[:, None], layer.weight * norm
    values, vectors = torch.linalg.eigh(gram.double())
    aim, weight, dual, rho, moved = dense @ gram, dense, torch.zeros_like(dense), ALPS_RHO, False
    gone = int(target.sparsity * dense.numel())
    kept = dense.numel() - gone

    def projected(matrix: Tensor) -> Tensor:
        flat = matrix.flatten()
        flat[(-(flat**2)).topk(gone).indices] = 0
        return flat.view_as(matrix)

    def inverse() -> Tensor:
        return (vectors / (values + rho) @ vectors.T).float()

    start = split = projected(dense)
    seen, inverted = split != 0, inverse()
    for iteration in range(1, iterations + 1):
        weight = (aim - dual + rho * split) @ inverted
        split = projected((dual + rho * weight) / rho)
        dual = dual + rho * (weight - split)
        if iteration % 3:
            continue
        changed, seen = int(((split != 0) != seen).sum()), split != 0
        if changed > 0.005 * kept:
            moved, rho = True, rho * (1.3 if changed > 0.1 * kept else 1.2)
        elif changed:
            rho = rho * 1.1 if moved else rho / 5
            split, dual = (split, dual) if moved else (start, torch.zeros_like(dual))
        elif moved:
            break
        else:
            rho = rho / 5
        inverted, tried = inverse(), projected(weight)
        ((tried @ gram - aim) @ (tried - dense).T).diagonal().sum()
        if iteration > 30 and changed < 0.0003 * kept:
            break
    weight = projected(weight)
    support = weight != 0
    residual = (aim - weight @ gram) * support
    direction, size = residual, residual.square().sum(1, keepdim=True)
    for _ in range(ALPS_REFINEMENTS):
        image = direction @ gram
        length = size / (direction * image).sum(1, keepdim=True).clamp(min=1e-30)
        weight, residual = weight + length * direction, (residual - length * image) * support
        before, size = size, residual.square().sum(1, keepdim=True)
        direction = residual + size / before.clamp(min=1e-30) * direction
    return weight / norm


def floor_alps(layer: Layer, iterations: int) -> None:
    """The spectrum, and a product per iteration and refinement."""
    floor_spectrum(layer)
    for _ in range(iterations + ALPS_REFINEMENTS):
        floor_product(layer)


def kept_by_wanda(layer: Layer, target: Target) -> Tensor:
    """Mask [out, in] by topk."""
    score = layer.weight.abs() * layer.gram.diagonal.sqrt()
    gone = score.topk(int(target.sparsity * score.shape[1]), dim=1, largest=False).indices
    return torch.ones_like(score, dtype=torch.bool).scatter_(1, gone, False)


def baseline_reconstruct(layer: Layer, target: Target) -> Tensor:
    """Normal equations of Wanda's support, solved row by row in float64."""
    gram, found = damped(layer.gram.matrix.double(), 1e-4), torch.zeros_like(layer.weight)
    for row, weight, mask in zip(found, layer.weight, kept_by_wanda(layer, target), strict=True):
        aim = (weight.double() @ gram)[mask]
        row[mask] = torch.linalg.solve(gram[mask][:, mask], aim).float()
    return found


def floor_reconstruct(layer: Layer, target: Target) -> None:
    """One Cholesky factor per row."""
    kept = layer.weight.shape[1] - int(target.sparsity * layer.weight.shape[1])
    matrix = damped(layer.gram.matrix, DAMPING)[:kept, :kept].double()
    for _ in layer.weight:
        torch.linalg.cholesky(matrix)


def baseline_thanos(layer: Layer, target: Target) -> Tensor:
    """Blocks of 512 columns; the lowest Wanda scores of all that is left, removed row by row in float64."""
    gram, weight = damped(layer.gram.matrix.double(), DAMPING), layer.weight.double()
    norm, gone = layer.gram.diagonal.double().sqrt(), 0
    for start in range(0, weight.shape[1], THANOS_BLOCK):
        inverse, left = torch.linalg.inv(gram[start:, start:]), weight[:, start:]
        lost = lowest(left.abs() * norm[start:], int(target.sparsity * weight.numel()) - gone)[:, :THANOS_BLOCK]
        for row, chosen in zip(left, lost, strict=True):
            own = torch.nonzero(chosen)[:, 0]
            row -= torch.linalg.solve(inverse[own][:, own], row[own]) @ inverse[own]
            row[own] = 0.0
        gone += int(lost.sum())
    return weight.float()


def floor_thanos(layer: Layer, target: Target) -> None:
    """One Cholesky factor per row and block, of what the row loses in it."""
    gram = damped(layer.gram.matrix.double(), DAMPING)
    for start in range(0, len(gram), THANOS_BLOCK):
        lost = int(target.sparsity * min(THANOS_BLOCK, len(gram) - start))
        for _ in layer.weight:
            torch.linalg.cholesky(gram[start : start + lost, start : start + lost])
