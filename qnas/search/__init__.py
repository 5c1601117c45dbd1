"""The search: supernet training, measured effects, ranking, and the result."""
