"""Reduce the tables of a study with several seeds to one number per cell, for figures."""

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
    """The largest number of seeds of a calibration set; 0 for a table without rows."""
    counts = columns_of(data, SEED).drop_duplicates().groupby(SEED[:2]).size()
    return max(counts.to_list(), default=0)


def with_seed_names(data: pd.DataFrame) -> pd.DataFrame:
    """A table with the seed in the names of calibration sets, if any has several seeds, for keys without a seed."""
    if most_seeds(data) > 1:
        return data.assign(calibration=column(data, "calibration") + " seed " + column(data, "seed").astype("string"))
    return data


def repeats(data: pd.DataFrame, table: str, what: str) -> pd.DataFrame:
    """All rows of a table (`all`), those of each calibration set's `first` seed, or the `mean` over the seeds.

    Only measured columns are averaged; the other columns come from the first seed. A cell without a value for some seed
    has no mean, and takes the reason of the first such seed. A table with one seed is unchanged.
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
