"""Perplexity and tasks of a compressed model, and the check of a dense model."""
