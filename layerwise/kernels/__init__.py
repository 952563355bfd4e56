"""Compiled loops. Each module has the same stem as its reference module in torch.

Compiled code is cached on disk, in a folder named by a hash of the text of all kernels. Numba itself checks only the
file of a function, and would reuse code compiled with another `simd.py`.
"""

import hashlib
from pathlib import Path

import numba

_HERE = Path(__file__).parent
_TEXT = b"".join(path.read_bytes() for path in sorted(_HERE.glob("*.py")))
if not numba.config.CACHE_DIR:  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = str(_HERE / "__pycache__" / hashlib.sha256(_TEXT).hexdigest()[:12])  # type: ignore[attr-defined]
