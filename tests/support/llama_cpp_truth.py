"""A GGUF file as llama.cpp reads it, beside what this project makes of it: tokens and logits, printed.

    python -m tests.support.llama_cpp_truth FILE.gguf

llama-cpp-python must be installed; the project does not depend on it. Products with codes llama.cpp computes of inputs
that it rounds to eight bits, so the file is first written in float32 by llama.cpp itself, and its keys and values are
kept in float32.
"""

import argparse
import ctypes
import importlib
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from layerwise.models.loading import load
from layerwise.sources import gguf_conversion
from layerwise.sources.tokenizer_files import encode, load_tokenizer

PARTS = (
    *("2026", "19,5", "3.14159", "1234567", "٣٤٥", "½", "Ⅷ", "²³", "𝟘𝟙", "〇", "1a2b", "v2.0.1", "a1"),  # digits
    *("naïve", "café", "e\u0301", "Ångström", "ﬁne", "Größe", "ſ", "İ", "ǅ"),  # accents
    *("日本語", "你好", "мир", "שלום", "مرحبا", "हिन्दी", "ไทย", "한국어"),  # scripts
    *("😀", "👩\u200d👩\u200d👧", "🇩🇪", "🏳️\u200d🌈", "😀🏽", "a\u200bb", "\ufeff"),  # emoji, joiners
    *("  ", "   ", "\t", "\t\t", "\r", "\x0b", "\x85", "\u00a0", "\u2003", "\u2028", "\u3000"),  # blanks
    *("don't", "WE'LL", "it’s", "'s", "x_1**2", "def f(x):", "!=", "...", "—", "<b>", "&amp;", "http://a.b/c?d=1"),
)


def lines(count: int, seed: int = 0) -> Iterator[str]:
    """Lines of up to fourteen parts, with none, one or more blanks after each."""
    draw = random.Random(seed)
    for _ in range(count):
        yield "".join(draw.choice(PARTS) + draw.choice(["", " ", " ", "  "]) for _ in range(draw.randint(1, 14)))


def in_float32(llama_cpp: Any, file: Path, out: Path) -> None:
    """Let llama.cpp write a file again with every tensor in float32."""
    how = llama_cpp.llama_model_quantize_default_params()
    how.ftype, how.allow_requantize, how.nthread = llama_cpp.LLAMA_FTYPE_ALL_F32, True, 2
    if llama_cpp.llama_model_quantize(str(file).encode(), str(out).encode(), ctypes.byref(how)):
        sys.exit(f"llama.cpp cannot write {file} in float32")


def main(argv: list[str] | None = None) -> None:
    llama_cpp: Any = importlib.import_module("llama_cpp")

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--lines", type=int, default=1000)
    parser.add_argument("--length", type=int, default=256, help="tokens whose logits are compared")
    args = parser.parse_args(argv)
    spec = {"gguf": str(args.file), "name": args.file.stem, "dtype": "float32"}
    folder = gguf_conversion.converted(spec)
    tokenizer = load_tokenizer(spec)
    asked = {"n_ctx": args.length, "n_batch": args.length, "logits_all": True, "verbose": False, "flash_attn": False}
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain.gguf"
        in_float32(llama_cpp, args.file, plain)
        llama = llama_cpp.Llama(str(plain), type_k=0, type_v=0, **asked)  # 0: float32
        texts = list(lines(args.lines))
        own = [encode(tokenizer, text).tolist() for text in texts]
        theirs = [llama.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
        other = [(text, *both) for text, *both in zip(texts, own, theirs, strict=True) if both[0] != both[1]]
        print(f"tokens: {len(texts) - len(other)} of {len(texts)} lines equal")
        for text, *both in other[:5]:
            print(f"  {text!r}: {both[0]} here, {both[1]} there")
        tokens = [token for line in theirs for token in line][: args.length]
        llama.eval(tokens)
        expected = np.array(llama.scores[: len(tokens)], dtype=np.float64)
        llama.close()
    with torch.no_grad():
        found = load({"path": str(folder)})(torch.tensor([tokens])).logits[0].double().numpy()
    same = float((found.argmax(1) == expected.argmax(1)).mean())
    print(f"logits of {len(tokens)} tokens: largest {abs(expected).max():.4g}, ", end="")
    print(f"largest difference {abs(found - expected).max():.3g}, same most likely token {same:.4f}")


if __name__ == "__main__":
    main()
