"""Fast kernels for the quadratic operator and for the two halves of a QuadraBlock."""
