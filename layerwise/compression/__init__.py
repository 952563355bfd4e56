"""Compute one cell: solve, verify, score."""
