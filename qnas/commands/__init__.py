"""The commands: parse, call, print. Heavy imports are inside them."""
