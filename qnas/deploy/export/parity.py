"""A comparison of a written file with the trained network on real images.

A float32 file differs from the network only by the order of its sums. TOLERANCES limits the differences
of half precision and int8; a file beyond them is refused. A difference of logits is a fact of the file; a
drop of the accuracy on some images is an estimate, and a file is refused where its interval excludes the
tolerance: of 36 images a single one that changes class is 2.8%, and says nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice

import torch
from torch import Tensor, nn

from qnas.common.errors import ExportError
from qnas.common.intervals import paired_drop, wilson
from qnas.deploy.export.product import FilePrecision, RealImages, Run, Variant
from qnas.deploy.export.tracing import told_as

CHECKED_BATCHES = (1, 2, 5)  # several sizes, so that a frozen batch size is noticed
_BATCH = 32  # batch size of the other images


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed difference of a file from its network."""

    difference: float  # of any logit, as a share of the largest
    agreement: float  # share of images with the same class first, at least
    drop: float  # of the accuracy on the images, a share of them

    def __post_init__(self) -> None:
        assert self.difference >= 0, self
        assert 0 <= self.agreement <= 1, self
        assert 0 <= self.drop <= 1, self


# fp16: rounding weights and maps changes the logits of trained networks of the shipped spaces by up to 0.4%
# (benchmarks/export_matrix.py); more in deeper ones. int8: logits change by some percent, and images between
# two classes change class. For both, the accuracy is what counts.
TOLERANCES: dict[FilePrecision, Tolerance] = {
    "fp32": Tolerance(1e-4, 0.99, 0.01),
    "fp16": Tolerance(5e-2, 0.98, 0.01),
    "int8": Tolerance(0.5, 0.8, 0.02),
    "int8-dynamic": Tolerance(0.5, 0.8, 0.02),
}


@dataclass(frozen=True)
class Parity:
    """The difference of a file from its network on real images."""

    images: int
    source: str  # of the images
    max_difference: float  # of the logits
    mean_difference: float
    scale: float  # the largest |logit| of the network
    agreement: float  # share of images with the same class first
    network_accuracy: float  # on these images
    accuracy: float  # of the file
    # of the drop of the accuracy, by the images that one of the two alone gets right; None: not recorded
    drop_interval95: tuple[float, float] | None = None

    @property
    def drop(self) -> float:
        """The drop of the accuracy; below 0 for a gain."""
        return self.network_accuracy - self.accuracy

    def seems_within(self, tolerance: Tolerance) -> bool:
        """Return whether the values themselves are within a tolerance; one image may always change class."""
        one = 1 / self.images + 1e-9  # two of a hundred are not more than 2%
        return (
            self.max_difference <= tolerance.difference * self.scale
            and 1 - self.agreement <= max(one, 1 - tolerance.agreement + 1e-9)
            and self.drop <= max(one, tolerance.drop + 1e-9)
        )


def tolerance_of(variant: Variant) -> Tolerance:
    """Return the tolerance of a precision, with the largest drop that was asked for."""
    tolerance = TOLERANCES[variant.precision]
    return tolerance if variant.max_drop is None else replace(tolerance, drop=variant.max_drop)


def compare(
    network: nn.Module,
    run: Run,
    images: RealImages,
    tolerance: Tolerance,
    *,
    where: str,
    batch: int | None = None,
    noise: bool = False,
) -> Parity:
    """Run images through a network and through its file; return how far the file is from the network.

    `batch` is the file's batch size; None stands for a free one, of which several are tried. With `noise`,
    the logits of the last batch under noise must agree too, without counting in the result. Raises
    ExportError beyond the tolerance, with `where` as the file's name.
    """
    n = len(images)
    batches = [images.take(places) for places in _batches(n, batch)]
    expected = [_logits(network, given, where) for given in batches]
    # of all images: a batch may be one image, whose logits are small by chance
    scale = max(float(logits.abs().max()) for logits in expected)
    got = [
        _put_through(logits, run, given, tolerance, scale, where)
        for logits, given in zip(expected, batches, strict=True)
    ]
    if noise:
        given = _noisy(network, batches[-1])
        logits = _logits(network, given, where)
        _put_through(logits, run, given, tolerance, max(scale, float(logits.abs().max())), where)
    parity = measure(torch.cat(got)[:n], torch.cat(expected)[:n], images)
    if reason := refusal(parity, tolerance):
        raise ExportError(f"{where}: not written: {reason}")
    return parity


