"""Turn a config into a grid of cells, and estimate their cost. Does not import torch."""
