"""Modules: the quadratic operator, blocks, subnets and the supernet."""
