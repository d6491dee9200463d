"""A run between two steps: its state in a file, its identity, its cost and its record."""
