"""AWQ: scale the inputs that matter, round to nearest, divide by the scale again; then clip the ranges (Lin et al.).

An input's weights are rounded more finely when they are multiplied by s > 1 before rounding and divided by s after it.
s = (mean |x|)^ratio, with the ratio of smallest output error (equations 4 and 5). Clipping searches, for every row and
group by itself, the range of smallest output error on a sample of the inputs.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from layerwise.contract.layer import Compressed, Layer, Method, Target
from layerwise.numerics import ops

CARD = {
    "title": "AWQ",
    "paper": "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    "arxiv": "2306.00978",
    "code": "https://github.com/mit-han-lab/llm-awq",
    "patterns": ["dense"],
    "bits": [2, 3, 4, 5, 6, 7, 8, "nvfp4", "mxfp4"],
    "updates_weights": True,
    "needs": ["gram", "absmean", "sample"],
    "keeps_zeros": True,
    "cost": {"weights": 24.6, "grams": 4.7, "products": 73.0},
    "look": {"colour": "#0072B2", "marker": "X"},
    "checks": {"variants": [{"grid": 4, "clip": False}, {"convention": "official"}]},
    "parameters": {
        "grid": {"type": "integer", "minimum": 1, "description": "Ratios tried, k / grid; 1 leaves inputs unscaled."},
        "clip": {"type": "boolean", "description": "Also clip ranges, in every layer (released code: not in q and k)."},
        "convention": {
            "enum": ["exact", "official"],
            "description": "exact: free of the scales of activations and weights, 0 in every range, clipping where it "
            "lowers the layer's error. official: the released code's floors of 1e-4 on (mean |x|)^ratio and 1e-5 on "
            "a range, ranges that may leave 0 out, clipping in any case.",
        },
    },
}
FLOOR = 1e-4  # of (mean |x|)^ratio, for dead inputs
SHRUNK = [1 - step / 20 for step in range(10)]  # shares of a range that clipping tries, as in the released code


@dataclass(frozen=True)
class AWQ(Method):
    """W_hat = Q(W s) / s, s = (mean |x|)^ratio in units of the root of its largest times its smallest entry.

    Ratio 0 is rounding to nearest, so that the exact convention is never worse than `rtn`. A pruned weight stays zero:
    it puts 0 into its group's range, and every zero point is a code.
    info: `ratio`, and `clip`, the limits [out, groups] of |W s|, None where nothing is clipped.
    Precondition: `layer.statistics`.
    """

    grid: int = 20
    clip: bool = True
    convention: str = "exact"

    def solve(self, layer: Layer, target: Target, rng: torch.Generator) -> Compressed:
        if layer.statistics is None:
            raise ValueError(f"awq needs absmean and sample, but {layer.name} has no statistics.")
        official = self.convention == "official"
        weight, unit = ops.normalised(layer.weight)
        gram, _ = ops.normalised(layer.gram.matrix)

        def loss(result: Compressed) -> float:
            lost = weight - ops.scaled(result.weight, 1 / unit)
            return float(ops.inner(lost @ gram, lost).sum())

        scales = [input_scale(layer.statistics.absmean, step / self.grid, official) for step in range(self.grid)]
        losses = [loss(quantise_scaled(layer.weight, scale, target, official)) for scale in scales]
        step = min(range(self.grid), key=losses.__getitem__)  # of equal losses the first
        scale, limits = scales[step], None
        best = quantise_scaled(layer.weight, scale, target, official)
        if self.clip:
            sample, _ = ops.normalised(layer.statistics.sample)
            tried = clip_limits(layer.weight * scale, sample / scale, unit, target, official)
            clipped = quantise_scaled(layer.weight, scale, target, official, tried)
            if official or loss(clipped) < losses[step]:
                best, limits = clipped, tried
        return replace(best, info={"ratio": step / self.grid, "clip": limits})


def input_scale(absmean: Tensor, ratio: float, official: bool) -> Tensor:
    """s [in] float32 of a ratio; exact: mean |x| [in] in units of its mean over the inputs, which leaves s as it is."""
    unit = 1.0 if official else float(absmean.double().mean()) or 1.0
    scale = ops.scaled(absmean, 1 / unit).pow(ratio).clamp(min=FLOOR)
    return scale / (scale.max() * scale.min()).sqrt()


def quantise_scaled(
    weight: Tensor, scale: Tensor, target: Target, official: bool, limits: Tensor | None = None
) -> Compressed:
    """Q(W s) / s of weight [out, in] and scale [in], W s clipped to +-limits [out, groups] first."""
    group_of = ops.groups_of(weight.shape[1], target.group, weight.device)
    scaled = weight * scale
    if limits is not None:
        scaled = scaled.clamp(-limits[:, group_of], limits[:, group_of])
    fit = ops.official_awq_grid if official and target.has_zeros else ops.fit_grid
    grid = fit(scaled, target)
    quantised = grid.quantised(grid.codes(scaled, group_of), input_scale=scale)
    return Compressed(ops.quantised_values(quantised, target), quantised=quantised)


def clip_limits(weight: Tensor, sample: Tensor, unit: float, target: Target, official: bool) -> Tensor:
    """[out, groups] limits of |W s|: of the shrunk ranges that of smallest output error on the sample, first best wins.

    weight: W s [out, in]. sample: x / s [rows, in]. unit: of the weight, so that squares neither over- nor underflow.
    """
    length = target.group or weight.shape[1]
    largest = torch.stack([piece.abs().amax(1) for piece in weight.split(length, 1)], 1)  # [out, groups]
    limits, least = largest, torch.full_like(largest, float("inf"), dtype=torch.float64)
    for share in SHRUNK:
        clipped = quantise_scaled(weight, torch.ones_like(weight[0]), target, official, share * largest)
        lost = ops.scaled(weight - clipped.weight, 1 / unit)
        errors = []
        for piece, inputs in zip(lost.split(length, 1), sample.split(length, 1), strict=True):
            missing = piece.contiguous() @ inputs.T  # [out, rows]
            errors.append(ops.inner(missing, missing))
        error = torch.stack(errors, 1)
        limits, least = torch.where(error < least, share * largest, limits), torch.minimum(error, least)
    return limits
