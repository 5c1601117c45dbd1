"""The shipped networks are whole, have the sizes that are published, and cost what files of them cost."""

import io
from pathlib import Path

import numpy as np
import pytest

from qnas.common.arrays import DAMAGE
from qnas.common.resources import shipped
from qnas.latency.device import device_names, load_device
from qnas.latency.kernels import FUSIONS, Kernel, fuse_operators
from qnas.latency.onnx.networks import OnnxNetwork
from qnas.latency.prediction import DEVICE, predict_file
from qnas.latency.public_networks import FILE, fused_networks, public_networks, read_public_networks
from qnas.latency.rivals import price_public_networks

# Parameters as torchvision documents them for the same networks, and multiply-adds at 224 px; MobileNetV2's
# and EfficientNet's from their papers.
PUBLISHED = {
    "resnet18": (11_689_512, 1.81e9),
    "resnet50": (25_557_032, 4.09e9),
    "mobilenetv2_100": (3_504_872, 300e6),
    "efficientnet_b0": (5_288_548, 390e6),
    "convnext_tiny": (28_589_128, 4.46e9),
    "vgg16": (138_357_544, 15.47e9),
    "densenet121": (7_978_856, 2.83e9),
    "resnext50_32x4d": (25_028_904, 4.23e9),
}


def position(name: str, px: int = 224) -> int:
    networks = public_networks().networks
    return next(i for i, n in enumerate(networks) if (n.name, n.resolution_px) == (name, px))


def test_there_are_842_networks_each_once_with_its_source() -> None:
    public = public_networks()
    assert len({(n.name, n.resolution_px) for n in public.networks}) == len(public.networks) == 842
    assert "timm" in public.source
    assert "Apache-2.0" in public.source
    known = [n.imagenet_top1 for n in public.networks if n.imagenet_top1 is not None]
    assert len(known) == 671
    assert 0.4 < min(known) < max(known) < 0.9
    assert all(len(sequence) > 5 for sequence in public.of_network)
    assert shipped("public_networks").joinpath("README.md").is_file()


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_are_those_that_are_published(name: str) -> None:
    network = public_networks().networks[position(name)]
    params, macs = PUBLISHED[name]
    assert network.params == pytest.approx(params, rel=1e-3)
    assert network.macs == pytest.approx(macs, rel=0.02)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_all_networks_at_once_fuse_as_each_by_itself(fusion: str) -> None:
    fused, public = fused_networks(fusion), public_networks()
    kernels = [kernel for _, kernel in fused.parts]
    for i in np.random.default_rng(0).choice(len(public.networks), 12, replace=False).tolist():
        alone = fuse_operators([o.kernel for o in public.sequence(i)], fusion)
        counted: dict[Kernel, int] = {}
        for column, count in zip(fused.counts[i].indices, fused.counts[i].data, strict=True):
            counted[kernels[column]] = counted.get(kernels[column], 0) + int(count)
        assert counted == {kernel: alone.count(kernel) for kernel in set(alone)}


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002", "convnext_atto", "tf_efficientnet_b0"])
@pytest.mark.parametrize("device", sorted(device_names()))
def test_a_network_costs_what_the_chain_of_its_operators_costs(name: str, device: str) -> None:
    i = position(name)
    chain = OnnxNetwork(Path(name), 3, 224, 224, (public_networks().sequence(i),))
    known = load_device(device)
    expected, found = predict_file(DEVICE, known, chain), price_public_networks(known)[i]
    assert found.latency_ms == pytest.approx(expected.latency_ms, rel=1e-9)
    assert found.coverage == pytest.approx(expected.coverage, abs=1e-9)
    assert (found.interval is None) == (expected.interval is None)
    if found.interval is not None and expected.interval is not None:
        assert found.interval.high_ms == pytest.approx(expected.interval.high_ms, rel=1e-9)


def test_a_file_of_another_form_is_refused(tmp_path: Path) -> None:
    whole = shipped("public_networks").joinpath(FILE).read_bytes()
    path = tmp_path / FILE
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DAMAGE):
        read_public_networks(path)
    with np.load(io.BytesIO(whole), allow_pickle=False) as arrays:
        content = {name: arrays[name] for name in arrays.files}
    changes = {
        "op_columns": (content["op_columns"][::-1], "ops: expected the columns op, h_in"),
        "indptr": (content["indptr"][:-1], "beginnings of 842 networks"),
    }
    for name, (array, message) in changes.items():
        np.savez_compressed(path, **{**content, name: array})
        with pytest.raises(ValueError, match=message):
            read_public_networks(path)
