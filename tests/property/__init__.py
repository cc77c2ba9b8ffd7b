"""Models against which hypothesis drives the real thing."""
