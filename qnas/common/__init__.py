"""Helpers for every room: errors, atomic files, shipped files, units, intervals, progress."""
