"""The job of a model's `fisher`: check the model, unless that is already done, and backpropagate its loss."""

import sys
from functools import partial

from layerwise.calibration import fisher
from layerwise.evaluation.checked import ensure_checked
from layerwise.runtime.errors import report_errors

main = partial(fisher.main, before=ensure_checked)

if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
