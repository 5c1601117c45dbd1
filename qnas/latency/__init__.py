"""What a network takes on a device: device files, kernels and their cost, tables. No torch in here."""
