"""From a config to a grid of cells, and what they cost. Free of torch."""
