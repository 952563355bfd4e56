"""Perplexity, divergence and tasks of a compressed model."""
