"""Image data sets: reading, decoding, splits and batches."""
