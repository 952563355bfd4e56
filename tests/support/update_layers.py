"""Layers on which the tests compare a method that updates weights column by column with an oracle."""

from layerwise.checks.layer_cases import Recipe

LAYERS = {
    "correlated": Recipe(out=6, inputs=24),
    "dead inputs": Recipe(out=6, inputs=24, dead=(3, 8, 9, 10, 11)),
    "fewer tokens than inputs": Recipe(out=6, inputs=24, sequences=1, length=9),
    "22 inputs": Recipe(out=5, inputs=22),
}
