"""The tables of QuadraNet's paper in benchmarks/: counts, memory by hand, and that the tables are written."""

import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.places import ROOT
from torch import nn

from qnas.nn import quadratic
from qnas.nn.blocks import count_parameters
from qnas.nn.subnet import build_subnet
from qnas.spaces.arch import only_arch
from qnas.spaces.lower import count_params, lower
from qnas.spaces.space import load_space

sys.path.insert(0, str(ROOT / "benchmarks"))  # scripts, not a package

import builders  # type: ignore[import-not-found]
import quadranet_tables as tables  # type: ignore[import-not-found]
from experiments import Cache  # type: ignore[import-not-found]
from memory import saved_bytes  # type: ignore[import-not-found]

# ---- networks


def test_networks_have_the_parameters_and_multiply_adds_of_the_paper() -> None:
    counts = tables.network_counts("torchvision")
    for name, paper in builders.TABLE_I.items():
        params, macs = counts[name]
        assert params / 1e6 == pytest.approx(paper.params_m, rel=0.03), name
        assert macs / 1e9 == pytest.approx(paper.macs_g, rel=0.03), name
    timm = builders.network_builders("timm")
    assert [builders.count(timm[name]) for name in ("ConvNeXt-T", "Swin-T")] == [
        counts[name] for name in ("ConvNeXt-T", "Swin-T")
    ]


def test_counts_of_a_module_are_those_of_its_layers() -> None:
    name = "QuadraNet25-XXS"
    assert builders.count(builders.network_builders("torchvision")[name]) == tables.quadranet_counts(name)


def test_products_between_features_count() -> None:
    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:  # (1, 3, n, n): 3 n products of rows, n^2 each
            return x @ x.mT

    assert builders.count(Attention, 5) == (0, 3 * 5**3)


def test_a_ratio_is_the_median_of_those_in_a_round() -> None:
    samples = {"a": (1.0, 2.0, 30.0), "Swin-T": (2.0, 5.0, 30.0)}
    ms, ratio = tables.medians(samples, "Swin-T")
    assert ms == {"a": 2.0, "Swin-T": 5.0}
    assert ratio == {"a": 2.0, "Swin-T": 1.0}  # of 2, 2.5 and 1


def session(table: str, torch_device: str, **found: Any) -> dict[str, Any]:
    where = {"table": table, "torch_device": torch_device, "machine": "M", "torch": "2", "threads": 1}
    return {**where, "batch": 2, "dtype": "float32", "date": "2026-01-01", **found}


def test_a_device_that_was_not_measured_is_said_to_be_missing() -> None:
    ratio = {"QuadraNet36-T": 1.2, "Swin-T": 1.0, "ConvNeXt-T": 1.5}
    cpu = session("I", "cpu", ms={name: 400 / value for name, value in ratio.items()}, ratio=ratio)
    counts = dict.fromkeys((*ratio, "QuadraNet25-XXS"), (28_300_000, 4_510_000_000))
    text = tables.render_1(counts, {"cpu": cpu, "cuda": None}, "timm")
    cells = re.search(r"^\| QuadraNet36-T \|(.*)\|$", text, re.MULTILINE)
    assert cells is not None
    assert [cell.strip() for cell in cells[1].split("|")] == [
        *("28.30", "23.6", "4.51", "4.1"),  # ours and the paper's
        *("6", "1.20", "not run", "not run", "1971", "1.49"),  # two images in a third of a second
    ]
    assert re.search(r"^\| QuadraNet25-XXS \| 28.30 \| - \| 4.51 \| - \| not run .* - \| - \|$", text, re.M)
    assert "On the GPU: not run, no GPU was at hand." in text
    assert "0.80 of ConvNeXt-T's (paper 1.01), 1.20 of Swin-T's (paper 1.49)" in text
    assert "it loses to ConvNeXt-T and beats Swin-T by more than 5%, and 2 of 2 ratios fall short" in text


def test_what_was_measured_on_another_device_is_found_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "rows.jsonl")
    for i, torch_device in enumerate(("cpu", "cuda", "cuda")):
        cache.put({**session("I", torch_device), "batch": i}, {})
    cache.put(session("II", "cuda"), {})
    now = session("I", "cpu", batch=7)
    found = tables.both_sessions(cache, now)
    assert list(found) == ["cpu", "cuda"]
    assert found["cpu"] is now
    assert found["cuda"]["batch"] == 2
    assert tables.both_sessions(Cache(tmp_path / "none.jsonl"), now)["cuda"] is None


# ---- memory


