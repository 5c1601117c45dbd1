import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.exported import digits, trained
from torch import Tensor, nn

from qnas.common.errors import ExportError
from qnas.common.intervals import paired_drop
from qnas.deploy.export.parity import TOLERANCES, Parity, Tolerance, compare, tolerance_of
from qnas.deploy.export.product import FilePrecision, RealImages, Run, Variant


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


class _Marked(nn.Module):
    """A network whose logits are one for the class that an image's first pixel says."""

    def forward(self, images: Tensor) -> Tensor:
        said = (images[:, 0, 0, 0] * 255).round().long()
        return nn.functional.one_hot(said, 10).float()


def marked(lost: int, won: int, n: int, changed: int = 0) -> tuple[nn.Module, Run, RealImages]:
    """Return a network, a file and images: `lost` are right with the network alone, `won` with the file.

    Both are right for all other images, but for `changed`, which both get wrong, and in different ways.
    """
    pixels = torch.zeros(n, 3, 2, 2, dtype=torch.uint8)
    pixels[:, 0] = torch.arange(n).remainder(10).view(-1, 1, 1)  # the class that the network says
    pixels[: lost + won + changed, 1] = 1  # the file says the class after it
    labels = pixels[:, 0, 0, 0].long()
    labels[lost : lost + won] = (labels[lost : lost + won] + 1) % 10
    labels[lost + won : lost + won + changed] = (labels[lost + won : lost + won + changed] + 2) % 10

    def run(given: Tensor) -> Tensor:
        logits = _Marked()(given)
        turned = given[:, 1, 0, 0] > 0
        return torch.where(turned[:, None], logits.roll(1, 1), logits)

    return _Marked(), run, RealImages(pixels, labels, (0.0,) * 3, (1.0,) * 3, "marked")


def judge(tolerance: Tolerance, *counts: int) -> Parity:
    network, run, images = marked(*counts)
    return compare(network, run, images, tolerance, where="file")


def test_too_many_other_classes_are_refused_whatever_the_logits_tolerance() -> None:
    network = trained().network
    with pytest.raises(ExportError, match=r"file: not written: it gives 0\.0% of 40 images \(95% interval 0"):
        compare(network, run_of(network, torch.neg), digits(40), Tolerance(10.0, 0.8, 1.0), where="file")


def test_other_classes_are_refused_where_their_interval_excludes_the_tolerance() -> None:
    tolerance = Tolerance(1.0, 0.8, 0.02)
    assert judge(tolerance, 0, 0, 40, 12).agreement == 0.7  # at most 82% by its interval
    with pytest.raises(ExportError, match=r" 70\.0% of 400 images \(95% interval 65\.3% to 74\.3%\)"):
        judge(tolerance, 0, 0, 400, 120)


def test_a_drop_is_refused_only_where_its_interval_excludes_the_tolerance() -> None:
    tolerance = Tolerance(1.0, 0.8, 0.02)
    one = judge(tolerance, 1, 0, 36)  # 2.8%, of a single image
    assert one.drop == pytest.approx(1 / 36)
    assert one.drop_interval95 == paired_drop(1, 0, 36)
    with pytest.raises(
        ExportError,
        match=r"^file: not written: 95\.0% of 1000 images are right, of the network 100\.0%: a drop of 5\.0% "
        r"\(95% interval 3\.8% to 6\.5%\), expected at most 2\.0%$",
    ):
        judge(tolerance, 50, 0, 1000)


def test_the_images_that_only_the_file_gets_right_count_against_those_that_it_loses() -> None:
    tolerance = Tolerance(1.0, 0.8, 0.02)
    assert judge(tolerance, 50, 45, 1000).drop == pytest.approx(0.005)
    assert judge(tolerance, 0, 50, 1000).drop_interval95 == paired_drop(0, 50, 1000)  # a gain


def test_borderline_drops_are_told_apart_by_one_image() -> None:
    tolerance = Tolerance(1.0, 0.8, 0.02)
    lows = [paired_drop(lost, 0, 512)[0] for lost in range(40)]
    most = max(lost for lost, low in enumerate(lows) if low <= 0.02)
    assert 12 < most < 25  # more than 2% of the images
    judge(tolerance, most, 0, 512)
    with pytest.raises(ExportError, match=r"\(95% interval 2\.\d%"):
        judge(tolerance, most + 1, 0, 512)


def test_what_seems_within_is_judged_by_the_values_themselves() -> None:
    tolerance, loose = Tolerance(1.0, 0.8, 0.02), Tolerance(1.0, 0.0, 1.0)
    assert judge(loose, 10, 0, 512).seems_within(tolerance)
    assert not judge(loose, 11, 0, 512).seems_within(tolerance)  # 2.15%
    assert judge(loose, 1, 0, 20).seems_within(tolerance)  # one image may always change class
    assert not judge(loose, 2, 0, 20).seems_within(tolerance)
    assert not judge(loose, 0, 0, 100, 21).seems_within(tolerance)
    assert not judge(loose, 1, 0, 512).seems_within(Tolerance(0.5, 0.8, 0.02))  # by its logits


def test_the_largest_drop_may_be_asked_for() -> None:
    assert tolerance_of(Variant("int8")) == TOLERANCES["int8"]
    assert tolerance_of(Variant("int8", max_drop=0.1)) == replace(TOLERANCES["int8"], drop=0.1)


def test_a_network_that_computes_no_numbers_is_refused() -> None:
    broken = copy.deepcopy(trained().network)
    nn.init.constant_(broken.get_submodule("head.classifier").bias, float("inf"))  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="the network's own logits are not finite numbers"):
        compare(broken, run_of(broken), digits(4), TOLERANCES["fp32"], where="file")


def test_a_difference_is_judged_by_the_largest_logit_of_all_images_not_of_its_batch() -> None:
    class Faint(nn.Module):
        """A network whose logits of a single image are a hundredth of the others'."""

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = trained().network(x)
            return logits / 100 if len(x) == 1 else logits

    network = Faint()
    with torch.no_grad():
        faint = float(network(digits(40).take([0])).abs().max())
    tolerance = Tolerance(0.05, 0.0, 1.0)

    def shifted(by: float) -> Run:
        return run_of(network, lambda logits: logits + by if len(logits) == 1 else logits)

    found = compare(network, shifted(0.5 * faint), digits(40), tolerance, where="file")
    assert 0.05 * faint < found.max_difference <= 0.05 * found.scale
    with pytest.raises(ExportError, match=r"for 1 images the file's logits differ.* 0.05 of the largest"):
        compare(network, shifted(0.06 * found.scale), digits(40), tolerance, where="file")
