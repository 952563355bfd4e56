"""Where to draw the nodes of a graph without cycles: in layers from left to right, with few crossings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

SWEEPS = 12
Edge = tuple[str, str]


@dataclass(frozen=True)
class Layering:
    """places: (layer, height) of every node and of every point where a way crosses a layer; heights of one layer are 1
    apart and centred on 0. ways: of every edge, the nodes and points that it leads along."""

    places: Mapping[str, tuple[int, float]]
    ways: Sequence[Sequence[str]]


def layered(nodes: Sequence[str], edges: Sequence[Edge]) -> Layering:
    """The layers of a graph: each node right of all that lead to it, and near the middle of what it is joined to."""
    layer = _layers(nodes, edges)
    ways = [_way(edge, layer) for edge in edges]
    steps = [step for way in ways for step in pairwise(way)]
    height = _heights(layer, steps)
    return Layering({node: (own, height[node]) for node, own in layer.items()}, ways)


def _layers(nodes: Sequence[str], edges: Sequence[Edge]) -> dict[str, int]:
    """Node -> length of the longest way to it; a node to which none leads is just left of those it leads to."""
    before = {node: [a for a, b in edges if b == node] for node in nodes}
    after = {node: [b for a, b in edges if a == node] for node in nodes}

    def depth(node: str) -> int:
        return 1 + max((depth(own) for own in before[node]), default=-1)

    found = {node: depth(node) for node in nodes}
    first = [node for node in nodes if not before[node] and after[node]]
    return found | {node: min(found[own] for own in after[node]) - 1 for node in first}


def _way(edge: Edge, layer: dict[str, int]) -> list[str]:
    """The ends of an edge and a point in every layer between them, which is added to the layers."""
    first, second = edge
    points = {f"{first} > {second} {own}": own for own in range(layer[first] + 1, layer[second])}
    layer |= points
    return [first, *points, second]


def _heights(layer: Mapping[str, int], steps: Sequence[Edge]) -> dict[str, float]:
    """Heights by the barycentre method: each layer is ordered by the mean height of what its nodes are joined to."""
    columns = [[node for node in layer if layer[node] == own] for own in range(max(layer.values()) + 1)]
    height = {node: place for column in columns for node, place in zip(column, _spread(len(column)), strict=True)}
    before = {node: [a for a, b in steps if b == node] for node in layer}
    after = {node: [b for a, b in steps if a == node] for node in layer}
    for sweep in range(SWEEPS):
        near = after if sweep % 2 else before
        for column in columns[::-1] if sweep % 2 else columns:
            wanted = {n: sum(height[own] for own in near[n]) / len(near[n]) if near[n] else height[n] for n in column}
            ordered = sorted(column, key=wanted.__getitem__)
            height |= dict(zip(ordered, _spread(len(column)), strict=True))
    return height


def _spread(count: int) -> list[float]:
    """Heights 1 apart, centred on 0."""
    return [place - (count - 1) / 2 for place in range(count)]
