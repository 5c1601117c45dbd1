"""Kernels of the quadratic operator and of the blocks around it, faster than torch's own operators."""
