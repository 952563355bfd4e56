"""n-grams by hash: the share of one set of tokens in another, and sketches for comparing whole texts."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

NGRAM = 50  # tokens, about two sentences, which two texts do not share by chance
RUN = 200  # bytes of a text, about the length of NGRAM tokens
SKETCH = 2**16  # number of hashes kept per text; enough to find a text in another that is a thousand times longer
FEWEST = 50  # with fewer hashes, a share would be meaningless
AT_ONCE = 2**15  # n-grams hashed at a time, so that arrays stay in the processor's cache
BLANKS = b" \t\n\v\f"  # omitted from a sketch, because joins, line breaks and indentation do not make a different text

# A polynomial in BASE modulo 2**64 of mixed values: two different n-grams collide with a probability of about 2**-64.
BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 2**64)


def _mixed(values: np.ndarray) -> np.ndarray:
    """The integers mapped one-to-one over uint64 by the finaliser of SplitMix64."""
    x = values.astype(np.uint64) + np.uint64(BASE)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


BYTES = _mixed(np.arange(256))  # mixed value of each byte, [256] uint64


def hashes(values: np.ndarray, width: int) -> np.ndarray:
    """The hash of each run of `width` values along the last axis, stride 1: [..., n] uint64 -> [..., n - width + 1].

    values: mixed. Equal runs have equal hashes.
    """
    n = values.shape[-1]
    if n < width:
        return np.empty((*values.shape[:-1], 0), np.uint64)
    sums = np.zeros((*values.shape[:-1], n + 1), np.uint64)
    np.cumsum(values * _powers(BASE, n), axis=-1, out=sums[..., 1:])
    return _mixed((sums[..., width:] - sums[..., :-width]) * _powers(INVERSE, n - width + 1))


@lru_cache(maxsize=4)
def _powers(base: int, count: int) -> np.ndarray:
    """The first `count` powers of an odd number modulo 2**64, from exponent 1, [count] uint64."""
    return np.cumprod(np.full(count, base, np.uint64))


def token_hashes(tokens: np.ndarray) -> np.ndarray:
    """The hash of every NGRAM consecutive tokens of a sequence: [n, length] integers -> [n * (length - NGRAM + 1)]."""
    count, length = tokens.shape
    rows = max(1, AT_ONCE // length)
    chunks = (
        tokens[row : row + rows, start : start + AT_ONCE + NGRAM - 1]
        for row in range(0, count, rows)
        for start in range(0, length - NGRAM + 1, AT_ONCE)
    )
    return np.concatenate([np.empty(0, np.uint64), *(hashes(_mixed(chunk), NGRAM).ravel() for chunk in chunks)])


def share(tokens: np.ndarray, others: np.ndarray) -> float | None:
    """Share of the n-grams of token sequences [n, length] that are among those of others [m, length'], 0 to 1.

    None if sequences of either are shorter than an n-gram.
    """
    own, known = token_hashes(tokens), token_hashes(others)
    return float(np.isin(own, known).mean()) if len(own) and len(known) else None


def text_sketch(documents: Sequence[str]) -> np.ndarray:
    """The SKETCH smallest hashes [k] uint64, sorted, of all runs of RUN bytes in a text; all hashes for a short
    text."""
    smallest, waiting = np.empty(0, np.uint64), []
    for piece in _pieces(documents):
        found = hashes(BYTES[np.frombuffer(piece, np.uint8)], RUN)
        waiting.append(found[found < smallest[-1]] if len(smallest) == SKETCH else found)
        if sum(map(len, waiting)) >= SKETCH:
            smallest, waiting = _smallest(smallest, *waiting), []
    return _smallest(smallest, *waiting)


def _smallest(*found: np.ndarray) -> np.ndarray:
    """The SKETCH smallest distinct hashes, sorted."""
    ordered = np.sort(np.concatenate(found))  # np.unique takes four times as long
    return ordered[np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]][:SKETCH]


def _pieces(documents: Sequence[str]) -> Iterator[bytes]:
    """The joined documents in UTF-8 without blanks, in pieces that overlap by the end of the previous piece."""
    held = bytearray()
    for document in documents:
        for start in range(0, len(document), AT_ONCE):
            held += document[start : start + AT_ONCE].encode().translate(None, BLANKS)
            while len(held) >= AT_ONCE:
                yield bytes(held[:AT_ONCE])
                del held[: AT_ONCE - RUN + 1]
    yield bytes(held)


def sketched_share(sketch: np.ndarray, other: np.ndarray) -> float | None:
    """Share of a text's runs that occur in another text, estimated from both sketches, 0 to 1.

    None if the texts are too short, or their lengths too different, for an estimate.
    """
    full = [each[-1] for each in (sketch, other) if len(each) == SKETCH]
    # Up to the smaller of the two last hashes, both sketches are complete.
    own = sketch[sketch <= min(full)] if full else sketch
    return float(np.isin(own, other).mean()) if len(own) >= FEWEST else None
