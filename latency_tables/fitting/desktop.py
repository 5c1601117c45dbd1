"""The fitted terms of kernel costs on GPUs and desktop CPUs, for the throughputs that timm publishes.

Milliseconds are for one image. On a GPU a batch is large: launches overlap with work and weights are read
once for hundreds of images, so only arithmetic and maps cost. Tensor cores compute in tiles, so channels
count as full tiles; several tile sizes are offered, and the fit chooses. A convolution takes the longer of
its arithmetic and its transfers, with a smooth corner between them (mmacs_roof). All else is passes over
maps.

An eager runtime launches every operator. A convolution without batch normalisation has a bias, which cuDNN
adds in a pass of its own, so a convolution is priced with one pass over its output in either case.
torch.compile fuses chains of elementwise operators into one pass, whose cost is that of its maps: one read
and one written, and one more read for each sum or product. A pooling that ends a chain after a swish is slow.

On a CPU at batch 1, every kernel is dispatched by itself, weights stream from memory, and maps that outgrow a
cache cost more.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from fitting.fit import Column, Form
from qnas.latency.kernels import MOST_MAPS

_TILED = (
    "mmacs",
    "mmacs_c8",
    "mmacs_i8_c32",
    "mmacs_i32_c32",
    "mmacs_i32_c64",
    "mmacs_c64",
    "mmacs_i64_c128",
    "mmacs_i64_c256",
    "mmacs_roof_32",
    "mmacs_roof_64",
    "mmacs_roof_128",
    "mmacs_roof_256",
)
_MAPS = ("kelements_in", "kelements_out")
_DENSE = ("launch", *_TILED, *_MAPS, "kcolumns")
_STRIDED = ("strided_kelements_in", "strided_mmacs")
_DEPTHWISE = (
    "launch",
    "mmacs",
    *_MAPS,
    "kelements_out_k3",
    "kelements_out_k5",
    "kelements_out_k7",
    "kelements_out_k9",
    "mmacs_k9",
    "strided_kelements_in",
    "strided_kelements_out_k3",
    "strided_kelements_out_k5",
)
# of maps that have 2^31 bytes in a batch of 1024
_LARGE = ("kelements_out_above_1024",)
_GROUPED = (
    "launch",
    "mmacs",
    "mmacs_c8",
    "mmacs_i16_c16",
    "mmacs_i32_c32",
    "mmacs_pow2",
    "mmacs_roof_64",
    *_MAPS,
    "kcolumns",
    *_STRIDED,
    "strided_kelements_out",
)
# What a GPU does in kernels of their own for groups of 4 to 32 channels; wider ones are products in tiles.
_WIDE_GROUPS = (
    *(f"kelements_in_wide{width}" for width in (8, 16, 32)),
    "mmacs_i32_c64_wide32",
    "mmacs_i64_c64_wide32",
)
_CONVOLUTIONS: dict[str, tuple[str, ...]] = {
    "conv1x1": (*_DENSE, *_STRIDED),
    "conv": (*_DENSE, *_STRIDED, "mmacs_k5"),
    "patch": ("launch", "mmacs_i32_c64", *_MAPS),
    "stem": ("launch", "mmacs_i8_c32", "mmacs_i32_c64", *_MAPS),
    "linear": _DENSE,
    "vector": ("launch", "kweights", "kchannels_out"),
    "dwconv": _DEPTHWISE,
    "gconv": (*_GROUPED, *_WIDE_GROUPS),
}
# Kinds of one pass, or of a copy.
_READS = ("gap", "layernorm", "groupnorm", "shift")
_COPIES = ("concat", "split", "pad", "reflect_pad", "upsample", "maxpool", "avgpool")
_OTHERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_READS, ("launch", "kelements_in")),
    **dict.fromkeys(_COPIES, ("launch", *_MAPS)),
    "avgpool": ("launch", *_MAPS, "unstrided_kelements_in"),  # each pixel is read for each window
    # of weights, once for all images; a view; one number
    **dict.fromkeys(("weight_norm", "transpose", "scalar"), ("launch",)),
}
ELEMENTWISE = (
    *("relu", "leakyrelu", "gelu", "swish", "hswish", "sigmoid", "hsigmoid", "elementwise"),
    *("batchnorm", "scale", "add", "mul"),
)
# Those that an eager runtime runs alike: one map is read, one written, with next to no arithmetic.
_SCALED = ("relu", "mul_scalar")
PASSES = tuple(
    f"pass{f'+{maps}' if maps else ''}{function}{gap}"
    for maps in range(MOST_MAPS + 1)
    for function in ("", "-swish", "-gelu")
    for gap in ("", "-gap")
)


def _shared_passes() -> dict[str, dict[Column, float]]:
    """Return the shared weights of fused chains: what they read and write, and what they compute."""

    def of(feature: str, *words: str) -> dict[Column, float]:
        return {(kind, feature): 1.0 for kind in PASSES if all(word in kind for word in words)}

    maps = {(kind, "kelements_in"): float(kind[5]) for kind in PASSES if kind.startswith("pass+")}
    return {
        "pass.launch": of("launch"),
        "pass.kelements": of("kelements_in"),
        "map.kelements": maps,
        "swish.kelements": of("kelements_in", "-swish"),
        "gelu.kelements": of("kelements_in", "-gelu"),
        "gap.kelements": of("kelements_in", "-gap"),
        "swish-gap.kelements": of("kelements_in", "-swish-gap"),
    }


@dataclass(frozen=True)
class Chip:
    """What bounds costs on a GPU from below: memory, and float32 arithmetic outside tensor cores."""

    bytes_per_s: float
    macs_per_s: float

    def floors(self, element_bytes: int) -> dict[str, float]:
        """Return lower bounds of weights: a share of what a pass moves, and depthwise multiply-adds.

        A pass reads a map and writes one; a sum or product reads one more. Totals alone do not tell a pass
        from what the convolution before it writes, and would put some passes below what memory can move.
        """
        moved = 1e6 * element_bytes / self.bytes_per_s  # ms for a thousand elements
        side = 0.6 * moved  # one map
        return {
            "launch": 1e-6,
            "pass.launch": 1e-6,
            "pass.kelements": 2 * side,
            "map.kelements": side,
            "dwconv.mmacs": 1e9 / self.macs_per_s,
            **{f"{kind}.kelements_in": (3 if kind in ("add", "mul") else 2) * side for kind in ELEMENTWISE},
            **{f"{kind}.kelements_in": 0.25 * moved for kind in (*_READS, *_COPIES)},
            **{f"{kind}.kelements_in": 2 * side for kind in ("layernorm", "groupnorm")},
            "gap.kelements_in": side,
        }


CHIPS = {
    "rtx3090": Chip(936e9, 17.8e12),
    "rtx4090": Chip(1008e9, 41.3e12),
    "rtx5090": Chip(1792e9, 52.4e12),
}


def eager(floors: Mapping[str, float]) -> Form:
    """Return the terms of a GPU whose operators are launched one by one."""
    passes = dict.fromkeys((kind for kind in ELEMENTWISE if kind not in _SCALED), ("launch", "kelements_in"))
    shared: dict[str, dict[Column, float]] = {
        f"pass.{name}": {(kind, feature): 1.0 for kind in _SCALED}
        for name, feature in (("launch", "launch"), ("kelements", "kelements_in"))
    }
    depthwise = {"dwconv": (*_DEPTHWISE, *_LARGE)}
    return Form(own={**_CONVOLUTIONS, **depthwise, **_OTHERS, **passes}, shared=shared, floors=floors)


def compiled(floors: Mapping[str, float]) -> Form:
    """Return the terms of a GPU whose elementwise operators torch.compile has fused."""
    return Form(own={**_CONVOLUTIONS, **_OTHERS}, shared=_shared_passes(), floors=floors)


_CACHES = tuple(f"kelements_{side}_above_{size}" for side in ("in", "out") for size in (1024, 4096))
_WEIGHTS = ("kweights", "kweights_above_256", "kweights_above_1024", "kweights_above_4096")
_CPU_DENSE = (
    "launch",
    "mmacs",
    "mmacs_i16_c16",
    "mmacs_i16_c64",
    "mmacs_r14_i16_c16",
    "mmacs_r28_i16_c64",
    *_MAPS,
    *_CACHES,
    *_WEIGHTS,
    "kcolumns",
)
_CPU_PASS = (
    "launch",
    "kelements_in",
    "kelements_in_above_256",
    "kelements_in_above_1024",
    "kelements_in_above_4096",
)


def desktop_cpu() -> Form:
    """Return the terms of a CPU at batch 1, compiled."""
    own = {
        "conv1x1": (*_CPU_DENSE, *_STRIDED),
        "conv": (*_CPU_DENSE, *_STRIDED, "mmacs_k5"),
        "patch": ("launch", "mmacs_i16_c16", *_MAPS, "kweights"),
        "stem": (*_CPU_DENSE, *_STRIDED),
        "linear": _CPU_DENSE,
        "vector": ("launch", *_WEIGHTS),
        "dwconv": (*_DEPTHWISE, *_CACHES, "kchannels_out"),
        "gconv": (*_GROUPED, *_WEIGHTS),
        **dict.fromkeys((*_READS, "weight_norm"), _CPU_PASS),
        **dict.fromkeys(_COPIES, (*_CPU_PASS, "kelements_out")),
        **dict.fromkeys(("transpose", "scalar"), ("launch",)),
    }
    floors = {
        "launch": 1e-4,
        "pass.launch": 1e-4,
        "pass.kelements": 2e-6,  # out of a cache, by all cores
        "dwconv.mmacs": 1e-6,
        **{f"{kind}.kelements_in": 2e-6 for kind in (*_READS, *_COPIES)},
    }
    shared = _shared_passes()
    for size in (256, 1024, 4096):
        shared[f"pass.above_{size}"] = {(kind, f"kelements_in_above_{size}"): 1.0 for kind in PASSES}
    shared["gap.launch"] = {(kind, "launch"): 1.0 for kind in PASSES if kind.endswith("-gap")}
    return Form(own=own, shared=shared, floors=floors)
