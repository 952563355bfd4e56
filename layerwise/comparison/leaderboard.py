"""Boards over several result folders: one per evaluation text and target, with every difference of protocol marked.

A number is ranked only among those of its own comparison group and its own protocol: model, calibration, evaluation,
mode and seeds. A row whose protocol is not the board's most common one has letters, and a note
for each letter says what differs.
"""

import json
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import pandas as pd

from layerwise.comparison.folders import folder_of_tables
from layerwise.results.main_table import entry_text, spread, undecided
from layerwise.results.protocol import MARK, Protocol, provenance_marks
from layerwise.runtime.errors import InputError
from layerwise.storage.frames import column, groups, matching, missing, rows, select, tuples
from layerwise.storage.table_schema import COMPARISONS, read_table

TABLES = ("cells", "comparisons")
CONTESTED = "‡"
GENERIC = ("tables", "results")  # folders that name no study
# Rows of a setting differ in the seed alone.
SETTING = ["model", "calibration", "mode", "label", "target", "allocator", "allocation_params", "params", "text"]
# Aspect of a protocol -> columns that decide it; the first is a hash, for which the name of the second stands where
# nothing was hashed. A name decides nothing else: two studies may call one model by two names.
ASPECTS = {
    "model": ("model_sha256", "model", "model_quantisation", "dtype", "compute_dtype"),
    "calibration": (
        *("calibration_sha256", "calibration", "calibration_samples", "calibration_length", "calibration_sampling"),
        *("calibration_dtype", "calibration_compute_dtype"),
    ),
    "evaluation": ("eval_sha256", "text", "eval_length", "eval_windows", "contaminated"),
}
WORDS = {  # where the name of a column is no plain word
    "eval_length": "evaluation window length",
    "eval_windows": "evaluation windows",
    "contaminated": "calibration and evaluation share text",
}
Fields = tuple[tuple[str, str], ...]  # (what, value as text) of an aspect


@dataclass(frozen=True)
class Standing:
    """One row of a board.

    params: of the method, and those of the allocator, whose names begin with the allocator's. protocol: aspect -> its
    fields. values, ratios: of the seeds; empty where a seed has no number. shown: the perplexity as text, or why there
    is none. rank: 1 is the smallest mean ratio among the `among` rows of the same group and protocol; None without a
    ratio. best: first of at least two, or not shown to differ from that one.
    """

    studies: tuple[str, ...]
    model: str
    comparison: str
    label: str
    params: Mapping[str, Any]
    protocol: Mapping[str, Fields]
    values: tuple[float, ...]
    ratios: tuple[float, ...]
    shown: str
    dense: float | None
    kl: float | None
    bits: float | None
    alike: frozenset[str]
    marks: tuple[str, ...] = ()
    rank: int | None = None
    among: int = 0
    best: bool = False

    @property
    def ratio(self) -> float | None:
        """Mean over the seeds of perplexity / dense perplexity, or None."""
        return statistics.fmean(self.ratios) if self.ratios else None

    @property
    def name(self) -> str:
        """The label, with the parameters that set it apart from other rows of the label."""
        given = ", ".join(f"{key} {json.dumps(value)}" for key, value in self.params.items())
        return f"{self.label} ({given})" if given else self.label


@dataclass(frozen=True)
class Board:
    """One evaluation text and target. groups: (comparison, rows by rising ratio). notes: (mark, sentence)."""

    text: str
    target: str
    protocol: str
    groups: list[tuple[str, list[Standing]]]
    notes: list[tuple[str, str]]


def study_folders(arguments: Sequence[str]) -> dict[str, Path]:
    """Study -> folder of its tables, from FOLDER or NAME=FOLDER.

    Without a name, a study is named after its folder, not counting results/ and tables/. Raises InputError for a
    folder without tables and for a name that two folders have.
    """
    named: dict[str, Path] = {}
    for argument in arguments:
        name, equals, folder = argument.partition("=")
        if not equals or "/" in name:
            name, folder = "", argument
        place = folder_of_tables(Path(folder))
        parts = [part for part in place.resolve().parts if part not in GENERIC]
        name = name or parts[-1]
        if name in named:
            raise InputError(f"Each study must have a name of its own. Got two called {name}: write NAME={folder}.")
        named[name] = place
    return named


