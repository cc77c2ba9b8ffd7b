"""Processes killed in the middle of things."""
