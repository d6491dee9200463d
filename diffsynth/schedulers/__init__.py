"""Noise schedules and solvers for flow matching."""
