"""The embedded model: its text, its tasks and its training."""
