"""Training of anything that has weights, and of one network by itself."""
