"""One cell: solve, verify, score."""
