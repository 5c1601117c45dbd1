"""Errors, whole files or none, shipped files, units, intervals, progress: what every room uses."""
