"""A trained network as files, and time measured on devices."""
