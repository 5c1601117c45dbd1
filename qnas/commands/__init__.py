"""The commands: they parse, call the API and print. Heavy imports are inside the functions."""
