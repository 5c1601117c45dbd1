"""The Triton kernels, in Triton's interpreter on the CPU, compiled for a GPU, and on a GPU if there is one.

The interpreter must be chosen before triton is imported, so it has a process of its own.
"""

import importlib.util
import multiprocessing
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnas.nn.kernels import triton_quadratic
from qnas.nn.kernels.triton_quadratic import DTYPES, available, quadratic_backward, quadratic_forward

# asked for without importing it: the interpreter's process imports this module first
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
LAYOUTS = [torch.contiguous_format, torch.channels_last]
Call = Callable[..., tuple[Tensor, ...]]


def _choose_the_interpreter() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_choose_the_interpreter) as pool:
        yield pool


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """A process that imports triton as it is, to compile in."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        yield pool


@pytest.fixture
def interpreted(interpreter: ProcessPoolExecutor) -> Call:
    """y and the four gradients from (grad, x, weights), by the interpreter."""
    return lambda *arguments: interpreter.submit(forward_and_backward, *arguments).result()


def forward_and_backward(grad: Tensor, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    return (quadratic_forward(x, *weights), *quadratic_backward(grad, x, *weights))


def in_shares_of_two_tiles(grad: Tensor, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_quadratic, "WEIGHT_TILES", 2)
        return forward_and_backward(grad, x, *weights)


def by_autograd(grad: Tensor, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """y and the four gradients of y = (w_a * x) . (w_b * x) + w_c * x by torch, in the type of x."""
    leaves = [t.detach().requires_grad_() for t in (x, *weights)]
    channels, _, kernel, _ = weights[0].shape
    a, b, c = (F.conv2d(leaves[0], w, padding=kernel // 2, groups=channels) for w in leaves[1:])
    y = a * b + c
    return (y.detach(), *torch.autograd.grad(y, leaves, grad))


def draw(
    shape: tuple[int, int, int, int],
    kernel: int,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
    device: str = "cpu",
) -> tuple[Tensor, ...]:
    """(grad, x, w_a, w_b, w_c): products of about the size of 1."""
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(shape, generator=generator) for _ in range(2)]
    weights = [torch.randn(shape[1], 1, kernel, kernel, generator=generator) / kernel for _ in range(3)]
    laid = [t.to(device, dtype).contiguous(memory_format=layout) for t in maps]
    return (*laid, *(w.to(device, dtype) for w in weights))


def assert_within_rounding(results: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> None:
    """Compare with float64, relative to each tensor's largest element."""
    expected = by_autograd(*(t.double() for t in inputs))
    dtype = inputs[1].dtype
    # float32 sums of at most some hundred terms; else two roundings, of a gradient on its way and of dx
    tolerance = torch.finfo(dtype).eps * (10 if dtype == torch.float32 else 2)
    for result, exact, name in zip(results, expected, ("y", "dx", "dw_a", "dw_b", "dw_c"), strict=True):
        assert result.dtype == dtype, name
        difference = (result.double() - exact).abs().max() / exact.abs().max()
        assert difference <= tolerance, f"{name}: {difference:.1e} of the largest element"


PLANES, LAST = LAYOUTS


@pytest.mark.parametrize(
    ("shape", "kernel", "layout"),
    [
        ((2, 2, 5, 3), 3, PLANES),
        ((2, 2, 5, 3), 3, LAST),
        ((1, 2, 9, 2), 3, LAST),  # rows over three tiles
        ((1, 2, 2, 35), 3, PLANES),  # columns over two tiles
        ((1, 35, 2, 2), 3, LAST),  # channels over two tiles
        ((1, 2, 3, 6), 5, PLANES),
        ((1, 3, 4, 5), 7, LAST),  # a kernel larger than the map
        ((1, 2, 1, 1), 7, PLANES),
        ((1, 2, 3, 3), 9, LAST),  # more taps than a program takes: columns of the kernel in two groups
        ((2, 1, 3, 4), 1, LAST),  # both layouts at once
    ],
)
def test_values_and_gradients_are_those_of_the_formula(
    interpreted: Call, shape: tuple[int, int, int, int], kernel: int, layout: torch.memory_format
) -> None:
    inputs = draw(shape, kernel, layout=layout)
    assert_within_rounding(interpreted(*inputs), inputs)


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_short_types_lose_no_more_than_their_rounding(interpreted: Call, dtype: torch.dtype) -> None:
    inputs = draw((1, 3, 4, 6), 3, dtype)
    assert_within_rounding(interpreted(*inputs), inputs)


def test_short_types_are_summed_in_float32(interpreted: Call) -> None:
    # 1 + 48 terms that bfloat16's sum would drop one by one, as each is less than half its last place
    x = torch.full((1, 1, 7, 7), 2**-9, dtype=torch.bfloat16)
    x[0, 0, 0, 0] = 1
    zero, one = torch.zeros(1, 1, 7, 7, dtype=torch.bfloat16), torch.ones(1, 1, 7, 7, dtype=torch.bfloat16)
    y = interpreted(torch.zeros_like(x), x, zero, zero, one)[0]
    assert float(y[0, 0, 3, 3]) == float(torch.tensor(1 + 48 * 2**-9).bfloat16())


