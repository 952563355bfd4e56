"""A compressed cell for other tools: saving, auditing, decoding."""
