"""Budgets spread over layers: levels that hold a budget, and the exact choice from a table of errors."""
