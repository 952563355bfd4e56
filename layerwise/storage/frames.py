"""The interface to pandas: selections with exact types.

pandas' annotations do not say whether a selection is a column or a frame, or whether a reduction is a number. All
selections from tables use these functions, each of which does a single step.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, cast

import pandas as pd


def column(frame: pd.DataFrame, name: str) -> pd.Series:
    """One column. Raises KeyError when the frame has no column of this name."""
    return cast(pd.Series, frame[name])


def columns_of(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Some columns, in the given order."""
    return cast(pd.DataFrame, frame[list(names)])


def select(frame: pd.DataFrame, mask: pd.Series) -> pd.DataFrame:
    """The rows where the mask is true; an empty entry counts as false."""
    return cast(pd.DataFrame, frame[mask])


def matching(frame: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows with these values in the columns of these names."""
    for name, value in values.items():
        frame = select(frame, column(frame, name) == value)
    return frame


def rows(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """A dict per row."""
    return cast(list[dict[str, Any]], frame.to_dict("records"))


def tuples(frame: pd.DataFrame, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """A tuple per row, of some columns."""
    return list(columns_of(frame, names).itertuples(index=False, name=None))


def distinct(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The first row of every combination of values in some columns; all columns."""
    return cast(pd.DataFrame, frame.drop_duplicates(list(names)))


def distinct_values(frame: pd.DataFrame, name: str) -> list[Any]:
    """The distinct values of a column, in order of first occurrence."""
    return column(frame, name).drop_duplicates().to_list()


def distinct_tuples(frame: pd.DataFrame, names: Sequence[str]) -> list[tuple[Any, ...]]:
    """The distinct combinations of values in some columns, in order of first occurrence."""
    return tuples(distinct(frame, names), names)


def groups(
    frame: pd.DataFrame, names: Sequence[str], empty: bool = False, observed: bool = False
) -> list[tuple[tuple[Any, ...], pd.DataFrame]]:
    """(values of some columns, rows with them), in order of first occurrence.

    empty: whether rows with a missing value also form groups. observed: whether only categories that occur count.
    """
    parts = frame.groupby(list(names), sort=False, dropna=not empty, observed=observed)
    return [(cast(tuple[Any, ...], key), part) for key, part in parts]


def groups_by(
    frame: pd.DataFrame, name: str, sort: bool = False, observed: bool = False
) -> list[tuple[Any, pd.DataFrame]]:
    """(value of a column, rows with it), in order of first occurrence, or sorted by the value."""
    return [(key, part) for key, part in frame.groupby(name, sort=sort, observed=observed)]


def sorted_by(frame: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """The rows in ascending order of some columns, stable."""
    return frame.sort_values(list(names), kind="stable")


def renamed(frame: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """The frame with some columns under other names."""
    return frame.rename(columns=dict(names))


def entry(frame: pd.DataFrame, row: Hashable, name: str) -> float:
    """The number in a column at a row's index. Raises KeyError if there is none."""
    return float(cast(float, frame.at[row, name]))


def lowest(values: pd.Series) -> float:
    """The smallest value, ignoring empty ones."""
    return float(cast(float, values.min()))


def highest(values: pd.Series) -> float:
    """The largest value, ignoring empty ones."""
    return float(cast(float, values.max()))


def true_of_any(mask: pd.Series) -> bool:
    """Whether the mask is true anywhere."""
    return bool(mask.any())


def missing(value: Hashable) -> bool:
    """Whether a single value is empty: None, NaN or pd.NA."""
    return bool(pd.isna(cast(Any, value)))
