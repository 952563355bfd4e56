"""Tokenise documents and cut them, as published, into calibration and evaluation sequences.

The tokens of a model are drawn once per calibration set and evaluation, so that every method and mode sees the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from layerwise.runtime.errors import InputError, out_of_memory, refused, report_errors
from layerwise.runtime.files import set_aside, whole_file
from layerwise.sources.documents import Text, read_text, text_hash
from layerwise.sources.hub import Spec
from layerwise.sources.ngrams import text_sketch
from layerwise.sources.text_files import dataset_of
from layerwise.sources.tokenizer_files import encode, load_and_tell

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COUNTED_BEFORE = 20_000  # up to this many documents, their lengths are checked before the draw
MISSES = 1_000  # after this many consecutive draws of short documents, the lengths of all documents are checked
CHUNK = 500_000  # characters tokenised at once, if a text can be split; a call needs about 150 bytes per character


def encode_stream(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], join: str) -> np.ndarray:
    """Token ids [n] int64 of the joined documents, tokenised as one text with the default special tokens.

    If a special token joins the documents, the tokenizer splits there first. The text is then tokenised in pieces that
    begin with this token: the same ids, in half the time and a quarter of the memory.
    """
    marks = getattr(tokenizer, "added_tokens_decoder", {}).values() if tokenizer.is_fast else ()
    plain = (m for m in marks if m.special and not (m.lstrip or m.single_word or m.normalized))
    if join not in (mark.content for mark in plain):
        return encode(tokenizer, join.join(documents))
    pieces: list[list[str]] = [[]]
    size = 0
    for number, document in enumerate(documents):
        if size > CHUNK:
            pieces.append([])
            size = 0
        pieces[-1] += [join, document] if number else [document]
        size += len(document)
    before, after = _special_tokens(tokenizer)
    return np.concatenate([before, *(encode(tokenizer, "".join(piece), special=False) for piece in pieces), after])


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """The special tokens that the tokenizer puts before and after a text by default."""
    full, bare = encode(tokenizer, "a"), encode(tokenizer, "a", special=False)
    starts = range(len(full) - len(bare) + 1)
    start = next(start for start in starts if np.array_equal(full[start : start + len(bare)], bare))
    return full[:start], full[start + len(bare) :]


def sample_stream(ids: np.ndarray, samples: int, length: int, seed: int) -> np.ndarray:
    """Random crops [samples, length] of a stream of ids [n], drawn as in SparseGPT and Wanda from WikiText-2.

    Raises InputError when the stream has fewer windows of this length than requested samples.
    """
    available = len(ids) // length
    if available < samples or len(ids) <= length:
        raise InputError(_too_short(f"The text has {len(ids)} tokens, {available} sequences", length, samples))
    draw = random.Random(seed)
    starts = [draw.randint(0, len(ids) - length - 1) for _ in range(samples)]
    return np.stack([ids[start : start + length] for start in starts])


def sample_documents(
    encode: Callable[[str], np.ndarray], documents: Sequence[str], samples: int, length: int, seed: int
) -> np.ndarray:
    """Crops [samples, length] of random documents, drawn as in Wanda from C4 (lib/data.py, get_c4).

    Documents are drawn until one has more than `length` tokens; then a crop of it is drawn. (SparseGPT's code also
    accepts one of exactly `length` tokens and then fails.) encode: document -> its ids [n], called once per document.
    Raises InputError when the documents longer than `length` have fewer windows of this length than requested samples.
    """
    cache: dict[int, np.ndarray | None] = {}  # None: too short, so its ids are not kept

    def long_document(index: int) -> np.ndarray | None:
        if index not in cache:
            ids = encode(documents[index])
            cache[index] = ids if len(ids) > length else None
        return cache[index]

    def check() -> None:
        """Count windows until there are enough, which is soon in most texts."""
        available = 0
        for index in range(len(documents)):
            ids = long_document(index)
            available += 0 if ids is None else len(ids) // length
            if available >= samples:
                return
        found = f"The text has {len(documents)} documents, and the longer ones hold {available} sequences"
        raise InputError(_too_short(found, length, samples))

    checked = len(documents) <= COUNTED_BEFORE
    if checked:
        check()
    draw = random.Random(seed)
    crops = []
    for _ in range(samples):
        misses = 0
        while (ids := long_document(draw.randint(0, len(documents) - 1))) is None:
            misses += 1
            if misses >= MISSES and not checked:
                check()
                checked = True
        start = draw.randint(0, len(ids) - length - 1)
        crops.append(ids[start : start + length])
    return np.stack(crops)


def windows(ids: np.ndarray, length: int, samples: int | None = None) -> np.ndarray:
    """The first `samples` (default: all) consecutive windows [n, length] of ids that do not overlap.

    A special token at the very start of the stream, such as BOS, is in the first window only, as in the published
    evaluations. Raises InputError when there are fewer windows.
    """
    available = len(ids) // length
    if available < (samples or 1):
        raise InputError(_too_short(f"The text has {len(ids)} tokens, {available} windows", length, samples or 1))
    return ids[: (samples or available) * length].reshape(-1, length)


def _too_short(found: str, length: int, samples: int) -> str:
    return (
        f"{found} of {length} tokens, but {samples} are requested: give more text, fewer samples or a shorter length."
    )


def sequences(
    tokenizer: PreTrainedTokenizerBase, documents: Sequence[str], cut: Spec, sampling: str, join: str = "\n\n"
) -> tuple[np.ndarray, int | None]:
    """Tokens [n, length] int64 of documents, and their total number of tokens: None if only the drawn documents are
    tokenised.

    cut: {length, samples, seed}. sampling: "stream" or "documents" (random draws), or "windows" (from the beginning).
    Raises InputError when the documents are too short.
    """
    length = cut["length"]
    if sampling == "documents":
        draws = (cut["samples"], length, cut["seed"])
        return sample_documents(lambda document: encode(tokenizer, document), documents, *draws), None
    stream = encode_stream(tokenizer, documents, join)
    if sampling == "stream":
        return sample_stream(stream, cut["samples"], length, cut["seed"]), len(stream)
    return windows(stream, length, cut.get("samples")), len(stream)


def tokens(
    model: Spec, text: Spec, cut: Spec, task: str, read: Text | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """Tokens [n, length] int64 of a config's calibration or evaluation entry (`cut`), and their provenance.

    task: "calibration" or "evaluation". read: the text's documents, if they have been read. Raises InputError, which
    names the text, when it cannot be read or is too short, and InputError, which names the model's folder, when its
    tokenizer gives other ids for the text than its tokenizer.json.
    """
    read = read or read_text(text)
    found = read.documents
    tokenizer, replaced = load_and_tell(model, found)
    length, join = cut["length"], text.get("join", "\n\n")
    sampling = cut.get("sampling", "stream") if task == "calibration" else "windows"
    try:
        drawn, count = sequences(tokenizer, found, cut, sampling, join)
    except InputError as error:
        raise InputError(f"{text.get('path') or text['hub']}: {error}") from None
    return drawn, {
        "dataset": dataset_of(text),
        "sha256": text_hash(found, join),
        "normalised": read.normalised,
        "documents": len(found),
        "tokens_in_text": count,
        "sampling": sampling,
        "samples": len(drawn),
        "length": length,
        "seed": cut.get("seed"),
        "tokenizer": type(tokenizer).__name__,
        "tokenizer_replaced": replaced,  # parts in which the file differs from the class
        "vocabulary": len(tokenizer),
    }


def read_tokens(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """Tokens [n, length] int64 from a file of main(), and their provenance.

    Raises InputError for another kind of file, and for a damaged file, which is set aside.
    """
    return _read_tensor(path, "tokens")


def read_sketch(path: Path) -> np.ndarray:
    """The sketch [k] uint64 (`ngrams.text_sketch`) of the whole text, from such a file; raises the same."""
    return _read_tensor(path, "sketch")[0]


def _read_tensor(path: Path, name: str) -> tuple[np.ndarray, dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            found, info = file.get_tensor(name), json.loads((file.metadata() or {})["info"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        sentence = f"{path} must hold the tensor {name!r} and its 'info': {error}"
        known = isinstance(error, OSError) or refused(error) or out_of_memory(error)
        raise InputError(f"{sentence}." if known else f"{sentence}; {set_aside(path)}.") from error
    hashes = {each: info.pop(f"{each}_sha256", None) for each in ("tokens", "sketch")}
    if hashes[name] not in (None, tokens_hash(found)):
        raise InputError(f"{path} is damaged: its tensor {name!r} has changed since it was written; {set_aside(path)}.")
    return found, info


def tokens_hash(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens).data).hexdigest()


def main(argv: list[str] | None = None) -> None:
    from safetensors.numpy import save_file

    parser = argparse.ArgumentParser(description=__doc__)
    tasks = parser.add_subparsers(dest="task", required=True)
    for task in ("calibration", "evaluation"):
        command = tasks.add_parser(task)
        command.add_argument("--model", type=json.loads, required=True, help="the model's config entry, as JSON")
        command.add_argument("--text", type=json.loads, required=True, help="the text's config entry, as JSON")
        command.add_argument(f"--{task}", dest="cut", type=json.loads, required=True, help="its config entry, as JSON")
        command.add_argument("--out", type=Path, required=True, help="safetensors file for the tokens")
    args = parser.parse_args(argv)

    read = read_text(args.text)
    drawn, info = tokens(args.model, args.text, args.cut, args.task, read)
    tensors = {"tokens": np.ascontiguousarray(drawn), "sketch": text_sketch(read.documents)}
    info |= {f"{name}_sha256": tokens_hash(tensor) for name, tensor in tensors.items()}
    with whole_file(args.out) as part:
        save_file(tensors, part, metadata={"info": json.dumps(info, sort_keys=True)})


if __name__ == "__main__":
    report_errors(main, sys.argv[1:])
