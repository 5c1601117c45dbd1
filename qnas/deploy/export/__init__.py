"""Export formats, one module each, and the check of each file against the network."""
