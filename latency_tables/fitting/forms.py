"""The fitted terms of kernel costs on each edge device, and their constants.

Each term has a meaning on the device. Elementwise operators are counted in passes over a map, by the
data that they move: a read and a write are one pass, a further operand is half a pass. The number of
passes of an operator follows from how the runtime executes it; it is not fitted.
"""

from collections.abc import Mapping

from fitting.fit import Column, Form


def _passes(name: str, multiples: Mapping[str, float]) -> dict[str, dict[Column, float]]:
    """Return the shared weights of a pass over a map: its launch, and its elements."""
    return {
        f"{name}.launch": {(kind, "launch"): times for kind, times in multiples.items()},
        f"{name}.kelements": {(kind, "kelements_in"): times for kind, times in multiples.items()},
    }


_DEPTHWISE = (
    "launch",
    "mmacs",
    "mmacs_row",
    "kelements_in",
    "kelements_in_above_256",
    "kelements_out",
    "kelements_out_k5",
    "klines",
    "kchannels_out",
    "strided_kelements_out_k3",
    "strided_kelements_out_k5",
)

# TFLite runs a dense convolution as im2col (kcolumns) and a matrix product in tiles of 4 pixels and 8
# channels, and folds a ReLU into the preceding operator. Batch normalisation without a convolution to
# fold into is a product and a sum.
CORTEX_A76 = Form(
    own={
        "conv1x1": (
            "launch",
            "mmacs",
            "mmacs_c8",
            "mmacs_r4_c8",
            "mmacs_c32",
            "mmacs_beyond_c512",
            "kelements_in",
            "kelements_in_above_256",
            "kelements_in_above_1024",
            "kelements_out",
            "kelements_out_above_128",
            "kelements_out_above_1024",
            "kweights",
            "kweights_above_64",
            "kpixels",
            "kchannels_in",
            "kchannels_out",
        ),
        "conv": (
            "launch",
            "mmacs",
            "mmacs_c8",
            "mmacs_r4_c8",
            "mmacs_beyond_c512",
            "mmacs_row",
            "mmacs_k5",
            "mmacs_k7",
            "kelements_out",
            "kweights",
            "kweights_above_64",
            "kcolumns",
            "strided_kelements_in",
        ),
        "dwconv": (
            *_DEPTHWISE,
            "kelements_out_k3",
            "klines_k3",
            "klines_k5",
            "kchannels_out_k3",
            "kchannels_out_k5",
            "strided_kchannels_out_k3",
        ),
        "linear": ("launch", "kweights", "kweights_above_1024"),
        "maxpool": ("launch", "kelements_in", "kchannels_out"),
        "reshape": ("launch",),
    },
    shared=_passes(
        "pass",
        {
            "add": 1.5,
            "addrelu": 1.5,
            "batchnorm": 2,
            "hswish": 3.5,
            "hsigmoid": 2,
            "scale": 1,
            "gap": 1,
            "avgpool": 1,
            "split": 1,
            "concat": 1,
            "shuffle": 6,  # two reshapes, and a transpose that reads with strides
        },
    ),
    floors={
        "launch": 0.001,
        "pass.launch": 0.001,
        "pass.kelements": 0.00025,  # 8 bytes an element at 32 GB/s
        "maxpool.kelements_in": 0.00025,
    },
    # some VGGs and ResNets are slower than any term explains: at 5% they count too little
    far=0.15,
)

