"""Options of a run, known checkpoints and their defaults; nothing here loads torch."""
