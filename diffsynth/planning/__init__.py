"""Predict cost and memory of a run, and find the settings that fit."""
