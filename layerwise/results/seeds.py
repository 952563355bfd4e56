"""Tables of a study with several seeds as a figure of one number per cell takes them."""

import pandas as pd

from layerwise.storage.frames import column, columns_of, select

SETTING = ["model", "calibration", "mode", "label", "target"]
KEYS = {"layers": [*SETTING, "layer"], "cells": [*SETTING, "metric", "text", "task_set", "task"]}
SEED = ["model", "calibration", "seed"]
MEASURED = (
    "level",
    "output_error",
    "absolute_error",
    "lower_bound",
    "gap_to_bound",
    "achieved_sparsity",
)  # of `layers`


def most_seeds(data: pd.DataFrame) -> int:
    """The largest number of seeds that a calibration set has; 0 for a table without rows."""
    counts = columns_of(data, SEED).drop_duplicates().groupby(SEED[:2]).size()
    return max(counts.to_list(), default=0)


def with_seed_names(data: pd.DataFrame) -> pd.DataFrame:
    """A table whose calibration sets are named with the seed where any has several, for keys that have no seed."""
    if most_seeds(data) > 1:
        return data.assign(calibration=column(data, "calibration") + " seed " + column(data, "seed").astype("string"))
    return data


def repeats(data: pd.DataFrame, table: str, what: str) -> pd.DataFrame:
    """Rows of a table as they are (`all`), of each calibration set's `first` seed, or their `mean` over the seeds.

    The mean is of the columns that are measured; the others are those of the first seed. A cell without a value under
    some seed has none, and the reason of the first that lacks one. A table with one seed stays as it is.
    """
    if what == "all" or "seed" not in data or most_seeds(data) < 2:
        return data
    if what == "first":
        return select(data, column(data, "seed") == data.groupby(SEED[:2])["seed"].transform("first"))
    key = KEYS[table]
    groups = data.groupby(key, sort=False, dropna=False)
    if table == "cells":
        absent = column(data, "value").isna().groupby([column(data, name) for name in key], sort=False, dropna=False)
        first = data.loc[absent.idxmax()]
        value = [column(part, "value").mean(skipna=False) for _, part in groups]
        return first.assign(value=value).reset_index(drop=True)
    first = groups.head(1).reset_index(drop=True)
    means = pd.DataFrame(groups[list(MEASURED)].mean())
    return first.assign(**{name: column(means, name).to_numpy() for name in MEASURED})
