"""Spread a budget over layers: levels that meet a budget, and the exact choice from a table of errors."""
