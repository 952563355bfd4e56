"""Where compiled loops are kept."""

import pytest
from numba.core.caching import _CacheLocator

from layerwise.kernels.rows import compiled
from layerwise.runtime.errors import InputError


def test_no_folder_for_compiled_loops_is_reported(monkeypatch):
    def refuse(locator: _CacheLocator) -> None:
        raise PermissionError(13, "Permission denied", locator.get_cache_path())

    monkeypatch.setattr(_CacheLocator, "ensure_cache_path", refuse)
    with pytest.raises(InputError, match="Compiled loops must be stored in .*: set NUMBA_CACHE_DIR to one"):
        compiled()(lambda rows: rows + 1)
