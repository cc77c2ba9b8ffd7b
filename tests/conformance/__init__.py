"""What the standard library promises, under every start method."""