def leaderboard(folders: Mapping[str, Path]) -> tuple[list[Board], list[str]]:
    """The boards of all studies, in the order in which texts and targets first occur, and sentences on all of them.

    folders: study -> folder of its tables. Raises InputError where a table cannot be read or mixes two protocols.
    """
    data = {study: {table: read_table(folder, table) for table in TABLES} for study, folder in folders.items()}
    strange, sentences = _provenance(data)
    standings: dict[tuple[str, str], list[Standing]] = {}
    for study, tables in data.items():
        _check_protocol(study, tables["cells"])
        found = list(_standings(study, tables, strange))
        if not found:
            sentences.append(f"{study} has no perplexity of a compressed model, and is on no board.")
        for key, standing in found:
            standings.setdefault(key, []).append(standing)
    return [_board(text, target, rows_of) for (text, target), rows_of in standings.items()], sentences


def _check_protocol(study: str, cells: pd.DataFrame) -> None:
    protocol = Protocol()
    for row in rows(cells):
        if sentence := protocol.difference(row):
            raise InputError(f"{study} mixes two protocols: {sentence}.")


def _provenance(data: Mapping[str, Mapping[str, pd.DataFrame]]) -> tuple[set[tuple[str, str]], list[str]]:
    """(mode, study/cell) of the rows that are marked for their code or versions, and the sentences that say why."""
    parts = [
        tables["cells"].assign(cell=study + "/" + column(tables["cells"], "cell")) for study, tables in data.items()
    ]
    return provenance_marks(pd.concat(parts, ignore_index=True))


def _standings(
    study: str, tables: Mapping[str, pd.DataFrame], strange: set[tuple[str, str]]
) -> Iterator[tuple[tuple[str, str], Standing]]:
    """((text, target), row) of every setting of a study that has a perplexity or the reason why not."""
    cells = tables["cells"]
    perplexities = matching(cells, metric="perplexity")
    dense = {
        (row["model"], row["text"]): float(row["value"])
        for row in rows(matching(perplexities, target="dense"))
        if not missing(row["value"])
    }
    alike = undecided(tables["comparisons"], "perplexity")
    compressed = select(perplexities, column(perplexities, "target") != "dense")
    for (model, calibration, mode, label, target, _, _, _, text), part in groups(compressed, SETTING):
        seeds, reference = rows(part), dense.get((model, text))
        names = {study + "/" + row["cell"] for row in seeds}
        marked = {(mode, name) for name in names} & strange
        whole = not any(missing(row["value"]) for row in seeds)
        values = tuple(float(row["value"]) for row in seeds) if whole else ()
        place = (model, calibration, text, mode, target, label)
        standing = Standing(
            studies=(study,),
            model=model,
            comparison=seeds[0]["comparison"],
            label=label,
            params=_parameters(seeds[0]),
            protocol=_protocol(seeds),
            values=values,
            ratios=tuple(value / reference for value in values) if reference else (),
            shown=entry_text(seeds, "perplexity"),
            dense=reference,
            kl=_mean(matching(cells, metric="kl", text=text), part),
            bits=_mean(matching(cells, metric="bits_per_weight"), part),
            alike=frozenset(row[-1] for row in alike if row[: len(place)] == place),
            marks=(MARK,) if marked else (),
        )
        yield (text, target), standing


