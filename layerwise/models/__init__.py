"""Loading, structure and streaming of models."""