def measure(got: Tensor, expected: Tensor, images: RealImages) -> Parity:
    """Return how far a file's logits (images, classes) are from the network's, on the same images."""
    difference = (got - expected).abs()
    ours, theirs = expected.argmax(1), got.argmax(1)
    before, after = ours == images.labels, theirs == images.labels
    return Parity(
        len(images),
        images.source,
        float(difference.max()),
        float(difference.mean()),
        float(expected.abs().max()),
        _share(ours == theirs),
        _share(before),
        _share(after),
        paired_drop(int((before & ~after).sum()), int((after & ~before).sum()), len(images)),
    )


def refusal(parity: Parity, tolerance: Tolerance) -> str | None:
    """Return why a file is certainly beyond a tolerance, None if it may be within."""
    assert parity.drop_interval95 is not None
    n, (low, high) = parity.images, wilson(parity.agreement, parity.images)
    if high < tolerance.agreement:
        return (
            f"it gives {parity.agreement:.1%} of {n} images (95% interval {low:.1%} to {high:.1%}) the class "
            f"that the network gives them, expected at least {tolerance.agreement:.0%}"
        )
    low, high = parity.drop_interval95
    if low > tolerance.drop:
        return (
            f"{parity.accuracy:.1%} of {n} images are right, of the network {parity.network_accuracy:.1%}: a "
            f"drop of {parity.drop:.1%} (95% interval {low:.1%} to {high:.1%}), expected at most "
            f"{tolerance.drop:.1%}"
        )
    return None


def _batches(count: int, batch: int | None) -> list[list[int]]:
    """Return the indices of `count` images in batches; after the last image, the first ones are repeated.

    >>> _batches(9, None), _batches(3, 2)
    ([[0], [1, 2], [3, 4, 5, 6, 7], [8]], [[0, 1], [2, 0]])
    """
    if batch is not None:
        sizes = [batch] * -(-count // batch)
    else:
        rest = max(0, count - sum(CHECKED_BATCHES))
        sizes = [*CHECKED_BATCHES, *[_BATCH] * (rest // _BATCH), *([rest % _BATCH] if rest % _BATCH else [])]
    places = cycle(range(count))
    return [list(islice(places, size)) for size in sizes]


@torch.no_grad()
def _logits(network: nn.Module, given: Tensor, where: str) -> Tensor:
    """Return the network's logits of a batch."""
    logits: Tensor = network(given)
    if not bool(logits.isfinite().all()):
        raise ExportError(f"{where}: not written: the network's own logits are not finite numbers")
    return logits


def _put_through(
    expected: Tensor, run: Run, given: Tensor, tolerance: Tolerance, scale: float, where: str
) -> Tensor:
    """Return the file's logits of a batch, of which these are expected; `scale` is the largest of all."""
    with told_as(f"{where}: the file cannot run {len(given)} images"):
        got = run(given)
    if got.shape != expected.shape:
        raise ExportError(
            f"{where}: not written: the file's logits have the shape {tuple(got.shape)}, "
            f"expected {tuple(expected.shape)}"
        )
    difference = float((got - expected).abs().max())
    if not difference <= tolerance.difference * scale:  # so that NaN is refused too
        raise ExportError(
            f"{where}: not written: for {len(given)} images the file's logits differ from torch's by "
            f"{difference:.3g}, expected at most {tolerance.difference:g} of the largest, {scale:.3g}"
        )
    return got


def describe_drop(interval95: Sequence[float] | None) -> str:
    """Write the interval of a drop in words, to follow both accuracies; nothing where it is not recorded.

    >>> describe_drop((-0.002, 0.011))
    ' (95% interval of the drop -0.2% to 1.1%)'
    """
    if interval95 is None:
        return ""
    low, high = interval95
    return f" (95% interval of the drop {low:.1%} to {high:.1%})"


def _share(right: Tensor) -> float:
    return int(right.sum()) / len(right)


@torch.no_grad()
def _noisy(network: nn.Module, real: Tensor) -> Tensor:
    """Return real images under noise, as strong as possible with logits of about the same size.

    Far from its training images, a quadratic network's logits may grow, and rounding errors even more,
    since products multiply them: a correct file would be refused.
    """
    noise = torch.randn(real.shape, generator=torch.Generator().manual_seed(0))
    limit = 10 * network(real).abs().max()
    for _ in range(20):
        if network(real + noise).abs().max() <= limit:
            break
        noise *= 0.5
    return real + noise
