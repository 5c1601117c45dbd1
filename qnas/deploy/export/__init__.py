"""Exported files, one module a format, each checked against the network."""
