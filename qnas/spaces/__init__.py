"""Search spaces and architectures, and their lowering to layers."""
