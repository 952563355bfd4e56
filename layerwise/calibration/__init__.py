"""Calibration: run tokens through the blocks and collect Grams."""
