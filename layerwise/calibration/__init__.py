"""Tokens through blocks to Grams."""
