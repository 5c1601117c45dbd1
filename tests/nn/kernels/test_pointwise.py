"""The channel half against the modules that it replaces, in double precision."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnas.nn.kernels import native
from qnas.nn.kernels.pointwise import channel_half

NAMES = ("x", "norm weight", "norm bias", "expand", "expand bias", "project", "project bias")
# batch, channels, height, width, hidden: odd sizes, one image, one place, several chunks, widths that fill
# no vector, or vectors but no panel
SHAPES = [(2, 16, 5, 7, 64), (1, 24, 3, 3, 48), (3, 5, 4, 1, 13), (1, 1, 1, 1, 4), (6, 40, 29, 31, 160)]
SHAPES += [(1, 72, 9, 11, 200), (2, 17, 3, 5, 33)]


@pytest.fixture(params=["torch", "C++"])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setenv("QNAS_KERNELS", "0")
    elif native.library() is None:
        pytest.skip("no C++ kernels here")
    return str(request.param)


def draw(batch: int, channels: int, height: int, width: int, hidden: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(channels)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x = (2 * normal(batch, channels, height, width) + 1).contiguous(memory_format=torch.channels_last)
    weights = (normal(hidden, channels, 1, 1) / channels**0.5, normal(channels, hidden, 1, 1) / hidden**0.5)
    norm = (1 + normal(channels) / 2, normal(channels))
    return [x, *norm, weights[0], normal(hidden), weights[1], normal(channels)]


def plain(x: Tensor, *parameters: Tensor, eps: float = 1e-6) -> Tensor:
    """The definition, by torch's functions one after another."""
    norm_weight, norm_bias, expand, expand_bias, project, project_bias = parameters
    rows = x.permute(0, 2, 3, 1)
    normed = F.layer_norm(rows, rows.shape[3:], norm_weight, norm_bias, eps)
    hidden = F.gelu(F.linear(normed, expand.flatten(1), expand_bias))
    return x + F.linear(hidden, project.flatten(1), project_bias).permute(0, 3, 1, 2)


