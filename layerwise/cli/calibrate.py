"""The job of a model's Grams: check the model, unless that is already done, and calibrate."""

import sys
from functools import partial

from layerwise.calibration import calibrate
from layerwise.evaluation.checked import ensure_checked
from layerwise.runtime.errors import report_errors

main = partial(calibrate.main, before=ensure_checked)

if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
