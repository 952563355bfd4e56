"""Compare layers with certified bounds: the columns lower_bound and gap_to_bound of the `layers` table."""

from pathlib import Path

import pyarrow as pa

from layerwise.runtime.errors import InputError
from layerwise.storage.table_schema import read_parquet, typed, unusable


def read_bounds(path: Path) -> pa.Table:
    """The `bounds` rows that a certificate job wrote. Raises InputError when the file is absent or broken."""
    return _read(path, "bounds", "bounds of a target", "logs/certificates")


def read_levels(path: Path) -> pa.Table:
    """The `allocations` rows that an allocate job wrote. Raises InputError when the file is absent or broken."""
    return _read(path, "allocations", "levels of an allocation", "logs/allocations")


def _read(path: Path, table: str, what: str, logs: str) -> pa.Table:
    if not path.is_file():
        raise InputError(f"The {what} {path} does not exist (see {logs}).")
    try:
        data = read_parquet(path)
    except (pa.ArrowException, OSError) as error:
        raise unusable(path, error) from None
    return typed(data, table, str(path))


def with_bounds(layers: pa.Table, bounds: pa.Table, path: Path) -> pa.Table:
    """The `layers` rows of a cell with the two columns of its target's bounds, read from `path`.

    Raises InputError when a layer has no bound, or has an error below its bound, which the target cannot allow.
    """
    known = dict(zip(*(bounds.column(name).to_pylist() for name in ("layer", "lower_bound")), strict=True))
    lower, gaps = [], []
    for layer, error in zip(*(layers.column(name).to_pylist() for name in ("layer", "output_error")), strict=True):
        if layer not in known:
            raise InputError(f"{path} has no bound for the layer {layer}.")
        if error < known[layer]:
            label = layers.column("label")[0]
            raise InputError(
                f"{label} has an output_error of {error:.9g} on {layer}, below the bound {known[layer]:.9g} in {path}."
            )
        lower.append(known[layer])
        gaps.append(1 - known[layer] / error if error else 0.0)
    for name, values in (("lower_bound", lower), ("gap_to_bound", gaps)):
        position = layers.schema.get_field_index(name)
        field = layers.schema.field(position)
        layers = layers.set_column(position, field, pa.chunked_array([pa.array(values, field.type)]))
    return layers
