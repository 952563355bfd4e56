"""The embedded model's tasks, made from its test text: the last word of a passage, the same word as an
answer that the model writes, and the continuation of a docstring.

Writes lm-eval's YAML definitions with their data beside them, one file each, as a folder that lm-eval runs in.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from layerwise.runtime.errors import InputError, report_errors
from layerwise.runtime.files import write_atomic

ITEMS = {"last_word": 200, "continuation": 100, "written_word": 200}  # some five seconds of a core for a cell, each
SEED = 0
CONTEXT = (120, 240)  # least and most characters of a passage before its last word
LAST = re.compile(r"(?<= )([a-z]{4,})(?=[.,;)]\s)")  # a lower-case word after a space, before what ends a clause
NAME = re.compile(r"([A-Za-z_]\w*)\.[\w.]+\n")  # first line of an entry: the name, in its package, of what it describes
START, CHOICE, CHOICES = 120, 60, 4  # characters of a docstring's beginning and of each way on; ways on


def docstrings(text: str) -> list[tuple[str, str]]:
    """(package, name and docstring) of every docstring of a split that docstrings.py wrote."""
    return [
        (name[1], entry)
        for module in text.split("\n\n\n\n")
        for entry in module.split("\n\n\n")
        if (name := NAME.match(entry))
    ]


def last_words(entries: Sequence[tuple[str, str]], draw: random.Random) -> Iterator[dict[str, str]]:
    """One passage of each docstring that has one: its last word also occurs earlier in it, as in most of LAMBADA."""
    for _, entry in entries:
        found = []
        for match in LAST.finditer(entry):
            start = max(0, match.start() - CONTEXT[1])
            if start:  # at the beginning of a word
                start = entry.find(" ", start) + 1
            context = entry[start : match.start() - 1]
            code = context.rpartition("\n")[2].lstrip().startswith((">>>", "..."))
            if (
                len(context) >= CONTEXT[0]
                and re.search(rf"\b{match[1]}\b", context)
                and context[-1] != " "
                and not code
            ):
                found.append({"context": context, "word": match[1]})
        if found:
            yield draw.choice(found)


def overlap(context: str, way: str) -> float:
    """Share of a continuation's words that the context has too."""
    words, known = re.findall(r"\w+", way.lower()), set(re.findall(r"\w+", context.lower()))
    return sum(word in known for word in words) / max(len(words), 1)


def continuations(entries: Sequence[tuple[str, str]], draw: random.Random) -> Iterator[dict[str, object]]:
    """Beginnings of docstrings, each with its continuation among others of its package, cut at the same place.

    The others share about as large a part of their words with the beginning as the true one does, so that it cannot be
    found by counting common words.
    """
    cut: dict[str, list[tuple[str, str]]] = {}
    for package, entry in entries:
        space = entry.find(" ", START)
        end = entry.find(" ", space + CHOICE)
        if space > 0 and end > 0 and (parts := (entry[:space].rstrip(), entry[space:end].strip()))[1]:
            cut.setdefault(package, []).append(parts)
    for package, parts in cut.items():
        for context, true in parts:
            others = sorted({way for _, way in parts} - {true})
            if len(others) < CHOICES - 1:
                continue
            draw.shuffle(others)  # which of equally near ones are taken
            own = overlap(context, true)
            others.sort(key=lambda way: abs(overlap(context, way) - own))
            choices = [true, *others[: CHOICES - 1]]
            draw.shuffle(choices)
            yield {"context": context, "choices": choices, "label": choices.index(true), "package": package}


MAKERS = {"last_word": last_words, "continuation": continuations, "written_word": last_words}


def make(text: str, items: Mapping[str, int] = ITEMS, seed: int = SEED) -> dict[str, list[dict]]:
    """Items of each task that `items` names from the text of a split: the first ones, after all that the rule
    finds are shuffled.

    The same text and seed give the same items. Raises InputError when a text gives fewer items than requested.
    """
    entries = docstrings(text)
    made = {}
    for name, wanted in items.items():
        maker, draw = MAKERS[name], random.Random(seed)
        # Docstrings that are repeated word for word give an item once.
        found = list({str(item["context"]): item for item in maker(entries, draw)}.values())
        if len(found) < wanted:
            raise InputError(f"The text must give {wanted} items of the task {name}. Got {len(found)} instead.")
        draw.shuffle(found)
        made[name] = found[:wanted]
    return made


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="docstring_tasks", description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="test split that docstrings.py wrote")
    parser.add_argument("--definitions", type=Path, required=True, help="folder of the tasks' YAML definitions")
    parser.add_argument("--out", type=Path, required=True, help="folder for the definitions with their data")
    args = parser.parse_args(argv)
    for name, items in make(args.text.read_text("utf-8")).items():
        lines = (json.dumps(item, ensure_ascii=False) for item in items)
        write_atomic(args.out / f"{name}.jsonl", "\n".join(lines) + "\n")
        write_atomic(args.out / f"{name}.yaml", (args.definitions / f"{name}.yaml").read_text("utf-8"))


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