def test_a_storage_counts_once_and_parameters_do_not() -> None:
    x, w = (torch.randn(6, 5, requires_grad=True) for _ in range(2))
    assert saved_bytes(lambda: x.square() + x[:2].square().sum(), []) == x.nbytes
    assert saved_bytes(lambda: w * x, []) == 2 * x.nbytes
    assert saved_bytes(lambda: w * x, [w]) == x.nbytes
    assert saved_bytes(lambda: x + w, []) == 0


# Kept maps of C channels and maps of one channel (the means and deviations of norms), by hand. A half of two
# pointwise convolutions keeps the input of the norm, its output, and four times as many channels before and
# behind GELU. A depthwise half keeps the input of the norm and that of the convolution, and the product of a
# quadratic one its two factors.
BY_HAND = {
    "Skip": (1 + 1 + 4 + 4, 2),
    "Conv": (2 + 10, 4),
    "Quadra, torch's backward": (2 + 2 + 10, 4),
    "Quadra, lean convolution": (2 + 10, 4),
    "Conv, lean block": (2 + 1, 2),
    "Quadra, lean block": (1 + 1, 0),
}


@pytest.mark.parametrize("form", BY_HAND)
def test_kept_memory_is_that_counted_by_hand(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quadratic, "KEPT_ELEMENTS", 0)  # without C++ kernels, small maps keep the factors
    batch, channels, px, layers = 2, 8, 6, 3
    maps, stats = BY_HAND[form]
    found = tables.step_bytes(form, (batch, channels, px, px), layers, "cpu", "float32")
    assert found == layers * 4 * batch * px**2 * (maps * channels + stats)


@pytest.mark.parametrize("form", ["Swin", "Hor", "Quadra, torch's backward"])
def test_kept_memory_grows_by_the_same_amount_with_each_image(form: str) -> None:
    one, two, three = (tables.step_bytes(form, (b, 32, 14, 14), 2, "cpu", "float32") for b in (1, 2, 3))
    assert three - two == two - one > 0
    indices = 2 * 49**2 * 8  # of Swin's position biases: the same for all images
    assert one - (two - one) == (indices if form == "Swin" else 0)


def test_blocks_without_an_own_form_compute_what_quadrablocks_do() -> None:
    block = tables.stack(tables.LEAN, 8, 1)[0]
    x = torch.randn(1, 8, 6, 6)
    for name in (tables.PLAIN, "Quadra, lean convolution"):
        mixer, channels = form = tables.stack(name, 8, 1)[0]
        assert count_parameters(form) == count_parameters(block)
        for weight, conv in zip(mixer.weights, block.convolutions, strict=True):
            weight.data.copy_(conv.weight)
        channels.expand.load_state_dict(block.expand.state_dict())
        channels.project.load_state_dict(block.project.state_dict())
        torch.testing.assert_close(form(x), block(x), atol=1e-5, rtol=1e-4)


def test_the_hornet_blocks_have_the_orders_of_hornet_t() -> None:
    assert [tables.hornet_order(width) for width in (64, 128, 256, 512)] == [2, 3, 4, 5]


def test_memory_is_scaled_to_the_batch_of_the_paper() -> None:
    kept = dict.fromkeys(tables.FORMS, 2_000_000_000) | {tables.LEAN: 500_000_000, "Conv": 1_000_000_000}
    cpu = session("II", "cpu", bytes={"64": kept}, channels=[64])  # at batch 2
    assert tables.memory_cells(tables.LEAN, [cpu, None], [64]) == ["16.00", "0.25", "not run", "not run"]
    said = tables.verdict_2(cpu)
    assert "to 25% at 64 channels" in said
    assert "1.00 of Swin's, 1.00 of Hor's, and more than Conv)" in said


# ---- kernels and quadratic pointwise convolutions


def test_layouts_of_a_kernel_differ_in_their_depthwise_weights_alone() -> None:
    channels = 2 * 16 + 3 * 32 + 3 * 64

    def params(kernel: int) -> int:
        space = tables.kernel_layout(kernel)
        assert set(only_arch(space).choices) == {f"quadra_k{kernel}_e4"}
        return count_params(lower(space, only_arch(space)))

    assert params(9) - params(3) == 3 * channels * (81 - 9)


def test_quadratic_pointwise_networks_have_the_parameters_and_multiply_adds_of_the_paper() -> None:
    for network, papers in tables.TABLE_V.items():
        space = load_space(builders.SPACES[network])
        for roles, (params_m, macs_g, _) in zip(tables.ROLES.values(), papers, strict=True):
            params, macs = builders.count(tables.quadratic_builder(space, 1000, roles))
            assert params / 1e6 == pytest.approx(params_m, rel=0.003), roles
            assert macs / 1e9 == pytest.approx(macs_g, abs=0.06), roles