def _parameters(row: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a row's method, and its allocator with its parameters."""
    name, own = row["allocator"], json.loads(row["allocation_params"])
    return {**json.loads(row["params"]), "allocator": name, **{f"{name} {key}": value for key, value in own.items()}}


def _mean(of: pd.DataFrame, part: pd.DataFrame) -> float | None:
    """Mean of a metric over the cells of some rows, or None where one of them has none."""
    known = {(row["mode"], row["cell"]): row["value"] for row in rows(of)}
    values = [float(known[cell]) for cell in tuples(part, ["mode", "cell"]) if not missing(known.get(cell))]
    return statistics.fmean(values) if len(values) == len(part) else None


def _protocol(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Fields]:
    """Aspect -> fields that decide it, of the rows of one setting; the calibration's seed goes with the seed."""
    first = seeds[0]
    found = {}
    for aspect, (hashed, name, *further) in ASPECTS.items():
        identity = first[name] if missing(first[hashed]) else first[hashed][:8]
        found[aspect] = ((f"{aspect} {'files' if aspect == 'model' else 'text'}", str(identity)),)
        found[aspect] += tuple((WORDS.get(each, each.replace("_", " ")), _text(first[each])) for each in further)
    found["mode"] = (("mode", first["mode"]),)
    found["seeds"] = (("seeds", ", ".join(str(row["seed"]) for row in seeds)),)
    return found


def _text(value: Any) -> str:
    if missing(value):
        return "not recorded"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _board(text: str, target: str, standings: Sequence[Standing]) -> Board:
    """The rows of a text and target, once each, ranked within group and protocol, and marked."""
    merged, contested = _once(standings)
    usual = Counter(_key(own) for own in merged).most_common(1)[0][0]
    reference = next(own for own in merged if _key(own) == usual)
    letters: dict[str, str] = {}
    marked = [replace(own, marks=(*_letters(own, reference, letters), *own.marks)) for own in merged]
    names = _distinguishing(marked)
    ranked = [replace(_ranked(own, marked), params=names[i]) for i, own in enumerate(marked)]
    found = [(comparison, [own for own in ranked if own.comparison == comparison]) for comparison in COMPARISONS]
    notes = [(letter, sentence) for sentence, letter in letters.items()]
    notes += [(CONTESTED, "Studies with the same cell have different numbers for it.")] if contested else []
    return Board(text, target, _described(reference), [(name, _sorted(own)) for name, own in found if own], notes)


def _key(own: Standing) -> tuple[Fields, ...]:
    return tuple(own.protocol.values())


def _once(standings: Sequence[Standing]) -> tuple[list[Standing], bool]:
    """Every cell of several studies as one row, or as marked rows where its numbers differ; and whether any differ."""
    same: dict[tuple[Any, ...], list[Standing]] = {}
    for own in standings:
        key = (own.comparison, own.label, json.dumps(own.params, sort_keys=True), _key(own))
        same.setdefault(key, []).append(own)
    found, contested = [], False
    for rows_of in same.values():
        first = rows_of[0]
        if all((own.shown, own.dense) == (first.shown, first.dense) for own in rows_of):
            studies = tuple(study for own in rows_of for study in own.studies)
            alike = frozenset.union(*(own.alike for own in rows_of))
            found.append(replace(first, studies=studies, alike=alike))
        else:
            contested = True
            found += [replace(own, marks=(*own.marks, CONTESTED)) for own in rows_of]
    return found, contested


def _letters(own: Standing, reference: Standing, letters: dict[str, str]) -> Iterator[str]:
    """A letter for each aspect in which a row differs from the usual protocol; new sentences are added to `letters`."""
    for aspect, fields in own.protocol.items():
        usual = dict(reference.protocol[aspect])
        differing = [(what, value) for what, value in fields if usual[what] != value]
        if aspect == "model" and fields[0] in differing and own.model != reference.model:
            differing[0], usual["model"] = ("model", own.model), reference.model  # a name says more than a hash
        if differing:
            said = "; ".join(f"{what} {value} instead of {usual[what]}" for what, value in differing)
            yield letters.setdefault(f"{said}.", _letter(len(letters)))


def _letter(index: int) -> str:
    """a to z, then aa, ab, ..."""
    before, last = divmod(index, len(ascii_lowercase))
    return (_letter(before - 1) if before else "") + ascii_lowercase[last]


def _ranked(own: Standing, standings: Sequence[Standing]) -> Standing:
    """A row with its rank among those of its group and protocol."""
    rivals = [
        other
        for other in standings
        if other.ratio is not None and other.comparison == own.comparison and _key(other) == _key(own)
    ]
    if own.ratio is None:
        return replace(own, among=len(rivals))
    first = min(rivals, key=lambda other: other.ratio or 0.0)
    rank = 1 + sum((other.ratio or 0.0) < own.ratio for other in rivals)
    together = bool(set(own.studies) & set(first.studies)) and first.label in own.alike
    return replace(own, rank=rank, among=len(rivals), best=len(rivals) > 1 and (rank == 1 or together))


def _distinguishing(standings: Sequence[Standing]) -> list[dict[str, Any]]:
    """The parameters of each row that differ among the rows of its label."""
    found = []
    for own in standings:
        others = [other.params for other in standings if other.label == own.label]
        found.append({k: v for k, v in own.params.items() if any(params.get(k) != v for params in others)})
    return found


def _sorted(standings: Sequence[Standing]) -> list[Standing]:
    """By rising ratio; rows without one come last, in their order."""
    places = count()
    keyed = [(own.ratio is None, own.ratio or 0.0, next(places), own) for own in standings]
    return [own for *_, own in sorted(keyed, key=lambda entry: entry[:3])]


def _described(reference: Standing) -> str:
    """The usual protocol of a board in one sentence."""
    parts = [f"model {reference.model}"]
    for aspect, fields in reference.protocol.items():
        known = [f"{what} {value}" for what, value in fields if value != "not recorded"]
        parts += known[1:] if aspect == "model" else known
    return ", ".join(parts) + "."


def ratio_text(own: Standing) -> str:
    """The ratio as printed, with the deviation over seeds; a dash without one."""
    return spread(own.ratios, "perplexity") if own.ratios else "–"
