"""The storage of a compressed layer on disk, and its size."""
