"""Halves are emulated as torch computes them, and what leaves their range is named with its layer."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.exported import digits, trained, trained_wired
from torch import Tensor, nn

from qnas.common.errors import ExportError
from qnas.deploy.export.formats import FORMATS, export_files
from qnas.deploy.export.halves import LARGEST, Halves, check_halves
from qnas.deploy.export.lowering import ARITHMETIC, MYRIAD, OPERATORS, Forms, lowered
from qnas.deploy.export.product import RealImages, Variant


def computed(norm: str = "layernorm", forms: Forms = MYRIAD) -> nn.Module:
    return lowered(trained(norm).network, forms)


@torch.no_grad()
def scale(network: nn.Module, name: str, factor: float) -> None:
    """Multiply the parameters of a module."""
    for tensor in network.get_submodule(name).parameters():
        tensor.mul_(factor)


@pytest.mark.parametrize("forms", [OPERATORS, ARITHMETIC], ids=["operators", "arithmetic"])
@pytest.mark.parametrize("norm", ["layernorm", "batchnorm"])
def test_the_emulation_computes_what_torch_computes_in_halves(norm: str, forms: Forms) -> None:
    images = digits(20).take(range(20))
    network = computed(norm, forms)
    emulated = Halves(network, "file")(images)
    with torch.no_grad():
        exact = network(images)
        real = network.half()(images.half()).float()
    assert emulated.dtype == torch.float32
    off = (real - exact).abs().max()
    assert 0 < (emulated - exact).abs().max() < 3 * off
    assert (emulated - real).abs().max() < 2 * off


def test_trained_blocks_that_are_no_chains_stay_far_from_the_end_of_halves() -> None:
    network = lowered(trained_wired().network, MYRIAD)
    images = digits(50).take(range(50))
    halves = Halves(network, "file")
    logits = halves(images)
    with torch.no_grad():
        exact = network(images)
    assert 0 < (logits - exact).abs().max() < 0.01 * exact.abs().max()
    assert halves.largest < LARGEST / 100


def test_every_result_is_a_half_and_the_network_stays_as_it_was() -> None:
    network = computed()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    emulated = Halves(network, "file")(digits(3).take(range(3)))
    assert torch.equal(emulated, emulated.half().float())
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


class Formula(nn.Module):
    """Results of known sizes on images of ones."""

    def __init__(self, formula: str) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = eval(self.formula, {"torch": torch}, {"x": x})
        return y.flatten(1)


def ones() -> Tensor:
    return torch.ones(1, 1, 2, 2)


@pytest.mark.parametrize(
    ("formula", "layer", "value"),
    [
        ("300 * x * (300 * x)", "1: product", "90000"),
        ("[y := 300 * x, y * y][1]", "1: square", "90000"),
        ("60000 * x + 60000 * x", "1: sum", "1.2e.05"),
        ("60000 * x - (-60000 * x)", "1: difference", "1.2e.05"),
        ("(x / 1000) ** -2 / 100000", "1: power", r"9\.9\d*e.05"),
        ("torch.exp(20 * x)", "1: exp", r"4\.8517e.08"),
        ("[y := 60000 * x, y.add_(y)][1] / 1000", "1: sum", "1.2e.05"),
        ("(x - 1) / (x - 1)", "1: div", "nan"),
        ("torch.stack([60000 * x, 65505 * x]).mean(0)", "1: product", "65505"),
    ],
)
def test_the_first_result_beyond_the_range_is_named(formula: str, layer: str, value: str) -> None:
    network = nn.Sequential(nn.Identity(), Formula(formula))
    message = (
        f"^file: not written: with real images {layer} reaches {value}, and half precision ends at 65504$"
    )
    with pytest.raises(ExportError, match=message):
        Halves(network, "file")(ones())


def test_the_largest_value_is_reported_with_its_layer() -> None:
    network = nn.Sequential(Formula("[y := 200 * x, y * y][1]"), nn.Flatten())
    halves = Halves(network, "file")
    halves(ones())
    assert (halves.largest, halves.largest_in) == (40000, "0: square")
    halves(0.1 * ones())  # smaller values do not replace it
    assert halves.largest == 40000
    assert Halves(nn.Flatten(), "file").largest == 0


def test_a_value_at_the_end_of_the_range_is_kept() -> None:
    halves = Halves(Formula("65504 * x"), "file")
    assert halves(ones()).max() == LARGEST == halves.largest


def test_a_weight_beyond_the_range_is_named() -> None:
    network = computed()
    scale(network, "1_1.expand", 1e6)
    with pytest.raises(
        ExportError, match=r"file: not written: weight 1_1\.expand\.\w+ has [\d.e+]+, and half"
    ):
        Halves(network, "file")


def test_values_between_rounded_ones_are_rounded() -> None:
    # 2049 lies between the halves 2048 and 2050
    assert Halves(Formula("(2049 * x) - 2048"), "file")(ones()).tolist() == [[0.0] * 4]


def test_a_block_that_overflows_is_told_by_block_and_role() -> None:
    images = digits(16)
    network = computed()
    scale(network, "1_1.mixer.conv_a", 300)
    scale(network, "1_1.mixer.conv_b", 300)
    with pytest.raises(ExportError, match=r"with real images 1_1\.mixer: product reaches "):
        check_halves(network, network, images, "file")
    network = computed()
    scale(network, "1_1.project", 3000)  # beyond 256 from the mean, whose square does not fit
    with pytest.raises(ExportError, match=r"with real images \w+\.norm\w*: square reaches "):
        check_halves(network, network, images, "file")
    # the operator of a norm squares in single precision
    network = computed(forms=OPERATORS)
    scale(network, "1_1.project", 3000)
    check_halves(network, network, images, "file")


def test_what_was_seen_is_told() -> None:
    product = trained()
    said = check_halves(computed(), product.network, digits(100), "file")
    assert said.startswith("emulated in half precision on 100 images: the logits differ by ")
    assert "% are right (in single precision " in said
    assert "the largest value is " in said
    assert " of 65504, in " in said


def test_halves_of_another_network_are_refused() -> None:
    network = computed()
    scale(network, "head.classifier", 1.1)
    with pytest.raises(ExportError, match=r"^file, in halves: not written: .*differ from torch's by"):
        check_halves(network, trained().network, digits(10), "file")


def test_many_images_are_checked_in_part() -> None:
    some = digits(300)
    counted = RealImages(some.pixels, some.labels, some.mean, some.std, some.source)
    assert "on 128 images" in check_halves(computed(), trained().network, counted, "file")


@pytest.mark.parametrize(
    "name", ["standalone", *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "torch"))]
)
def test_a_file_of_halves_that_overflows_on_its_device_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # on this CPU it computes in single precision, so nothing shows
    product = trained()
    overflowing = computed(forms=OPERATORS)
    scale(overflowing, "1_1.mixer.conv_a", 1000)
    scale(overflowing, "1_1.mixer.conv_b", 1000)
    kind = FORMATS[name]
    monkeypatch.setitem(FORMATS, name, replace(kind, computed=lambda product, variant: overflowing))
    with pytest.raises(ExportError, match=r"1_1\.mixer: product reaches"):
        export_files(product, [name], Variant("fp16"), tmp_path, digits(20))
    (done,) = export_files(
        product, [name], Variant(), tmp_path, digits(20)
    )  # in single precision it is written
    assert done.checks == ()
