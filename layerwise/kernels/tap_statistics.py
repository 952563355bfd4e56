"""Sums over the tokens of sequences: activations are read from memory at most twice and never copied."""

import numpy as np
from numba import float32, float64, void

from layerwise.kernels.rows import compiled

WIDTH = 64  # inputs at a time, so that their rows of one sequence stay in the L1 cache
RUN = 16  # tokens summed in float32 before the float64 sum


@compiled(void(float32[:, :, ::1], float64[:, ::1]))
def add_sums(x, sums):
    """Add to sums [3, in] the sums over the sequences x [sequences, length, in] of mean, mean absolute value and biased
    variance of each sequence."""
    sequences, length, inputs = x.shape
    total, absolute = np.empty(WIDTH), np.empty(WIDTH)
    mean = np.empty(WIDTH, np.float32)
    for start in range(0, inputs, WIDTH):
        width = min(WIDTH, inputs - start)
        for s in range(sequences):
            total[:], absolute[:] = 0, 0
            for begin in range(0, length - length % RUN, RUN):
                for j in range(start, start + width):
                    run = np.float32(0)
                    run_absolute = np.float32(0)
                    for t in range(RUN):
                        value = x[s, begin + t, j]
                        run += value
                        run_absolute += abs(value)
                    total[j - start] += run
                    absolute[j - start] += run_absolute
            for t in range(length - length % RUN, length):
                for j in range(width):
                    total[j] += x[s, t, start + j]
                    absolute[j] += abs(x[s, t, start + j])
            for j in range(width):
                mean[j] = total[j] / length
                sums[0, start + j] += total[j] / length
                sums[1, start + j] += absolute[j] / length
            total[:] = 0
            # Centred before squaring, because (mean of squares) - (square of the mean) loses digits when the mean is
            # large.
            for begin in range(0, length - length % RUN, RUN):
                for j in range(start, start + width):
                    run = np.float32(0)
                    for t in range(RUN):
                        value = x[s, begin + t, j] - mean[j - start]
                        run += value * value
                    total[j - start] += run
            for t in range(length - length % RUN, length):
                for j in range(width):
                    total[j] += (x[s, t, start + j] - mean[j]) ** 2
            for j in range(width):
                sums[2, start + j] += total[j] / length
