"""The contract of a method: its inputs and its results."""
