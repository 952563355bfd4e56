"""Locate and check models and texts, by name and header only."""
