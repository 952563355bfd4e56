"""The project's compiled loops, made before several processes would each make them."""

import subprocess
import sys

from tests.support.paths import ROOT

LOOPS = (  # about equal halves in turn
    "obs",
    "gradient_projection",
    "relaxation_exchanges",
    "relaxation_steps",
    "grids",
    "regrowing",
    "selection",
    "tap_statistics",
    "swap_search",
    "code_search",
    "coordinate_descent",
    "packed_matvec",
    "packed_parts",
    "capped_simplex",
)


def compile_loops() -> None:
    """In two processes: minutes where nothing is compiled. Raises RuntimeError for loops that do not compile."""
    halves = [", ".join(f"layerwise.kernels.{name}" for name in LOOPS[first::2]) for first in (0, 1)]
    running = [subprocess.Popen([sys.executable, "-c", f"import {half}"], cwd=ROOT) for half in halves]
    if any([half.wait() for half in running]):
        raise RuntimeError(f"The loops in {ROOT / 'layerwise/kernels'} should compile, and do not.")
