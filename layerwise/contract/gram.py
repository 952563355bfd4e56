"""The second moment of a layer's inputs, with factors that layers and methods share."""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from layerwise.contract.cholesky import inverse_of_lower, reversed_cholesky
from layerwise.contract.second_moment import CrossMoment, SecondMoment

DAMPING_GROWTH = 10.0  # a failed factorisation is repeated with this many times the damping ...
LARGEST_DAMPING = 100.0  # ... until it is this many times the mean of the diagonal


class Gram:
    """Second moment of a layer's inputs, shared by all layers and methods that see the same inputs.

    matrix: [in, in] float32, mean of x xt over the tokens, UNDAMPED. tokens: number of tokens in the mean.
    cross: [in, in] float32, the cross-Gram C, mean of x0 xt, where x0 are the inputs of the same tokens in the dense
    model and x those in the compressed model. A row belongs to an input in the dense model, a column to one in the
    compressed model.
    dense: [in, in] float32, mean of x0 x0t.
    Without cross and dense, x are the dense model's own inputs, and both equal the matrix itself. If `drifted` is set,
    x comes from a partly compressed model whose dense inputs are not known. Quantities that depend only on these
    matrices are computed once and cached, so that q, k and v share one factorisation.
    """

    def __init__(
        self,
        matrix: Tensor,
        tokens: int,
        cross: Tensor | None = None,
        dense: Tensor | None = None,
        *,
        drifted: bool = False,
    ) -> None:
        """Raises ValueError if only one of cross and dense is given, and if tokens is not a whole number >= 1."""
        if (cross is None) != (dense is None):
            given = "cross" if dense is None else "dense"
            raise ValueError(f"cross and dense must be given together. Got {given} alone instead.")
        self.matrix = matrix
        self.tokens = whole_number(tokens, "tokens")
        self.apart = cross is not None  # whether x0 and x were distinguished
        self.knows_dense = self.apart or not drifted
        self._cross = cross if self.apart or drifted else matrix
        self._dense = dense if self.apart or drifted else matrix
        self._kept: dict[Hashable, Any] = {}

    def __repr__(self) -> str:
        shape, dtype = getattr(self.matrix, "shape", ()), str(getattr(self.matrix, "dtype", "no dtype"))
        known = ", with cross and dense" if self.apart else "" if self.knows_dense else ", drifted"
        size = shape[-1] if shape else "no"
        return f"Gram({size} inputs, {self.tokens} tokens, {dtype.removeprefix('torch.')}{known})"

    @classmethod
    def from_inputs(cls, x: Tensor, dense_inputs: Tensor | None = None) -> Gram:
        """The Gram of a layer's inputs x, of any float dtype.

        x: [tokens, in] or [..., in], such as [sequences, length, in].
        dense_inputs: the inputs of the same tokens in the dense model, of x's shape, if x comes from a compressed
            model; for methods that need the cross-Gram. None: x are the dense model's inputs.
        Products over at most 4096 tokens are in float32, and their sums are accumulated in float64. Matrices are on x's
        device.
        Raises ValueError for inputs that are empty, not floating point or not finite, or whose squares overflow
        float32, and for dense_inputs of another shape or on another device.
        """
        _check_inputs(x, "x")
        moment = SecondMoment(x.shape[-1], x.device)
        moment.update(x.flatten(0, -2))
        matrix = _checked_moment(moment.finish(), x, "x")
        if dense_inputs is None:
            return cls(matrix, moment.tokens)
        _check_inputs(dense_inputs, "dense_inputs")
        if dense_inputs.shape != x.shape or dense_inputs.device != x.device:
            came = f"{list(dense_inputs.shape)} on {dense_inputs.device}"
            raise ValueError(f"dense_inputs must be {list(x.shape)} on {x.device}, like x. Got {came} instead.")
        own, both = SecondMoment(x.shape[-1], x.device), CrossMoment(x.shape[-1], x.device)
        own.update(dense_inputs.flatten(0, -2))
        both.update(dense_inputs.flatten(0, -2), x.flatten(0, -2))
        dense = _checked_moment(own.finish(), dense_inputs, "dense_inputs")
        return cls(matrix, moment.tokens, both.finish(), dense)

    @property
    def cross(self) -> Tensor:
        """[in, in] C, mean of x0 xt (row: input in the dense model, column: in the compressed one).

        It is the matrix itself if x are the dense model's inputs. Raises ValueError if the dense inputs are not known.
        """
        return self._known(self._cross)

    @property
    def dense(self) -> Tensor:
        """[in, in] mean of x0 x0t; like `cross`."""
        return self._known(self._dense)

    def _known(self, matrix: Tensor | None) -> Tensor:
        if matrix is None:
            raise ValueError(
                "The cross-Gram must be collected beside the Gram (`cross_gram` in `needs` of the method's card). "
                "Got only the inputs of a compressed model instead."
            )
        return matrix

    @cached_property
    def diagonal(self) -> Tensor:
        """[in] mean squared activation of each input."""
        return self.matrix.diagonal()

    @cached_property
    def dead(self) -> Tensor:
        """[in] bool, the inputs that are zero on every token."""
        return self.diagonal == 0

    @cached_property
    def largest_eigenvalue(self) -> float:
        """The largest eigenvalue by Lanczos' method with full orthogonalisation, at most 1e-9 (relative) above the true
        one."""
        matrix, rng = self.matrix.double(), torch.Generator().manual_seed(0)
        image = torch.randn(len(matrix), dtype=matrix.dtype, generator=rng).to(matrix.device)
        vectors, diagonal, beside, value = torch.empty(0, len(matrix)).to(matrix), [], [float(image.norm())], 0.0
        while len(diagonal) < len(matrix) and beside[-1] > 0:
            vectors = torch.cat([vectors, image[None] / beside[-1]])
            image = matrix @ vectors[-1]
            diagonal.append(float(image @ vectors[-1]))
            for _ in range(2):
                image = image - vectors.T @ (vectors @ image)
            beside.append(float(image.norm()))
            small = [torch.tensor(x, dtype=torch.float64) for x in (diagonal, beside[1:-1])]
            values, found = torch.linalg.eigh(small[0].diag() + small[1].diag(-1))
            value = float(values[-1])
            residual = beside[-1] * abs(float(found[-1, -1]))  # an eigenvalue lies within this distance
            if residual <= 1e-9 * value:
                return value + residual
        return value

    def once(self, key: Hashable, compute: Callable[[], Any]) -> Any:
        """The value of compute(), cached from the first call with this key. It must depend only on the matrices and the
        key."""
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]

    def descending(self, dead_diagonal: float | None = None) -> tuple[Tensor, Gram]:
        """Order [in] of the inputs by decreasing diagonal, ties by index, and the Gram of the inputs in that order.

        dead_diagonal: diagonal to use for a dead input; None puts dead inputs last.
        """
        return self.once(("descending", dead_diagonal), lambda: self._descend(dead_diagonal))

    def _descend(self, dead_diagonal: float | None) -> tuple[Tensor, Gram]:
        diagonal = self.diagonal.double()  # float64, in which dead_diagonal is exact
        order = torch.where(self.dead, dead_diagonal or 0.0, diagonal).argsort(descending=True, stable=True)
        matrices = [self.matrix, *((self.cross, self.dense) if self.apart else ())]
        matrix, *known = (own[order][:, order] for own in matrices)
        return order, Gram(matrix, self.tokens, *known, drifted=not self.knows_dense)

    def factor(self, damping: float, dead_diagonal: float | None = None) -> tuple[Tensor, float]:
        """Lower M [in, in] float32 with Mt M = G + damping * mean(diagonal) I, and the damping used.

        dead_diagonal: value of a dead input in the mean of the diagonal. None counts it as zero, so that the factor
        does not depend on the scale of G. A failed factorisation is repeated with ten times the damping.
        Raises ValueError when no damping up to 100 times the mean helps, which means that G is not finite.
        """
        return self.once(("factor", damping, dead_diagonal), lambda: self._factorise(damping, dead_diagonal))

    def inverse_factor(self, damping: float, dead_diagonal: float | None = None) -> tuple[Tensor, float]:
        """Upper U = M^-t [in, in] float32 with Ut U = inverse of the damped Gram, and the damping used; as `factor`."""
        lower, used = self.factor(damping, dead_diagonal)
        return self.once(("inverse factor", damping, dead_diagonal), lambda: inverse_of_lower(lower).T), used

    def _factorise(self, damping: float, dead_diagonal: float | None) -> tuple[Tensor, float]:
        diagonal = self.diagonal.double()
        if dead_diagonal is not None:
            diagonal[self.dead] = dead_diagonal
        mean = float(diagonal.mean()) or 1.0
        # A dead input is coupled to no other input, so any positive diagonal affects only itself.
        diagonal[diagonal == 0] = mean
        used = damping
        while used <= LARGEST_DAMPING:
            lower = reversed_cholesky(self.matrix, diagonal + used * mean)
            if lower is not None:
                return lower, used
            used = max(used * DAMPING_GROWTH, 1e-8)
        raise ValueError(f"Gram.factor found no damping up to {LARGEST_DAMPING:g} that factorises the matrix.")


