"""The run folder, and everything that is read back from it."""
