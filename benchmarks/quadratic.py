"""The quadratic convolution against three F.conv2d under torch's autograd, interleaved, as ratios.

    python benchmarks/quadratic.py [--threads 1] [--repeats 15]

(Not named operator.py: a script's folder comes first on the path, and the library has an `operator`.)
Prints medians in milliseconds of the reference, and of quadratic_conv2d as shares of it.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from qnas.quadratic import quadratic_conv2d, quadratic_conv2d_reference

# (batch, channels, height): the stages of quadranet-small and of quadranet-mobile at 32 px, and one
# stage of the deployed network
SHAPES = [
    (64, 32, 16),
    (64, 64, 8),
    (64, 128, 4),
    (64, 24, 8),
    (64, 40, 4),
    (64, 80, 2),
    (64, 192, 1),
    (8, 64, 56),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{'shape':>16} {'k':>2} {'forward ms':>11} {'step ms':>8} {'forward':>8} {'step':>6}")
    for batch, channels, size in SHAPES:
        for kernel in (3, 5, 7):
            reference, ours = measure(batch, channels, size, kernel, options.repeats)
            ratios = f"{ours[0] / reference[0]:8.2f} {ours[1] / reference[1]:6.2f}"
            shape = f"({batch},{channels},{size})"
            print(f"{shape:>16} {kernel:>2} {reference[0]:11.2f} {reference[1]:8.2f} {ratios}")


def measure(
    batch: int, channels: int, size: int, kernel: int, repeats: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Return median milliseconds (forward, training step) of the reference and of ours."""
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last).requires_grad_()
    weights = [torch.randn(channels, 1, kernel, kernel, requires_grad=True) for _ in range(3)]
    grad = torch.randn_like(x)
    forms: list[Callable[..., Tensor]] = [quadratic_conv2d_reference, quadratic_conv2d]
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in forms]
    for _ in range(repeats):
        for form, (forward, step) in zip(forms, times, strict=True):
            start = time.perf_counter()
            y = form(x, *weights)
            middle = time.perf_counter()
            y.backward(grad)  # type: ignore[no-untyped-call]  # torch leaves it untyped
            forward.append(1e3 * (middle - start))
            step.append(1e3 * (time.perf_counter() - start))
    first, second = ((statistics.median(f), statistics.median(s)) for f, s in times)
    return first, second


if __name__ == "__main__":
    main()