def _check_inputs(x: Tensor, name: str) -> None:
    """Raise ValueError if x are not inputs of a layer."""
    if not isinstance(x, Tensor) or x.ndim < 2 or not x.numel():
        came = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor [tokens, in] or [..., in] that is not empty. Got {came} instead.")
    if not x.is_floating_point():
        raise ValueError(f"{name} must be floating point. Got {x.dtype} instead.")
    check_dense(x, name)


def whole_number(value: Any, name: str, least: int = 1) -> int:
    """The value as an int, also from NumPy or torch. Raises ValueError if it is not a whole number >= least."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least:
        raise ValueError(f"{name} must be a whole number, at least {least}. Got {value!r} instead.")
    return number


def check_dense(tensor: Tensor, name: str) -> None:
    """Raise ValueError for a sparse tensor, and for one on the meta device."""
    if tensor.is_meta or tensor.layout != torch.strided:
        came = "a tensor on the meta device" if tensor.is_meta else str(tensor.layout)
        raise ValueError(f"{name} must be a dense tensor that holds values. Got {came} instead.")


def _checked_moment(matrix: Tensor, x: Tensor, name: str) -> Tensor:
    """The second moment of x. Raises ValueError if it is not finite; any NaN or Inf in x makes it so."""
    if not torch.isfinite(matrix).all():
        came = "squares beyond float32" if torch.isfinite(x).all() else "NaN or Inf"
        raise ValueError(f"{name} must be finite, and so must its squares in float32. Got {came} instead.")
    return matrix
