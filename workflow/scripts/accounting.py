"""Bits per weight as stored: the one place that counts them (docs/results.md)."""

import math

from methods.target import Target

FLOAT_BITS = 16  # of a kept weight that is not quantised, and of a scale, a group's or an input's
INDEX_BITS = 16  # of a kept 1xb block


def bits_per_weight(target: Target, kept: float, rows: int, inputs: int, input_scale: bool = False) -> float:
    """Bits stored per weight of a layer [rows, inputs] of which the share `kept` is kept, in [0, 1].

    Kept values: 16 bits, or the codes of `target.bits`. Mask: a bitmap of one bit per weight (row, layer), the index of
    each kept weight in its group (n:m: ceil(log2 m) bits, 2 for 2:4), or 16 bits of column index per kept block (1xb).
    Grid: per group of a row a 16-bit scale and a zero of as many bits as a code (none if symmetric); with blocks no
    longer than a group, of kept blocks only. Where the layer has an input scale (AWQ), 16 bits per input.
    """
    bits = kept * (target.bits or FLOAT_BITS)
    if target.structure in ("row", "layer"):
        bits += 1
    elif target.n_of_m:
        bits += kept * math.ceil(math.log2(target.n_of_m[1]))
    elif target.block:
        bits += kept * INDEX_BITS / target.block
    if target.bits:
        length = min(target.group or inputs, inputs)
        grids = math.ceil(inputs / length) / inputs
        stored = kept if target.block and length <= target.block else 1.0
        bits += stored * grids * (FLOAT_BITS + (0 if target.symmetric else target.bits))
    return bits + (FLOAT_BITS / rows if input_scale else 0)
