"""Read the targets of a cell's layers from the table of levels that the rule `allocate` wrote."""

from pathlib import Path

from layerwise.contract.target import Target
from layerwise.results.bounds import read_levels


def targets_at(path: Path, target: Target) -> dict[str, Target]:
    """Layer -> its target, from a table whose budget is the target. Raises InputError when the table is absent or
    broken."""
    data = read_levels(path)
    names = ("layer", "level", "pair")
    columns = zip(*(data.column(name).to_pylist() for name in names), strict=True)
    return {layer: Target.parse(pair) if pair else target.at(level) for layer, level, pair in columns}
