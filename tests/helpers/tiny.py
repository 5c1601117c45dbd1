"""Spaces small enough to search in seconds."""

TINY_SPACE = """\
schema: qnas.space/1
name: tiny
source: made for tests
input: {channels: 3, resolution_px: 32}
norm: layernorm
activation: gelu
stem: {channels: 8, kernel: 2, stride: 2}
transition: conv
candidates:
  - {block: quadra, kernel: [3, 5], expansion: [2, 4]}
  - {block: identity}
stages:
  - {channels: 8, positions: 2, stride: 1}
  - channels: 16
    positions: 2
    stride: 2
    candidates: [{block: quadra, kernel: 3, expansion: 2}, {block: identity}]
head: {classes: 10}
"""

# the same layout with two kinds of blocks in the first stage and in the second
TWO_KINDS = """\
schema: qnas.space/1
name: two-kinds
source: made for tests
input: {channels: 3, resolution_px: 32}
norm: layernorm
activation: gelu
stem: {channels: 8, kernel: 2, stride: 2}
transition: conv
candidates:
  - {block: quadra, neuron: [linear, quadranet], kernel: [3, 5], expansion: 2}
  - {block: identity}
stages:
  - {channels: 8, positions: 2, stride: 1}
  - {channels: 16, positions: 2, stride: 2}
head: {classes: 10}
"""
