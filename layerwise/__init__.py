"""A benchmark and reproducibility suite for layer-wise compression of large language models."""
