"""Device models fitted to measurements."""
