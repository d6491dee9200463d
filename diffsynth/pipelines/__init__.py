"""Orchestration: from a prompt and a reference video to frames."""