def test_weight_gradients_over_several_shares_are_whole_and_the_same_every_time(
    interpreter: ProcessPoolExecutor,
) -> None:
    inputs = draw((3, 2, 5, 2), 3, layout=LAST)  # six tiles
    first, second = (interpreter.submit(in_shares_of_two_tiles, *inputs).result() for _ in range(2))
    assert_within_rounding(first, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_keep_the_layout(interpreted: Call, layout: torch.memory_format) -> None:
    y, dx, *_ = interpreted(*draw((1, 3, 4, 5), 1, layout=layout))
    assert y.is_contiguous(memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)


def test_other_layouts_and_packed_weights_give_the_same(interpreted: Call) -> None:
    grad, x, *weights = draw((1, 4, 3, 6), 3)
    strided = torch.zeros(1, 8, 3, 12)[:, ::2, :, ::2].copy_(x)
    last = grad.contiguous(memory_format=torch.channels_last)
    packed = [w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1) for w in weights]
    plain, others = interpreted(grad, x, *weights), interpreted(last, strided, *packed)
    assert all(torch.equal(a, b) for a, b in zip(plain, others, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4)])
def test_of_nothing_gradients_are_zero(interpreted: Call, shape: tuple[int, int, int, int]) -> None:
    y, dx, *of_weights = interpreted(*draw(shape, 3))
    assert y.shape == dx.shape == shape
    assert all(torch.equal(g, torch.zeros(3, 1, 3, 3)) for g in of_weights)


def test_without_a_gpu_only_the_interpreter_makes_them_available(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(available).result()
    assert available() == torch.cuda.is_available()


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(1, 2, 3, 3, dtype=torch.float64), torch.zeros(2, 1, 3, 3), "must be one of"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(2, 1, 4, 4), "kernel must be odd, got 4"),
        (torch.zeros(1, 2, 3, 3), torch.zeros(3, 1, 3, 3), r"must be \(2, 1, 3, 3\), got \(3, 1, 3, 3\)"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(x: Tensor, weight: Tensor, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        quadratic_forward(x, weight, weight, weight)


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((2, 64, 14, 14), torch.float32, LAST),
        ((2, 64, 14, 14), torch.bfloat16, PLANES),
        ((1, 1, 1, 1), torch.float32, PLANES),  # Triton makes constants of arguments that are 1
    ],
)
def test_programs_compile_for_a_gpu_and_need_no_atomics(
    compiler: ProcessPoolExecutor,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    layout: torch.memory_format,
) -> None:
    """The interpreter checks no types: what runs in it may still be no program to the compiler."""
    codes = compiler.submit(compile_for_a_gpu, *draw(shape, 3, dtype, layout)).result()
    assert list(codes) == ["forward", "products", "data_gradient", "weight_gradients"]
    for code in codes.values():
        assert "fma.rn.f32" in code
        assert not re.search(r"\b(atom|red)\.", code)


def compile_for_a_gpu(grad: Tensor, x: Tensor, *weights: Tensor) -> dict[str, str]:
    """PTX by program, compiled as for a launch on compute capability 9.0, but not launched."""
    from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]  # it has no stubs
    from triton.runtime import driver  # type: ignore[import-untyped]

    from qnas.nn.kernels import triton_programs

    device = mock.Mock()
    device.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    device.get_current_device.return_value = device.get_current_stream.return_value = 0
    driver.set_active(device)
    codes: dict[str, str] = {}

    def compile_only(program: str, grid: tuple[int, ...], *arguments: object, warps: int) -> None:
        options = {"num_warps": warps, "enable_fp_fusion": True}
        function = getattr(triton_programs, program)
        codes[program] = function.warmup(*arguments, grid=grid, **options).asm["ptx"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_quadratic, "_run", compile_only)
        forward_and_backward(grad, x, *weights)
    return codes


STAGES = [(64, 64, 56, 56), (64, 128, 28, 28), (64, 256, 14, 14), (64, 512, 7, 7), (3, 33, 31, 17)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("shape", STAGES)
def test_on_a_gpu_no_less_exact_than_cudnn_and_the_same_every_time(
    shape: tuple[int, int, int, int], kernel: int, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        inputs = draw(shape, kernel, dtype, layout, "cuda")
        first, second = forward_and_backward(*inputs), forward_and_backward(*inputs)
        stock = by_autograd(*inputs)
        exact = by_autograd(*(t.double() for t in inputs))
    for ours, again, theirs, right in zip(first, second, stock, exact, strict=True):
        assert torch.equal(ours, again)
        scale = right.abs().max()
        error, their_error = (float((t.double() - right).abs().max() / scale) for t in (ours, theirs))
        # on an H200 at most 2.4 times theirs, in float32: sums over k x k taps are taken in another order
        assert error <= 3 * max(their_error, torch.finfo(dtype).eps)


@pytest.mark.gpu
def test_on_a_gpu_maps_beyond_two_billion_elements_are_reached() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 12e9:
        pytest.skip("needs 9 GB for both maps")
    x = torch.zeros(33, 64, 1024, 1024, dtype=torch.bfloat16, device="cuda")
    x[-1, -1, -1, -1] = 3
    one = torch.ones(64, 1, 1, 1, dtype=torch.bfloat16, device="cuda")
    y = quadratic_forward(x, one, one, one)
    assert float(y[-1, -1, -1, -1]) == 12
