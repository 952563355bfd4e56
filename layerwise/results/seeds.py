"""Tables of a study with several seeds as a figure of one number per cell takes them."""

# pandas' own annotations lose whether a selection is a column or a frame.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false

import pandas as pd

SETTING = ["model", "calibration", "mode", "label", "target"]
KEYS = {"layers": [*SETTING, "layer"], "cells": [*SETTING, "metric", "text", "task_set", "task"]}
SEED = ["model", "calibration", "seed"]


def told_apart(data: pd.DataFrame) -> pd.DataFrame:
    """A table whose calibration sets are named with the seed where any has several, for keys that have no seed."""
    if data[SEED].drop_duplicates().groupby(SEED[:2]).size().gt(1).any():
        return data.assign(calibration=data["calibration"] + " seed " + data["seed"].astype("string"))
    return data


def repeats(data: pd.DataFrame, table: str, what: str) -> pd.DataFrame:
    """Rows of a table as they are (`all`), of each calibration set's `first` seed, or their `mean` over the seeds.

    The mean is of the columns that are measured; the others are those of the first seed. A cell without a value under
    some seed has none, and the reason of the first that lacks one. A table with one seed stays as it is.
    """
    if what == "all" or "seed" not in data or data[SEED].drop_duplicates().groupby(SEED[:2]).size().max() < 2:
        return data
    if what == "first":
        return data[data["seed"] == data.groupby(SEED[:2])["seed"].transform("first")]
    key = KEYS[table]
    groups = data.groupby(key, sort=False, dropna=False)
    if table == "cells":
        first = data.loc[data["value"].isna().groupby([data[name] for name in key], sort=False, dropna=False).idxmax()]
        value = groups["value"].agg(lambda values: values.mean(skipna=False)).to_numpy()
        return first.assign(value=value).reset_index(drop=True)
    measured = ["output_error", "absolute_error", "lower_bound", "gap_to_bound", "achieved_sparsity"]
    first = groups.head(1).reset_index(drop=True)
    return first.assign(**{name: groups[name].mean().to_numpy() for name in measured})
