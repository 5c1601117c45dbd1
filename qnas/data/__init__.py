"""Images wherever they lie, decoded, split and batched."""
