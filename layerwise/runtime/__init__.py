"""Helpers for files, errors, devices, memory and provenance."""
