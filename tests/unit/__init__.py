"""One file a module."""
