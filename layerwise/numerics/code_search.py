"""Best changes of a row's codes, one or two codes at a time, until no change lowers the row's loss.

With E = W_hat - W and v the step of entry j, changing its code by d changes the row's loss E G E^T by
2 d v (E G)_j + d^2 v^2 G_jj, which is least at the whole number nearest to -(E G)_j / (v G_jj). A change of two codes
adds 2 v_u v_p G_up to the sum of both changes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor

from layerwise.kernels import code_search as kernel
from layerwise.kernels.code_state import TOLERANCE, CodeState
from layerwise.numerics import dispatch
from layerwise.numerics.swap_search import RowSearch


def change_rounds(
    rows: CodeState, pairs: bool, most_changes: int | None
) -> Iterator[tuple[int, float, float, tuple[int, int]]]:
    """Rounds in which every row that can improve changes its codes, at most `most_changes` times (None: no limit).

    A row makes the best change of one code, by any number of steps. If none helps and `pairs` is true, it makes the
    best change of two codes by one step each. After some rounds it yields the largest number of changes in a row, the
    seconds since the call, the loss of all rows, and the numbers of single and double changes since the last yield.
    It is compiled on a CPU and runs in torch elsewhere. The changes are the same, except for ties on devices whose
    minimum picks any of the equal entries.
    """
    return (kernel.change_rounds if dispatch.use_compiled(rows.coupling) else reference_rounds)(
        rows, pairs, most_changes
    )


def reference_rounds(
    rows: CodeState, pairs: bool, most_changes: int | None
) -> Iterator[tuple[int, float, float, tuple[int, int]]]:
    """As `change_rounds`, in torch on any device."""
    start, changes = time.perf_counter(), CodeChanges(rows)
    left = torch.arange(len(rows.codes), device=rows.codes.device)  # rows that may still improve
    made, counts = 0, [0, 0]
    while len(left) and (most_changes is None or made < most_changes):
        one = changes.one(left)
        rest = left[~one]
        two = changes.two(rest) if pairs and len(rest) else torch.zeros_like(rest, dtype=torch.bool)
        left = torch.cat([left[one], rest[two]]).sort().values
        if not len(left):
            break
        made += 1
        counts = [counts[0] + int(one.sum()), counts[1] + int(two.sum())]
        if made % kernel.ROUNDS == 0 or made == most_changes:
            yield made, time.perf_counter() - start, float(rows.loss.sum()), (counts[0], counts[1])
            counts = [0, 0]
    if sum(counts):
        yield made, time.perf_counter() - start, float(rows.loss.sum()), (counts[0], counts[1])


class CodeChanges:
    """Changes in some of the rows, in torch."""

    def __init__(self, rows: CodeState) -> None:
        self.rows, self.gram = rows, rows.gram.double()
        self.diagonal = self.gram.diagonal()
        self.step = rows.scales.double()[:, rows.group_of] / rows.input_scale.double()  # [rows, in]
        self.alone = self.step * self.step * self.diagonal
        free = rows.movable & (self.alone > 0)
        self.inverse = torch.where(free, 1 / (self.step * self.diagonal), 0.0)
        # A move is a step up or down. SparseSwaps' search treats two moves as its exchange, with the Gram negated and
        # without correlation between moves of the same input.
        tiled = (-rows.gram).fill_diagonal_(0.0).repeat(2, 2)
        self.search = MoveSearch(tiled, rows.gram)

    def one(self, left: Tensor) -> Tensor:
        """Change one code in each row of `left` if that is an improvement; returns [left] bool, True where it was."""
        rows, coupling = self.rows, self.rows.coupling[left]
        code = rows.codes[left].double()
        by = (-coupling * self.inverse[left]).round().maximum(-code).minimum(rows.most - code)
        change = by * (2 * self.step[left] * coupling + by * self.alone[left])
        least, j = change.min(1)
        line = torch.arange(len(left), device=left.device)
        by = by[line, j]
        delta = self.delta(left, j, by)
        own = delta * delta * self.diagonal[j]
        change = 2 * delta * coupling[line, j] + own
        better = (least < 0) & (change < -TOLERANCE * own) & (rows.loss[left] + change < rows.loss[left])
        left, j, by, delta = left[better], j[better], by[better], delta[better]
        self.set(left, j, by)
        rows.coupling[left] += delta[:, None] * self.gram[j]
        rows.loss[left] += change[better]
        return better

    def two(self, left: Tensor) -> Tensor:
        """The same for two codes, by one step each."""
        rows, coupling, inputs = self.rows, self.rows.coupling[left], len(self.gram)
        both, alone, code = 2 * self.step[left] * coupling, self.alone[left], rows.codes[left]
        free = self.inverse[left] > 0
        up = torch.where(free & (code < rows.most), alone + both, torch.inf)
        down = torch.where(free & (code > 0), alone - both, torch.inf)
        cost, step = torch.cat([up, down], 1).float(), self.step[left].float()
        u, p = self.search(cost, cost, torch.cat([step, -step], 1))
        i, k = u % inputs, p % inputs
        by, and_by = (1 - 2 * (move // inputs) for move in (u, p))
        line = torch.arange(len(left), device=left.device)
        found = (i != k) & torch.isfinite(cost[line, u] + cost[line, p])
        by, and_by = (torch.where(found, x, 0).double() for x in (by, and_by))  # otherwise beyond the codes
        one, other = self.delta(left, i, by), self.delta(left, k, and_by)
        own_one, own_other = one * one * self.diagonal[i], other * other * self.diagonal[k]
        change = (2 * one * coupling[line, i] + own_one) + (2 * other * coupling[line, k] + own_other)
        change += 2 * one * other * self.gram[i, k]
        better = found & (change < -TOLERANCE * (own_one + own_other)) & (rows.loss[left] + change < rows.loss[left])
        left, i, k, one, other = (x[better] for x in (left, i, k, one, other))
        self.set(left, i, by[better])
        self.set(left, k, and_by[better])
        rows.coupling[left] += one[:, None] * self.gram[i] + other[:, None] * self.gram[k]
        rows.loss[left] += change[better]
        return better

    def delta(self, left: Tensor, j: Tensor, by: Tensor) -> Tensor:
        """[left] float64, the change of the values of entries j when their codes change."""
        rows, group = self.rows, self.rows.group_of[j]
        scale, zero, code = rows.scales[left, group], rows.zeros[left, group], rows.codes[left, j]
        before, after = (scale * (c - zero) / rows.input_scale[j] for c in (code.float(), (code + by).float()))
        return after.double() - before.double()

    def set(self, left: Tensor, j: Tensor, by: Tensor) -> None:
        self.rows.codes[left, j] = (self.rows.codes[left, j] + by).to(torch.uint8)


class MoveSearch(RowSearch):
    """Best pair of moves of each row; tiled: [2 in, 2 in], gram: [in, in]."""

    def __init__(self, tiled: Tensor, gram: Tensor) -> None:
        super().__init__(tiled)
        root = gram.diagonal().clamp(min=0).sqrt().clamp(min=1e-30)
        self.root = root.repeat(2)
        self.steepest = (gram.abs() / root).fill_diagonal_(0.0).amax(1).repeat(2)
