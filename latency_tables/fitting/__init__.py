"""Fits of the shipped devices' models to published measurements, used by make_tables.py only."""
