"""Reading the outputs of the official codes in tests/data (format: tests/data/README.md)."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from layerwise.contract.layer import Gram, Layer, Statistics, Target
from tests.support.paths import DATA

APART = ("awq", "drift", "quantease", "thanos")  # names of further files
NAMES = ("L1", "L1_lowrank", "L2_dead", "L3", "L4_partial")


@dataclass(frozen=True)
class Official:
    """One layer and what the official codes made of it; every array in numpy."""

    name: str
    weight: np.ndarray  # [out, in] float32
    gram: np.ndarray  # [in, in] float32
    tokens: int
    length: int  # tokens per sequence
    cases: dict[str, dict[str, Any]]
    arrays: dict[str, np.ndarray]

    def layer(self) -> Layer:
        nothing = np.zeros(0, np.float32)
        mean, variance = self.arrays["mean"], self.arrays["sequence_variance"]
        absmean = self.arrays.get("absmean", nothing)  # of layers that AWQ was run on
        sample = self.sample if len(absmean) else nothing
        statistics = Statistics(self.length, *map(torch.tensor, (mean, absmean, variance, sample)))
        return Layer(self.name, torch.tensor(self.weight), Gram(torch.tensor(self.gram), self.tokens), statistics)

    @cached_property
    def dense_gram(self) -> np.ndarray:
        """[in, in] float32 second moment of the inputs in the dense model, of layers whose inputs have drifted."""
        return mirrored(self.arrays["dense_gram"], self.weight.shape[1])

    def drifted(self) -> Layer:
        """The layer with the cross-Gram; of layers whose inputs have drifted."""
        cross = (self.arrays["drift"].astype(np.float64) + self.gram).astype(np.float32)
        matrices = map(torch.tensor, (cross, self.dense_gram))
        return replace(self.layer(), gram=Gram(torch.tensor(self.gram), self.tokens, *matrices))

    @cached_property
    def sample(self) -> np.ndarray:
        """[in, in] float32, as good as the sampled tokens: the same second moments within every run of 128 inputs.

        Of a layer whose sample is not stored, the second moments of all tokens.
        """
        moments = self.gram.astype(np.float64)
        if "clip_gram" in self.arrays:
            moments = np.zeros_like(moments)
            for run, upper in enumerate(self.arrays["clip_gram"]):
                block = np.zeros((128, 128))
                block[np.triu_indices(128)] = upper
                moments[128 * run : 128 * (run + 1), 128 * run : 128 * (run + 1)] = block + np.triu(block, 1).T
        values, vectors = np.linalg.eigh(moments)
        root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
        return (len(moments) ** 0.5 * root).astype(np.float32)

    def target(self, case: str) -> Target:
        return Target(**self.cases[case]["target"])

    def compressed(self, case: str) -> np.ndarray:
        """[out, in] float32 as the official code left it, bit for bit; nan in rows that are not stored."""
        entry = self.cases[case]
        if entry["kind"] == "mask":
            return np.where(self.nonzero(case), self.weight, np.float32(0))
        if entry["kind"] == "sparse":
            step, mask = entry.get("row_step", 1), self.nonzero(case)
            rows = np.zeros_like(self.weight[::step])
            rows[mask[::step]] = self.arrays[f"{case}/values"]
            result = np.full_like(self.weight, np.nan)
            result[::step] = rows
            return result
        if entry["kind"] == "scale":
            return self.scaled(case, clipped=False)
        scale, zero = self.grid(case)
        return scale * (self.codes(case).astype(np.float32) - zero)

    def scaled(self, case: str, clipped: bool) -> np.ndarray:
        """[out, in] float32, Q(W s) / s of AWQ's scales s, W s clipped or not, with the released code's quantiser."""
        target, scale = self.target(case), self.arrays[f"{case}/input_scale"]
        assert target.bits is not None and target.group is not None
        weight, most = (self.weight * scale).reshape(len(self.weight), -1, target.group), 2**target.bits - 1
        if clipped:
            limits = self.arrays[f"{case}/clip"][:, :, None]
            weight = weight.clip(-limits, limits)
        low, high = weight.min(2, keepdims=True), weight.max(2, keepdims=True)
        step = (high - low).clip(min=np.float32(1e-5)) / np.float32(most)
        zero = (-np.rint(low / step)).clip(0, most)
        codes = (np.rint(weight / step) + zero).clip(0, most)
        return ((codes - zero) * step).reshape(self.weight.shape) / scale

    def nonzero(self, case: str) -> np.ndarray:
        """[out, in] bool, where the official weight is not zero."""
        if f"{case}/mask" not in self.arrays:
            return self.compressed(case) != 0
        bits = np.unpackbits(self.arrays[f"{case}/mask"], count=self.weight.size)
        return bits.reshape(self.weight.shape).astype(bool)

    def codes(self, case: str) -> np.ndarray:
        """[out, in] integer codes."""
        bits = self.target(case).bits
        assert bits is not None
        if f"{case}/codes" not in self.arrays:
            scale, zero = self.grid(case)
            return np.clip(np.rint(self.weight / scale) + zero, 0, 2**bits - 1).astype(np.uint8)
        digits = np.unpackbits(self.arrays[f"{case}/codes"], count=self.weight.size * bits).reshape(-1, bits)
        return (digits @ (1 << np.arange(bits)[::-1])).astype(np.uint8).reshape(self.weight.shape)

    def grid(self, case: str) -> tuple[np.ndarray, np.ndarray]:
        """Scale and zero [out, in] of every weight."""
        group_of = self.group_of(case)
        return self.arrays[f"{case}/scale"][:, group_of], self.arrays[f"{case}/zero"][:, group_of]

    def group_of(self, case: str) -> np.ndarray:
        """[in] group of every input; runs of inputs where the file says nothing else."""
        inputs = self.weight.shape[1]
        if f"{case}/group" in self.arrays:
            return self.arrays[f"{case}/group"]
        return np.arange(inputs) // (self.target(case).group or inputs)

    def output_error(self, compressed: np.ndarray) -> float:
        gram, weight = torch.tensor(self.gram).double(), torch.tensor(self.weight).double()
        lost = weight - torch.tensor(compressed)
        return float(((lost @ gram) * lost).sum() / ((weight @ gram) * weight).sum())


def mirrored(entries: np.ndarray, size: int) -> np.ndarray:
    """The symmetric matrix [size, size] of an upper triangle, row by row."""
    upper = np.zeros((size, size), np.float32)
    upper[np.triu_indices(size)] = entries
    return upper + np.triu(upper, 1).T


@cache
def load(name: str) -> Official:
    with safe_open(DATA / f"official-{name}.safetensors", "numpy") as file:
        metadata = file.metadata()
        arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    about = json.loads(metadata["layer"])
    cases = {case["id"]: case for case in json.loads(metadata["cases"])}
    for more in APART:
        with safe_open(DATA / f"official-{more}.safetensors", "numpy") as file:
            cases |= {case["id"]: case for case in json.loads(file.metadata()["cases"]).get(name, [])}
            own = [key for key in file.keys() if key.startswith(f"{name}/")]  # noqa: SIM118 (not a dict)
            arrays |= {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in own}
    weight = (arrays.pop("weight").astype(np.uint32) << 16).view(np.float32)
    gram = mirrored(arrays.pop("gram"), about["inputs"])
    return Official(name, weight, gram, about["tokens"], about["length"], cases, arrays)


def cases(method: str, keep=lambda case: True) -> list[tuple[str, str]]:
    """(layer, case) pairs of a method, for parametrize."""
    return [
        (name, case)
        for name in NAMES
        for case, entry in load(name).cases.items()
        if entry["method"] == method and keep(entry)
    ]
