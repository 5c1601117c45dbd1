import dataclasses
import itertools

import pytest

from qnas.latency.features import FEATURES
from qnas.latency.kernels import FUSIONS, Kernel, fuse, fuse_operators
from qnas.spaces.layer import OPS, LayerSpec


def layers(*ops: str) -> list[LayerSpec]:
    return [LayerSpec(str(i), op, 14, 16, 16, 3 if "conv" in op else 1) for i, op in enumerate(ops)]


@pytest.mark.parametrize(
    ("ops", "fusion", "kinds"),
    [
        (["conv", "batchnorm", "relu"], "edge", ["conv"]),
        (["conv", "batchnorm", "relu6"], "edge", ["conv"]),
        (["conv", "relu"], "edge", ["conv"]),
        (["dwconv", "batchnorm", "relu6", "conv", "batchnorm", "add"], "edge", ["dwconv", "conv", "add"]),
        (["conv", "batchnorm", "gelu"], "edge", ["conv", "gelu"]),
        (["conv", "batchnorm", "hswish"], "edge", ["conv", "hswish"]),
        (["layernorm", "dwconv", "dwconv", "mul"], "edge", ["layernorm", "dwconv", "dwconv", "mul"]),
        (["batchnorm", "conv"], "edge", ["batchnorm", "conv"]),
        (["add", "relu"], "edge", ["addrelu"]),
        (["dwconv", "batchnorm", "add", "clip", "add"], "edge", ["dwconv", "add", "clip", "add"]),
        (["dwconv", "batchnorm", "add", "clip", "add"], "eager", ["dwconv", "add", "clip", "add"]),
        (["conv", "clip"], "edge", ["conv", "clip"]),
        (["gap", "linear"], "edge", ["gap", "linear"]),
        (["conv", "batchnorm", "relu"], "eager", ["conv", "relu"]),
        (["add", "relu6"], "eager", ["add", "relu"]),
        (["conv", "relu", "gap", "linear"], "inductor", ["conv", "pass-gap", "vector"]),
        # a scale reads the pooled map again, so that the map is written out
        (["mul", "relu", "gap", "hsigmoid", "scale"], "inductor", ["pass+1", "gap", "pass"]),
        (["mul", "relu", "gap", "hsigmoid", "scale"], "edge", ["mul", "gap", "hsigmoid", "scale"]),
        ([], "edge", []),
    ],
)
def test_sequences_that_a_runtime_fuses_become_one_kernel(
    ops: list[str], fusion: str, kinds: list[str]
) -> None:
    assert [kernel.kind for kernel in fuse(layers(*ops), fusion)] == kinds


@pytest.mark.parametrize(
    ("ops", "kinds"),
    [
        (["add_scalar", "relu", "mul", "mul_scalar"], ["hswish"]),
        (["gap", "conv", "relu", "conv", "add_scalar", "relu", "mul_scalar", "scale"], None),
        (["reshape", "transpose", "reshape", "split"], ["shuffle", "split"]),
        (["maxpool", "concat", "sigmoid"], ["maxpool", "concat", "sigmoid"]),
        (["bn", "relu", "fc", "relu"], ["batchnorm", "linear"]),
    ],
)
def test_operators_of_other_graphs_fuse_by_the_same_rule(ops: list[str], kinds: list[str] | None) -> None:
    found = fuse_operators([Kernel(op, 14, 16, 16) for op in ops])
    expected = kinds or ["gap", "conv1x1", "conv1x1", "hsigmoid", "scale"]
    assert [kernel.kind for kernel in found] == expected


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("op", OPS)
def test_an_operator_alone_never_disappears(op: str, fusion: str) -> None:
    assert len(fuse(layers(op), fusion)) == 1


@pytest.mark.parametrize(
    ("kernel", "stride", "kind"),
    [(1, 1, "conv1x1"), (4, 4, "patch"), (3, 1, "conv"), (1, 2, "conv"), (3, 2, "conv")],
)
def test_convolutions_are_sorted_by_kernel_and_stride(kernel: int, stride: int, kind: str) -> None:
    assert fuse([LayerSpec("c", "conv", 32, 8, 16, kernel, stride)])[0].kind == kind


@pytest.mark.parametrize("px", [7, 8, 14, 32, 225])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (7, 1), (3, 2), (5, 2), (2, 2), (4, 4)])
def test_a_kernel_has_the_output_size_of_its_layer(px: int, kernel: int, stride: int) -> None:
    layer = LayerSpec("c", "conv", px, 8, 8, kernel, stride)
    assert fuse([layer])[0].out_px == layer.out_px


def test_features_agree_with_the_counts_of_the_layer() -> None:
    for layer in (
        LayerSpec("a", "conv", 14, 24, 40, 3, 2),
        LayerSpec("b", "conv", 14, 24, 40),
        LayerSpec("c", "dwconv", 14, 24, 24, 5, 2),
        LayerSpec("d", "linear", 1, 24, 40),
    ):
        (kernel,) = fuse([layer])
        assert FEATURES["mmacs"](kernel) == pytest.approx(layer.macs / 1e6)
        assert FEATURES["kweights"](kernel) == pytest.approx(layer.params / 1e3)
        assert FEATURES["kelements_in"](kernel) == pytest.approx(layer.resolution_px**2 * layer.c_in / 1e3)
        assert FEATURES["kelements_out"](kernel) == pytest.approx(layer.out_px**2 * layer.c_out / 1e3)


def resized(kernel: Kernel, field: str, size: int) -> Kernel:
    return Kernel(**{**dataclasses.asdict(kernel), field: size})


@pytest.mark.parametrize("name", FEATURES)
def test_no_feature_falls_as_a_kernel_grows(name: str) -> None:
    feature = FEATURES[name]
    larger = {
        "resolution_px": (7, 14, 15, 28, 56, 112),
        "c_in": (3, 16, 17, 63, 64, 65, 320),
        "c_out": (3, 16, 17, 63, 64, 65, 513, 1280),
        "kernel": (1, 3, 5, 7, 9),
        "batch": (1, 2, 8),
    }
    for kind, stride in itertools.product(("conv", "dwconv", "linear", "gelu"), (1, 2)):
        kernel = Kernel(kind, 28, 48, 48, 5, stride)
        for field, sizes in larger.items():
            values = [feature(resized(kernel, field, size)) for size in sizes]
            assert values == sorted(values), (kind, stride, field)
            assert min(values) >= 0
