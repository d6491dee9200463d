"""Prompt cleaning, tokenising and encoding."""