def test_a_quadratic_pointwise_convolution_is_the_neuron_at_each_place() -> None:
    module = tables.QuadraticPointwise(3, 5, torch.device("cpu"))
    x = torch.randn(2, 3, 4, 4)
    weights = [(conv.weight[:, :, 0, 0], conv.bias) for conv in (module.conv_a, module.conv_b, module.conv_c)]
    for i, j in ((0, 0), (3, 1)):
        a, b, c = (x[:, :, i, j] @ w.mT + bias for w, bias in weights)
        torch.testing.assert_close(module(x)[:, :, i, j], a * b + c)


def test_without_quadratic_pointwise_convolutions_a_network_computes_the_same() -> None:
    space = tables.pointwise_layout(4)
    network = build_subnet(space, only_arch(space), 10).eval()
    x = torch.randn(2, 3, 32, 32)
    before, params = network(x).detach(), count_parameters(network)
    torch.testing.assert_close(tables.with_quadratic_pointwise(network, ())(x), before, atol=1e-5, rtol=1e-4)
    changed = tables.with_quadratic_pointwise(network, ("expand", "project"))
    # of a quadratic one, three of everything
    pointwise = sum(2 * 2 * 4 * c**2 + 2 * (4 * c + c) for c in 2 * [16] + 3 * [32] + 3 * [64])
    assert count_parameters(changed) == params + pointwise
    changed(x).sum().backward()  # all of it is trained
    assert all(parameter.grad is not None for parameter in changed.parameters())


def test_linear_networks_beside_quadratic_ones_have_as_many_parameters() -> None:
    counts = []
    for expansion, roles in tables.TRAINED.values():
        build = tables.quadratic_builder(tables.pointwise_layout(expansion), 10, roles)
        counts.append(builders.count(build, tables.TRAINED_PX)[0])
    _, one, both, wide, wider = counts
    assert wide == pytest.approx(one, rel=0.02)
    assert wider == pytest.approx(both, rel=0.02)


def test_the_most_accurate_is_named_with_what_is_as_good() -> None:
    def trained(*accuracies: float) -> list[dict[str, float]]:
        return [{"accuracy": accuracy, "seconds": 100 * accuracy} for accuracy in accuracies]

    found = {3: trained(0.5, 0.52), 5: trained(0.6, 0.64), 7: trained(0.6, 0.62)}  # deviation of 5: 0.028
    assert tables.best_of(found) == (5, "and within the spread of its seeds is 7")
    assert tables.best_of({3: found[3], 5: found[5]}) == (5, "and within the spread of its seeds is no other")
    assert tables.best_of({3: trained(0.5), 5: trained(0.6)}) == (5, "of one seed each, which tells little")
    assert tables.training_cells(found[5], found[3]) == [
        "62.0 ± 2.8%",
        "62",
        f"{(0.6 / 0.5 + 64 / 52) / 2:.2f}",
    ]
    means = {name: trained(0.5 + 0.01 * i, 0.5 + 0.01 * i) for i, name in enumerate(tables.TRAINED)}
    said = tables.verdict_5(means)
    assert "by +1.0 points (the first) and +2.0 (both)" in said
    assert "by +3.0 and +4.0" in said
    assert math.isclose(tables.paper_ratio("QuadraNet36-T", "HorNet-T"), 1971 / 1254)


# ---- the script


@pytest.mark.slow
def test_all_tables_are_written_and_nothing_is_measured_twice(tmp_path: Path) -> None:
    small = "--batch 2 --repeats 1 --networks QuadraNet25-XXS --layers 2 --images 200 --epochs 1 --seeds 0"
    command = [sys.executable, str(ROOT / "benchmarks" / "quadranet_tables.py"), "--data", "digits"]
    command += ["--tables", "I", "II", "IV", "V", *small.split(), "--out", str(tmp_path)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for table in ("I", "II", "IV", "V"):
        assert f"## QuadraNet's table {table}:" in printed
    assert printed.count("For a user") == 3  # table I without QuadraNet36-T has nothing to say
    done = (tmp_path / tables.FILE).read_bytes()
    assert len(done.splitlines()) == 2 + 4 + len(tables.TRAINED)
    again = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert again.startswith("## ")  # no line of a training
    for table in again.split("## ")[1:]:
        assert table.strip() in printed
    assert (tmp_path / tables.FILE).read_bytes() == done
