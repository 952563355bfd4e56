"""n-grams by hash against sets of n-grams, and the sketch of a text against all of its runs."""

import random

import numpy as np
import pytest

from layerwise.sources import ngrams


def grams(rows: np.ndarray) -> list[tuple[int, ...]]:
    return [tuple(row[start : start + 50]) for row in rows.tolist() for start in range(len(row) - 49)]


def some(rows: int, length: int, seed: int, vocabulary: int = 1000) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocabulary, (rows, length))


@pytest.mark.parametrize("at_once", [13, 300, 2**15])
@pytest.mark.parametrize("vocabulary", [2, 1000])
def test_shares_are_those_of_sets_of_n_grams(monkeypatch, vocabulary, at_once):
    monkeypatch.setattr(ngrams, "AT_ONCE", at_once)  # a few rows at a time, or parts of one
    windows, drawn = some(6, 90, 0, vocabulary), some(9, 70, 1, vocabulary)
    drawn[2, 5:65] = windows[1, 20:80]  # 11 n-grams
    drawn[7, :50] = windows[5, 40:]  # 1
    drawn[8] = drawn[7]
    for one, other in ((windows, drawn), (drawn, windows)):
        known = set(grams(other))
        expected = [gram in known for gram in grams(one)]
        assert ngrams.share(one, other) == pytest.approx(np.mean(expected)) and any(expected)
    if vocabulary > 2:  # else more may be equal by chance
        assert ngrams.share(windows, drawn) == 12 / (6 * 41)
    assert ngrams.share(windows, windows) == 1.0


def test_n_grams_that_differ_anywhere_have_different_hashes():
    row = some(1, 50, 0)
    others = np.repeat(row, 51, axis=0)
    others[np.arange(50), np.arange(50)] += 1
    shuffled = row[:, ::-1]
    found = ngrams.token_hashes(np.concatenate([others, shuffled]))
    assert len(np.unique(found)) == 52  # the last of `others` is the row itself
    assert ngrams.token_hashes(np.zeros((1, 50), np.int64)) != ngrams.token_hashes(np.ones((1, 50), np.int64))


def test_no_share_of_sequences_shorter_than_an_n_gram():
    assert ngrams.share(some(4, 49, 0), some(4, 80, 0)) is None
    assert ngrams.share(some(4, 80, 0), some(4, 49, 0)) is None
    assert ngrams.share(some(4, 50, 0), some(4, 50, 0)) == 1.0


def text(count: int, seed: int) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghij", k=draw.randint(1, 9))) for _ in range(count))


@pytest.mark.parametrize("at_once", [1000, 2**15])
def test_a_sketch_is_of_all_runs_of_a_text(monkeypatch, at_once):
    monkeypatch.setattr(ngrams, "AT_ONCE", at_once)
    monkeypatch.setattr(ngrams, "SKETCH", 500)
    documents = [text(700, 0), "", text(3, 1), text(900, 2)]
    data = "".join(documents).replace(" ", "").encode()
    runs = np.stack([np.frombuffer(data[at : at + ngrams.RUN], np.uint8) for at in range(len(data) - ngrams.RUN + 1)])
    expected = np.unique(ngrams.hashes(ngrams.BYTES[runs], ngrams.RUN))[:500]
    np.testing.assert_array_equal(ngrams.text_sketch(documents), expected)
    np.testing.assert_array_equal(ngrams.text_sketch(["\n\t".join(documents)]), expected)


def test_the_share_of_a_text_in_another(monkeypatch):
    one, other = text(20_000, 0), text(20_000, 1)
    half = one[: len(one) // 2]
    for size in (ngrams.SKETCH, 4000):  # every run, and some of them
        monkeypatch.setattr(ngrams, "SKETCH", size)
        whole, part, strange = (ngrams.text_sketch([each]) for each in (one, half, other))
        assert ngrams.sketched_share(part, whole) == 1.0
        assert ngrams.sketched_share(whole, part) == pytest.approx(0.5, abs=0.03)
        assert ngrams.sketched_share(whole, strange) == ngrams.sketched_share(strange, whole) == 0.0
        short = ngrams.text_sketch([one[5000:8000]])
        assert ngrams.sketched_share(short, whole) == 1.0
    nothing = ngrams.text_sketch([])
    assert len(nothing) == 0 == len(ngrams.text_sketch(["too short"]))
    assert ngrams.sketched_share(nothing, whole) is None
