import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.exported import digits, trained
from torch import Tensor, nn

from qnas.common.errors import ExportError
from qnas.deploy.export.parity import TOLERANCES, Parity, Tolerance, compare
from qnas.deploy.export.product import FilePrecision, RealImages, Run


def run_of(network: nn.Module, change: Callable[[Tensor], Tensor] = lambda logits: logits) -> Run:
    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        return change(network(images))

    return run


def check(run: Run, n: int = 40, precision: FilePrecision = "fp32", **options: Any) -> Parity:
    return compare(trained().network, run, digits(n), TOLERANCES[precision], where="file", **options)


def test_a_network_is_equal_to_itself() -> None:
    network = trained().network
    parity = check(run_of(network), noise=True)
    assert (parity.images, parity.source) == (40, "40 digits")
    assert parity.max_difference <= 1e-5 * parity.scale
    assert parity.agreement == 1.0
    assert parity.accuracy == parity.network_accuracy > 0.8


def test_figures_are_those_of_all_images_taken_at_once() -> None:
    network, images = trained().network, digits(45)
    shift = torch.zeros(10)
    shift[3], shift[4] = 8.0, -4.0
    loose = Tolerance(10.0, 0.0, 1.0)
    parity = compare(network, run_of(network, lambda y: y + shift), images, loose, where="file")
    with torch.no_grad():
        ours = network(images.take(range(45)))
    theirs = ours + shift
    assert parity.max_difference == pytest.approx(8.0, rel=1e-4)
    assert parity.mean_difference == pytest.approx(1.2, rel=1e-4)
    assert parity.scale == pytest.approx(float(ours.abs().max()), rel=1e-4)
    same, right, right_before = (
        [a == b for a, b in zip(x.tolist(), y.tolist(), strict=True)]
        for x, y in (
            (ours.argmax(1), theirs.argmax(1)),
            (theirs.argmax(1), images.labels),
            (ours.argmax(1), images.labels),
        )
    )
    assert 0 < sum(same) < 45
    assert parity.agreement == sum(same) / 45
    assert parity.accuracy == sum(right) / 45
    assert parity.network_accuracy == sum(right_before) / 45


@pytest.mark.parametrize("n", [1, 3, 8, 9, 45])
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_every_image_counts_once_and_batches_are_of_the_files_size(n: int, batch: int | None) -> None:
    seen: list[Tensor] = []
    network = trained().network

    def run(images: Tensor) -> Tensor:
        seen.append(images)
        return run_of(network)(images)

    assert check(run, n, batch=batch).images == n
    sizes = [len(images) for images in seen]
    if batch is None:
        assert sizes[:3] == [1, 2, 5]  # a batch that got frozen shows, however few images there are
        assert max(sizes) <= 32
    else:
        assert set(sizes) == {batch}
        assert sum(sizes) - n < batch
    every = digits(n).take(range(n))
    torch.testing.assert_close(torch.cat(seen)[:n], every, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda y: y + 0.01, r"not written: for 1 images the file's logits differ from torch's by 0\.01"),
        (lambda y: y * float("nan"), "differ from torch's by nan"),
        (lambda y: y[:, :9], r"the file's logits have the shape \(1, 9\), expected \(1, 10\)"),
    ],
)
def test_a_file_that_computes_something_else_is_refused(
    change: Callable[[Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ExportError, match=f"^file: .*{message}"):
        check(run_of(trained().network, change))


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_nan_is_refused_at_every_precision(precision: FilePrecision) -> None:
    with pytest.raises(ExportError, match="by nan"):
        check(run_of(trained().network, lambda y: y * float("nan")), precision=precision)


def test_a_frozen_batch_is_refused() -> None:
    def run(images: Tensor) -> Tensor:
        if len(images) != 1:
            raise RuntimeError("expected 1 image\nmore of it")
        return run_of(trained().network)(images)

    with pytest.raises(ExportError, match=r"the file cannot run 2 images: RuntimeError: expected 1 image$"):
        check(run)


def test_a_file_that_is_right_on_the_images_alone_is_noticed_under_noise() -> None:
    network, images = trained().network, digits(40)
    known = {tuple(image.flatten().tolist()) for image in images.take(range(40))}

    def run(given: Tensor) -> Tensor:
        right = run_of(network)(given)
        return right if all(tuple(i.flatten().tolist()) in known for i in given) else right + 1.0

    check(run)
    with pytest.raises(ExportError, match="differ from torch's by"):
        check(run, noise=True)


def test_too_many_other_classes_are_refused_whatever_the_logits_tolerance() -> None:
    network = trained().network
    with pytest.raises(ExportError, match=r"file: not written: it gives 0\.0% of 40 images the class"):
        compare(network, run_of(network, torch.neg), digits(40), Tolerance(10.0, 0.8, 1.0), where="file")


def test_a_loss_of_accuracy_is_refused_and_a_gain_is_not() -> None:
    network, images = trained().network, digits(100)
    with torch.no_grad():
        ours = network(images.take(range(100))).argmax(1)
    right = RealImages(images.pixels, ours, images.mean, images.std, "as the network says")
    wrong = RealImages(images.pixels, (ours + 1) % 10, images.mean, images.std, "otherwise")
    turn = run_of(network, lambda y: y.roll(1, 1))  # each image gets the class after the network's
    loose = Tolerance(10.0, 0.0, 0.02)
    with pytest.raises(ExportError, match=r"0\.0% of 100 images are right, of the network 100\.0%"):
        compare(network, turn, right, loose, where="file")
    assert compare(network, turn, wrong, loose, where="file").accuracy == 1.0


def test_a_network_that_computes_no_numbers_is_refused() -> None:
    broken = copy.deepcopy(trained().network)
    nn.init.constant_(broken.get_submodule("head.classifier").bias, float("inf"))  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="the network's own logits are not finite numbers"):
        compare(broken, run_of(broken), digits(4), TOLERANCES["fp32"], where="file")
