"""Result folders of synthetic studies, with the tables that collect writes."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from layerwise.results.cell_results import evaluations
from layerwise.results.collect import StudyInputs, collect
from tests.support.synthetic_tables import EVALUATIONS, PROVENANCE, STUDY, SyntheticCell, cell, layer_frame, write_cell

TEXTS = tuple(EVALUATIONS)
PLAN = [cell("dense", "dense"), cell("magnitude", "60% row"), cell("wanda", "60% row")]
SKIPPED = [{"label": "rtn", "method": "rtn", "target": "2:4", "allocation": "uniform", "reason": "rtn does not prune"}]


def results(
    root: Path,
    computed: Mapping[str, float] = {"dense": 1.0, "magnitude": 1.0, "wanda": 1.0},
    texts: Sequence[str] = TEXTS,
    plan: Sequence[SyntheticCell] = PLAN,
    **provenance: object,
) -> Path:
    """A result folder in which some cells of the plan are computed, their errors multiplied by a factor."""
    for one in (each for each in plan if each.columns["label"] in computed):
        folder = write_cell(root, one, texts)
        layers = layer_frame(one, 2).assign(lower_bound=None, gap_to_bound=None)
        layers["output_error"] *= computed[one.columns["label"]]
        layers.to_parquet(folder / "layers.parquet")
        record = json.loads((folder / "cell.json").read_text())
        record["provenance"] = PROVENANCE | provenance
        (folder / "cell.json").write_text(json.dumps(record))
    collect(
        StudyInputs(plan, SKIPPED, evaluations(STUDY, EVALUATIONS)), root / "results/tables", partial=True, root=root
    )
    return root
