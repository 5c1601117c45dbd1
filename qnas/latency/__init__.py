"""Latencies of networks on devices: device files, kernels and their cost, tables. Without torch."""