# Convolutions run on the engines (qnas.latency.myriad) at 700 MHz, all other operators in software: a pass
# over a map; broadcasting or reordering (strided) costs ten times as much. Partial sums of a convolution
# whose input channels are split into groups, and the gathering of a strided convolution's input, are
# passes too. A hard swish is an addition, a ReLU, a product of two maps and a product with a constant, which
# the compiler folds into the convolution that follows: 1 + 1 + 1.5 passes. A value per channel is copied over
# its map line by line before the product (the compiler's Tile), so scale also costs per line.
# A concatenation or split is mostly a view. Weights stream from memory at one rate.
_MYRIAD_PASSES = _passes(
    "pass",
    {
        "add": 1.5,
        "addrelu": 1.5,
        "batchnorm": 1,
        "hswish": 3.5,
        "hsigmoid": 3,
        "scale": 1,
        "gap": 1,
    },
)
_MYRIAD_PASSES["pass.kelements"] |= {("conv", "strided_kelements_in"): 1, ("conv", "engine_ksums"): 1}
MYRIAD_VPU = Form(
    own={
        "conv1x1": (
            "launch",
            "engine_1x1_mcycles",
            "mmacs",
            "mmacs_c8",
            "mmacs_c32",
            "mmacs_c64",
            "kelements_in",
            "kelements_in_above_1024",
            "kelements_out",
            "kelements_out_above_128",
            "kelements_out_above_1024",
            "klines",
        ),
        "conv": (
            "launch",
            "engine_mcycles",
            "engine_ktiles",
            "engine_kborders",
            "kelements_out",
            "kelements_out_above_1024",
        ),
        "dwconv": (
            *_DEPTHWISE,
            "kpixels",
            "kelements_out_k3",
            "kchannels_out_k3",
            "kchannels_out_k5",
            "strided_kchannels_out_k3",
        ),
        "linear": ("launch", "kweights_above_1024"),
        "maxpool": ("launch", "kelements_in", "kchannels_out"),
        "avgpool": ("launch", "kelements_in"),
        "concat": ("launch", "kelements_in"),
        "split": ("launch", "kelements_in"),
        "scale": ("klines",),
        "reshape": ("launch",),
    },
    shared={
        **_MYRIAD_PASSES,
        **_passes("strided", {"scale": 1, "shuffle": 1}),
        "weights": {("conv", "engine_kweights"): 1, ("conv1x1", "kweights"): 1, ("linear", "kweights"): 1},
        "software": {("conv", "engine_missed_mmacs"): 1, ("conv1x1", "engine_1x1_missed_mmacs"): 1},
    },
    floors={
        "launch": 0.02,
        "pass.launch": 0.02,
        "pass.kelements": 0.0006,  # 6 bytes an element (float16) at 10 GB/s
        "strided.launch": 0.02,
        "strided.kelements": 0.0006,
        "scale.klines": 0.03,  # a copy of a line: 20 cycles at 700 MHz
        "weights": 0.0001,  # 2 bytes at 20 GB/s
        "conv.engine_mcycles": 0.9 / 0.7,  # 700 MHz, and a margin
        "conv1x1.klines": 0.008,  # 6 cycles at 700 MHz
        "avgpool.kelements_in": 0.0006,
        "maxpool.kelements_in": 0.0001,  # on the engines
        "concat.kelements_in": 0.0001,
        "split.kelements_in": 0.0001,
    },
    far=0.1,
)

# The GPU delegate computes pixels and channels in groups of four, and merges elementwise operators with
# one operand (a hard swish, a batch normalisation) into the preceding kernel: these cost a tenth of a
# pass, so that they are not free.
ADRENO = Form(
    own={
        "conv1x1": (
            "launch",
            "mmacs",
            "mmacs_i4_c4",
            "mmacs_r4_i4_c4",
            "mmacs_r4_i4_c8",
            "mmacs_r8_i4_c16",
            "kelements_in",
            "kelements_in_above_256",
            "kelements_in_above_1024",
            "kelements_out",
            "kelements_out_above_128",
            "kweights",
            "kweights_above_64",
            "kweights_above_1024",
            "kfan_in",
            "kchannels_out",
        ),
        "conv": (
            "launch",
            "mmacs",
            "mmacs_r4_i4_c8",
            "mmacs_r8_i4_c16",
            "mmacs_t16x8",
            "mmacs_row",
            "kelements_in_above_256",
            "kelements_out_above_128",
            "kweights",
            "kweights_above_1024",
            "kfan_in",
            "strided_kelements_in",
        ),
        "dwconv": _DEPTHWISE,
        "linear": ("launch", "kweights", "kweights_above_1024", "kchannels_out"),
        "maxpool": ("launch", "kelements_in", "kchannels_out"),
        "reshape": ("launch",),
    },
    shared=_passes(
        "pass",
        {
            "add": 1.5,
            "addrelu": 1.5,
            "batchnorm": 0.1,
            "hswish": 0.1,
            "hsigmoid": 1,
            "scale": 1,
            "gap": 1,
            "avgpool": 1,
            "split": 1,
            "concat": 1.5,
            "shuffle": 3,
        },
    ),
    floors={
        "launch": 0.01,
        "pass.launch": 0.01,
        "pass.kelements": 0.0002,  # 8 bytes an element at 40 GB/s
        "maxpool.kelements_in": 0.0002,
    },
)

FORMS: dict[str, Form] = {
    "cortex-a76": CORTEX_A76,
    "myriad-vpu": MYRIAD_VPU,
    "adreno-640": ADRENO,
    "adreno-630": ADRENO,
}
