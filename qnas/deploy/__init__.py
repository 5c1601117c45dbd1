"""Export of trained networks, and timing of networks on devices."""
