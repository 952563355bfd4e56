"""How a compressed layer is kept on disk, and its size."""
