"""Pure functions on matrices; the torch reference of every kernel."""
