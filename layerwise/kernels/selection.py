"""Masks of the largest scores of each line or group; among equal scores the lowest indices are pruned first.

Floats are compared as integers: after the bits of negative floats are reflected, bits are ordered like floats.
"""

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor, from_numpy

from layerwise.kernels.rows import array, by_rows, compiled, empty

KEYS_AT_ONCE = 2**10  # number of keys reflected at once
LONG_LINE = 2**15  # number of entries from which a line is split between threads
SAMPLE = 2**14  # number of entries that estimate the threshold of a long line


@compiled()
def _to_order(keys):
    """Convert bits of floats to integers in the order of the floats, in place; both zeros are equal."""
    reflected = -np.int64(2 ** (8 * keys.itemsize - 1) - 1) - 1
    for i in range(len(keys)):
        keys[i] = keys[i] if keys[i] >= 0 else reflected - keys[i]


@compiled()
def _count_below(keys, bound):
    count = np.int32(0)
    for i in range(len(keys)):
        count = np.int32(count + np.int32(keys[i] < bound))
    return np.int64(count)


@compiled()
def _cut(keys, n_pruned):
    """(key, ties): the `n_pruned` smallest of the keys are those below `key` and the first `ties` of those equal to it.

    Secant steps on the number of keys below a bound, every third one a bisection.
    """
    lowest, highest = keys[0], keys[0]
    for i in range(len(keys)):
        lowest, highest = min(lowest, keys[i]), max(highest, keys[i])
    low, high = np.int64(lowest), np.int64(highest) + 1  # low <= all keys < high
    below_low, below_high = np.int64(0), np.int64(len(keys))
    bound, step = np.empty(1, keys.dtype), 0
    while below_low < n_pruned < below_high and high - low != 1:
        width = high - low
        share = 0.5 if step % 3 == 2 else (n_pruned - below_low) / (below_high - below_low)
        if width > 0:
            bound[0] = low + min(max(np.int64(share * width), 1), width - 1)
        else:  # beyond 64-bit integers
            bound[0] = (low >> 1) + (high >> 1)
        below = _count_below(keys, bound[0])
        if below <= n_pruned:
            low, below_low = np.int64(bound[0]), below
        else:
            high, below_high = np.int64(bound[0]), below
        step += 1
    if below_high == n_pruned:
        return high, np.int64(0)
    return low, n_pruned - below_low


@compiled()
def _mark(keys, key, ties, mask):
    """Write True where a key is above the threshold."""
    bound = np.empty(1, keys.dtype)
    bound[0] = key
    bound = bound[0]
    for i in range(len(keys)):
        mask[i] = keys[i] >= bound
    i = 0
    while ties > 0:
        if keys[i] == bound:
            mask[i] = False
            ties -= 1
        i += 1


@compiled(["(i4[:, ::1], i8, b1[:, ::1], i8, i8)", "(i8[:, ::1], i8, b1[:, ::1], i8, i8)"])
def _lines(bits, n_pruned, mask, first, last):
    keys = np.empty(bits.shape[1], bits.dtype)
    for row in range(first, last):
        keys[:] = bits[row]
        _to_order(keys)
        key, ties = _cut(keys, n_pruned)
        _mark(keys, key, ties, mask[row])


@compiled(["(f4[:, ::1], f4[::1], i8, f4[:, ::1], b1[:, ::1], i8, i8)"])
def _prune_lines(weight, norm, n_pruned, values, mask, first, last):
    scores = np.empty(weight.shape[1], np.float32)
    keys = scores.view(np.int32)  # no score is negative: the bits are in order
    for row in range(first, last):
        for i in range(len(scores)):
            scores[i] = abs(weight[row, i] * norm[i])
        key, ties = _cut(keys, n_pruned)
        _mark(keys, key, ties, mask[row])
        for i in range(len(scores)):
            values[row, i] = weight[row, i] if mask[row, i] else np.float32(0)


@compiled()
def _mark_groups(keys, group_size, n_pruned, by_place, ranks, mask):
    """Write False at the `n_pruned` smallest of each `group_size` consecutive keys; all groups are complete."""
    groups = len(keys) // group_size
    for e in range(group_size):
        for g in range(groups):
            by_place[e, g] = keys[g * group_size + e]
    for e in range(group_size):
        ranks[:groups] = 0
        for f in range(group_size):
            if f < e:
                for g in range(groups):
                    ranks[g] += by_place[f, g] <= by_place[e, g]
            else:
                for g in range(groups):
                    ranks[g] += by_place[f, g] < by_place[e, g]
        for g in range(groups):
            mask[g * group_size + e] = ranks[g] >= n_pruned


