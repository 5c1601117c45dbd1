"""Networks with weights from elsewhere, the spaces around them, and supernets that start from them."""