def run(inputs: list[Tensor]) -> list[Tensor]:
    """Return the result and the gradients of all inputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y = channel_half(*leaves)
    return [y, *torch.autograd.grad(y, leaves, weigh(y))]


def weigh(y: Tensor) -> Tensor:
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(7)).to(y.dtype)


def close(ours: Tensor, exact: Tensor, name: str) -> None:
    scale = float(exact.detach().abs().max())
    error = float((ours.detach().double() - exact.detach()).abs().max())
    assert error <= 3e-6 * scale, f"{name}: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_the_definitions(shape: tuple[int, int, int, int, int], form: str) -> None:
    inputs = draw(*shape)
    exact = [t.double().requires_grad_() for t in inputs]
    y = plain(*exact)
    wanted = [y, *torch.autograd.grad(y, exact, weigh(y))]
    got = run(inputs)
    if shape[1] == 1:  # normalised, one channel is nothing: its gradients are rounding errors
        wanted, got = [*wanted[:1], *wanted[3:]], [*got[:1], *got[3:]]
        names: tuple[str, ...] = ("y", *NAMES[2:])
    else:
        names = ("y", *NAMES)
    for name, ours, reference in zip(names, got, wanted, strict=True):
        assert ours.shape == reference.shape
        close(ours, reference, name)


def test_gradients_are_those_of_finite_differences() -> None:
    inputs = [t.double().requires_grad_() for t in draw(2, 3, 2, 3, 5)]
    assert torch.autograd.gradcheck(channel_half, inputs)


def test_each_of_torchs_chunks_adds_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QNAS_KERNELS", "0")
    inputs = draw(2, 16, 5, 7, 64)
    whole = run(inputs)
    monkeypatch.setattr("qnas.nn.kernels.pointwise.CHUNK_ROWS", 1)
    monkeypatch.setattr("qnas.nn.kernels.pointwise.CHUNK_ACTIVATIONS", 9 * 64)
    for name, ours, reference in zip(("y", *NAMES), run(inputs), whole, strict=True):
        close(ours, reference.double(), name)


def test_no_images_have_no_result_and_no_gradients(form: str) -> None:
    y, grad_x, *gradients = run(draw(0, 6, 4, 4, 8))
    assert y.shape == grad_x.shape == (0, 6, 4, 4)
    assert not any(g.any() for g in gradients)


def test_the_layout_of_the_input_changes_nothing(form: str) -> None:
    x, *parameters = draw(2, 12, 5, 7, 24)
    wanted = run([x, *parameters])
    strided = torch.stack([x, -x], -1)[..., 0]
    for other in (x.contiguous(), x.transpose(2, 3).contiguous().transpose(2, 3), strided):
        for ours, reference in zip(run([other, *parameters]), wanted, strict=True):
            torch.testing.assert_close(ours, reference, rtol=0, atol=0)
    assert wanted[0].is_contiguous(memory_format=torch.channels_last)
    assert wanted[1].is_contiguous(memory_format=torch.channels_last)


def test_without_gradients_the_result_is_the_same_and_keeps_nothing(form: str) -> None:
    inputs = draw(2, 16, 5, 7, 64)
    with torch.no_grad():
        y = channel_half(*(t.requires_grad_() for t in inputs))
    assert y.grad_fn is None
    assert torch.equal(y, run(inputs)[0])


def test_frozen_parameters_get_no_gradients_and_the_inputs_stays_the_same(form: str) -> None:
    inputs = draw(2, 16, 5, 7, 64)
    x = inputs[0].detach().requires_grad_()
    parameters = [t.detach() for t in inputs[1:]]
    y = channel_half(x, *parameters)
    y.backward(weigh(y))  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert torch.equal(x.grad, run(inputs)[1])


@pytest.mark.parametrize("trained", [range(1, 5), range(5, 7)], ids=["norm and expand", "project"])
def test_part_of_the_parameters_may_be_frozen(trained: range, form: str) -> None:
    inputs = draw(2, 16, 5, 7, 64)
    leaves = [t.detach().requires_grad_(i == 0 or i in trained) for i, t in enumerate(inputs)]
    y = channel_half(*leaves)
    y.backward(weigh(y))  # type: ignore[no-untyped-call]
    for i, (leaf, expected) in enumerate(zip(leaves, run(inputs)[1:], strict=True)):
        if i == 0 or i in trained:
            assert leaf.grad is not None
            assert torch.equal(leaf.grad, expected)
        else:
            assert leaf.grad is None


def test_a_second_derivative_is_refused() -> None:
    leaves = [t.requires_grad_() for t in draw(1, 4, 2, 2, 8)]
    y = channel_half(*leaves)
    (grad,) = torch.autograd.grad(y.square().sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()  # type: ignore[no-untyped-call]


def test_results_are_the_same_on_every_run(form: str) -> None:
    inputs = draw(6, 40, 29, 31, 160)
    for first, second in zip(run(inputs), run(inputs), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(native.library() is None, reason="no C++ kernels here")
def test_kernels_results_are_the_same_bits_for_any_number_of_threads() -> None:
    inputs, before = draw(6, 40, 29, 31, 160), torch.get_num_threads()  # 32M multiply-adds, 5 panels
    results = []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(run(inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def gelu(h: Tensor) -> tuple[Tensor, Tensor]:
    """Return the half's GELU of h, (N,), and its slope: of nothing but PW1's bias, through PW2 = 1."""
    size, results = 500, []
    one = torch.eye(size)[:, :, None, None]
    for part in torch.split(F.pad(h, (0, -len(h) % size)), size):
        expand_bias = part.clone().requires_grad_()
        zeros = torch.zeros(size)
        x = torch.zeros(1, size, 1, 1).contiguous(memory_format=torch.channels_last)
        y = channel_half(x, zeros, zeros, torch.zeros_like(one), expand_bias, one, zeros)
        (slope,) = torch.autograd.grad(y, expand_bias, torch.ones_like(y))
        results.append((y.detach().flatten(), slope))
    activated, slopes = (torch.cat(column)[: len(h)] for column in zip(*results, strict=True))
    return activated, slopes


def test_gelu_and_its_slope_are_exact_to_float32(form: str) -> None:
    h = torch.cat([torch.linspace(-40, 40, 50_003), torch.tensor([0.0, -5.42, 5.42])])
    exact = h.double().requires_grad_()
    wanted = F.gelu(exact)
    (slope,) = torch.autograd.grad(wanted.sum(), exact)
    wanted = wanted.detach()
    activated, got = gelu(h)
    size = h.double().abs().clamp_min(1)
    assert float(((activated.double() - wanted) / size).abs().max()) < 3e-7
    assert float((got.double() - slope).abs().max()) < 1e-6


def test_gelu_has_no_rounding_that_grows_with_a_large_input(form: str) -> None:
    h = torch.tensor([-6.5, -100.0, -1e6, 1e6])
    activated, slope = gelu(h)
    assert not activated[1:3].any()
    assert float(activated[3]) == pytest.approx(1e6, rel=1e-6)
    assert abs(float(activated[0])) < 1e-9
    assert torch.allclose(slope, torch.tensor([0.0, 0.0, 0.0, 1.0]), atol=1e-7)


def test_what_is_not_a_number_is_passed_on(form: str) -> None:
    inputs = draw(1, 20, 2, 2, 40)
    inputs[0][0, 3, 1, 1] = torch.nan
    y, grad_x, *_ = run(inputs)
    assert y[0, :, 1, 1].isnan().all()
    assert grad_x[0, :, 1, 1].isnan().all()
    assert not y[0, :, 0].isnan().any()


def test_a_constant_row_is_normalised_to_zeros(form: str) -> None:
    inputs = draw(1, 21, 1, 3, 16)
    inputs[0].fill_(5.0)
    inputs[1].fill_(1e3)
    close(channel_half(*inputs), plain(*(t.double() for t in inputs)), "y")
