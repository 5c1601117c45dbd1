"""Fitting the models of the shipped devices to published measurements, for make_tables.py alone."""
