"""Loops in compiled code. What is compiled is kept on disk, in a folder that the text of all kernels names: Numba looks
at the file of a function alone, and would go on using what was compiled with another `simd.py`."""

import hashlib
from pathlib import Path

import numba

_HERE = Path(__file__).parent
_TEXT = b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.py")))
if not numba.config.CACHE_DIR:  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = str(_HERE / "__pycache__" / hashlib.sha256(_TEXT).hexdigest()[:12])  # type: ignore[attr-defined]
