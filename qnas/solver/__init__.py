"""The exact solve: limits, the k best networks within them, and their certificates."""
