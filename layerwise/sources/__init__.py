"""Where models and texts come from, by name and header only."""
