"""Processes: starting them, their results, and the limits they live under."""
