"""Files, errors, devices, memory and provenance."""