@compiled(["(i4[:, ::1], i8, i8, b1[:, ::1], i8, i8)", "(i8[:, ::1], i8, i8, b1[:, ::1], i8, i8)"])
def _groups(bits, group_size, n_pruned, mask, first, last):
    inputs = bits.shape[1]
    groups = -(-inputs // group_size)
    keys, kept = np.empty(groups * group_size, bits.dtype), np.empty(groups * group_size, np.bool_)
    by_place, ranks = np.empty((group_size, groups), bits.dtype), np.empty(groups, np.int32)
    for row in range(first, last):
        keys[:inputs] = bits[row]
        _to_order(keys[:inputs])
        keys[inputs:] = -(2 ** (8 * bits.itemsize - 1) - 1)  # entries that pad the last group are pruned first
        _mark_groups(keys, group_size, n_pruned, by_place, ranks, kept)
        mask[row] = kept[:inputs]


@compiled(["(f4[:, ::1], f4[::1], i8, i8, f4[:, ::1], b1[:, ::1], i8, i8)"])
def _prune_groups(weight, norm, group_size, n_pruned, values, mask, first, last):
    inputs = weight.shape[1]
    groups = -(-inputs // group_size)
    scores, kept = np.empty(groups * group_size, np.float32), np.empty(groups * group_size, np.bool_)
    keys = scores.view(np.int32)
    by_place, ranks = np.empty((group_size, groups), np.int32), np.empty(groups, np.int32)
    for row in range(first, last):
        for i in range(inputs):
            scores[i] = abs(weight[row, i] * norm[i])
        keys[inputs:] = -1  # below every score
        _mark_groups(keys, group_size, n_pruned, by_place, ranks, kept)
        for i in range(inputs):
            mask[row, i] = kept[i]
            values[row, i] = weight[row, i] if kept[i] else np.float32(0)


@compiled(["Tuple((i8, i8))(i4[::1], i8)", "Tuple((i8, i8))(i8[::1], i8)"])
def _cut_of(keys, n_pruned):
    return _cut(keys, n_pruned)


@compiled(
    [
        "Tuple((i8, i8, i8))(i4[::1], i8, i8, i4[::1], i8, i8)",
        "Tuple((i8, i8, i8))(i8[::1], i8, i8, i8[::1], i8, i8)",
    ]
)
def _tally(bits, low, high, found, first, last):
    """(entries below low, first, end); entries in [low, high) are copied to found[first:end]."""
    below, end = 0, first
    keys = np.empty(KEYS_AT_ONCE, bits.dtype)
    for start in range(first, last, KEYS_AT_ONCE):
        size = min(KEYS_AT_ONCE, last - start)
        keys[:size] = bits[start : start + size]
        _to_order(keys[:size])
        for i in range(size):
            below += keys[i] < low
            found[end] = keys[i]
            end += (keys[i] >= low) & (keys[i] < high)
    return below, first, end


@compiled(["Tuple((i8, i8, i8))(f4[:, ::1], f4[::1], i8, i8, i4[::1], i8, i8)"])
def _tally_scores(weight, norm, low, high, found, first, last):
    inputs = weight.shape[1]
    scores = np.empty(inputs, np.float32)
    keys = scores.view(np.int32)
    below, end = 0, first * inputs
    for row in range(first, last):
        for i in range(inputs):
            scores[i] = abs(weight[row, i] * norm[i])
        for i in range(inputs):
            below += keys[i] < low
            found[end] = keys[i]
            end += (keys[i] >= low) & (keys[i] < high)
    return below, first * inputs, end


@compiled(["(i4[::1], i8, b1[::1], i8, i8)", "(i8[::1], i8, b1[::1], i8, i8)"])
def _mark_all(bits, key, mask, first, last):
    keys = np.empty(KEYS_AT_ONCE, bits.dtype)
    for start in range(first, last, KEYS_AT_ONCE):
        size = min(KEYS_AT_ONCE, last - start)
        keys[:size] = bits[start : start + size]
        _to_order(keys[:size])
        _mark(keys[:size], key, 0, mask[start : start + size])


@compiled(["(f4[:, ::1], f4[::1], i8, f4[:, ::1], b1[:, ::1], i8, i8)"])
def _prune_at(weight, norm, key, values, mask, first, last):
    scores = np.empty(weight.shape[1], np.float32)
    for row in range(first, last):
        for i in range(len(scores)):
            scores[i] = abs(weight[row, i] * norm[i])
        _mark(scores.view(np.int32), key, 0, mask[row])
        for i in range(len(scores)):
            values[row, i] = weight[row, i] if mask[row, i] else np.float32(0)


def _sampled_every(size: int) -> int:
    """Distance between entries of a sample of a matrix of that size. It has no common factor with the size, so that the
    sample has entries of every column: columns differ in scale."""
    distance = size // SAMPLE + 1
    while math.gcd(distance, size) > 1:
        distance += 1
    return distance


def _cut_in_parts(
    sample: np.ndarray, n_pruned: int, n_keys: int, tally: Callable, found: np.ndarray
) -> tuple[int, int]:
    """As _cut, for `n_keys` keys. tally(low, high): as _tally, run by run.

    The sorted sample brackets the threshold by four standard deviations on each side; if that fails, all keys are used.
    """
    place, margin = n_pruned / n_keys * len(sample), 2 * len(sample) ** 0.5 + 1
    limits = np.iinfo(found.dtype)
    low = int(sample[int(place - margin)]) if place > margin else limits.min
    high = int(sample[int(place + margin)]) if place + margin < len(sample) else limits.max
    for bounds in ((low, high), (limits.min, limits.max)):
        tallies = tally(*bounds)
        missing = n_pruned - sum(below for below, _, _ in tallies)
        inside = np.concatenate([found[first:end] for _, first, end in tallies])
        if 0 < missing <= len(inside):
            break
    key, ties = _cut_of(inside, missing)
    return int(key), int(ties)


def _bits(score: Tensor) -> np.ndarray:
    scores = array(score)
    return scores.view(f"i{scores.itemsize}")


def keep_largest(score: Tensor, n_pruned: int) -> Tensor:
    """Mask, False at the `n_pruned` smallest entries of each line of score [..., n], float32 or float64."""
    bits = _bits(score).reshape(-1, score.shape[-1])
    mask = empty(bits.shape, np.bool_)
    if len(bits) == 1 and bits.size >= LONG_LINE:
        _keep_of_line(bits[0], n_pruned, mask[0])
    else:
        by_rows(_lines, bits.shape, bits, n_pruned, mask)
    return from_numpy(mask).view(score.shape)


def _keep_of_line(bits: np.ndarray, n_pruned: int, mask: np.ndarray) -> None:
    sample, found = bits[:: _sampled_every(len(bits))].copy(), empty(bits.shape, bits.dtype)
    _to_order(sample)
    sample.sort()
    shape = (len(bits), 1)
    key, ties = _cut_in_parts(
        sample, n_pruned, len(bits), lambda low, high: by_rows(_tally, shape, bits, low, high, found), found
    )
    by_rows(_mark_all, shape, bits, key, mask)
    mask[_first_equal(bits, key, ties)] = False


def _first_equal(bits: np.ndarray, key: int, ties: int) -> np.ndarray:
    """Indices of the first `ties` entries with this key."""
    equal, start = [], 0
    while ties:
        keys = bits[start : start + LONG_LINE].copy()
        _to_order(keys)
        equal.append(start + np.flatnonzero(keys == key)[:ties])
        ties -= len(equal[-1])
        start += LONG_LINE
    return np.concatenate(equal) if equal else np.empty(0, np.int64)


def keep_top_per_group(score: Tensor, group_size: int, n_pruned: int) -> Tensor:
    """Mask [out, in], False at the `n_pruned` smallest of each `group_size` consecutive scores [out, in] of a row."""
    bits = _bits(score)
    mask = empty(bits.shape, np.bool_)
    by_rows(_groups, bits.shape, bits, group_size, n_pruned, mask)
    return from_numpy(mask)


def prune_lines(weight: Tensor, norm: Tensor, n_pruned: int) -> tuple[Tensor, Tensor]:
    """Weight and mask [out, in] without the `n_pruned` entries of each row whose |weight| * norm [in] is smallest."""
    values, mask = empty(weight.shape, np.float32), empty(weight.shape, np.bool_)
    by_rows(_prune_lines, weight.shape, array(weight), array(norm), n_pruned, values, mask)
    return from_numpy(values), from_numpy(mask)


def prune_layer(weight: Tensor, norm: Tensor, n_pruned: int) -> tuple[Tensor, Tensor]:
    """The same for all entries of the layer."""
    entries, by_input, inputs = array(weight), array(norm), weight.shape[1]
    values, mask = empty(weight.shape, np.float32), empty(weight.shape, np.bool_)
    places = np.arange(0, weight.numel(), _sampled_every(weight.numel()))
    sample = np.sort(abs(entries.reshape(-1)[places] * by_input[places % inputs]).view(np.int32))
    found = values.reshape(-1).view(np.int32)

    def tally(low: int, high: int) -> list:
        return by_rows(_tally_scores, weight.shape, entries, by_input, low, high, found)

    key, ties = _cut_in_parts(sample, n_pruned, weight.numel(), tally, found)
    by_rows(_prune_at, weight.shape, entries, by_input, key, values, mask)
    for row in range(len(entries)) if ties else ():
        equal = np.flatnonzero(abs(entries[row] * by_input).view(np.int32) == key)[:ties]
        mask[row, equal], values[row, equal] = False, 0
        ties -= len(equal)
        if not ties:
            break
    return from_numpy(values), from_numpy(mask)


def prune_groups(weight: Tensor, norm: Tensor, group_size: int, n_pruned: int) -> tuple[Tensor, Tensor]:
    """The same for each `group_size` consecutive entries of a row."""
    values, mask = empty(weight.shape, np.float32), empty(weight.shape, np.bool_)
    by_rows(_prune_groups, weight.shape, array(weight), array(norm), group_size, n_pruned, values, mask)
    return from_numpy(values), from_numpy(mask)
