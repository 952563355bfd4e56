"""Turn cells into tables."""
