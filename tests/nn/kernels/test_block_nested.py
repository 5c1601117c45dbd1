import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qnas.nn.kernels import mixer, native
from qnas.nn.kernels.block import nested_channel_half, nested_mixer_half
from qnas.nn.kernels.pointwise import channel_half

needs_kernels = pytest.mark.skipif(native.library() is None, reason="the C++ kernels cannot be built here")


def draw(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def mixer_inputs(largest: int, kernels: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, the norm's weight and bias, three weights, shares."""
    channels = 6
    weight = (channels, 1, largest, largest)
    x, norm_weight, norm_bias, *weights, shares = draw(
        (2, channels, 5, 9), (channels,), (channels,), weight, weight, weight, (kernels,), dtype=dtype
    )
    # of a sum below 1: the share of identity is missing from it
    return [x, 1 + 0.1 * norm_weight, norm_bias, *(0.3 * w for w in weights), torch.softmax(shares, 0) * 0.7]


def channel_inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """x, the norm's weight and bias, expand, project with biases, gates, share."""
    c, hidden = 4, 16
    shapes = ((2, c, 3, 5), (c,), (c,), (hidden, c, 1, 1), (hidden,), (c, hidden, 1, 1), (c,), (hidden,), ())
    tensors = draw(*shapes, dtype=dtype)
    return [*tensors[:-2], tensors[-2].sigmoid(), tensors[-1].sigmoid()]


def run_mixer(kernels: tuple[int, ...], *tensors: Tensor) -> Tensor:
    x, norm_weight, norm_bias, w_a, w_b, w_c, shares = tensors
    return nested_mixer_half(x, norm_weight, norm_bias, w_a, w_b, w_c, shares, kernels)


def run_channels(*tensors: Tensor) -> Tensor:
    x, norm_weight, norm_bias, expand, expand_bias, project, project_bias, gates, share = tensors
    return nested_channel_half(
        x, norm_weight, norm_bias, expand, expand_bias, project, project_bias, gates, share
    )


def gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    (weights,) = draw(tuple(y.shape), dtype=y.dtype, seed=5)
    return torch.autograd.grad((y * weights).sum(), inputs)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean, variance = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    return (x - mean) / (variance + 1e-6).sqrt() * weight[:, None, None] + bias[:, None, None]


@pytest.mark.parametrize("kernels", [(3, 5, 7), (1, 7), (5,), (3, 5)])
def test_the_mixer_half_is_the_sum_of_all_kernels_mixers(kernels: tuple[int, ...]) -> None:
    x, norm_weight, norm_bias, *weights, shares = mixer_inputs(max(kernels), len(kernels))
    normed = layer_norm(x, norm_weight, norm_bias)
    expected = x
    for kernel, share in zip(kernels, shares, strict=True):
        cut = (max(kernels) - kernel) // 2
        # a centre is what is left when the rings around it are set to zero
        a, b, c = (
            F.conv2d(
                normed, F.pad(w[..., cut:, cut:][..., :kernel, :kernel], [cut] * 4), None, 1, "same", 1, 6
            )
            for w in weights
        )
        expected = expected + share * (a * b + c)
    got = run_mixer(kernels, x, norm_weight, norm_bias, *weights, shares)
    torch.testing.assert_close(got, expected)


@needs_kernels
@pytest.mark.parametrize("kernels", [(3, 5, 7), (3, 7), (5, 7), (7,), (3, 5), (3,)])
def test_the_fused_mixer_half_equals_torchs_own(
    kernels: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for enabled in ("1", "0"):
        monkeypatch.setenv("QNAS_KERNELS", enabled)
        inputs = [t.requires_grad_() for t in mixer_inputs(max(kernels), len(kernels), torch.float32)]
        y = run_mixer(kernels, *inputs)
        assert ("MixerHalf" in type(y.grad_fn).__name__) == (enabled == "1")
        results.append((y, *gradients(y, inputs)))
    for fused, plain in zip(*results, strict=True):
        assert fused.shape == plain.shape
        torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4 * float(plain.detach().abs().max()))


@needs_kernels
def test_an_architecture_step_computes_no_gradient_of_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    backward = mixer.backward

    def record(*arguments: Tensor, **flags: bool) -> mixer.Gradients:
        asked.append(flags)
        return backward(*arguments, **flags)  # type: ignore[arg-type]  # as it was called

    monkeypatch.setattr(mixer, "backward", record)
    *inputs, shares = mixer_inputs(7, 3, torch.float32)
    shares.requires_grad_()
    (alone,) = gradients(run_mixer((3, 5, 7), *inputs, shares), [shares])
    assert asked == [{"needs_x": False, "needs_weights": False}]
    together = [t.requires_grad_() for t in [*inputs, shares]]
    torch.testing.assert_close(alone, gradients(run_mixer((3, 5, 7), *together), together)[-1])
    assert asked[1] == {"needs_x": True, "needs_weights": True}


def test_the_mixer_halfs_gradients_equal_finite_differences() -> None:
    inputs = [t[:, :, :3, :3] if t.ndim == 4 and len(t) == 2 else t for t in mixer_inputs(5, 2)]
    torch.autograd.gradcheck(
        lambda *tensors: run_mixer((3, 5), *tensors), [t.requires_grad_() for t in inputs]
    )


def test_the_channel_halfs_gradients_equal_finite_differences() -> None:
    torch.autograd.gradcheck(run_channels, [t.requires_grad_() for t in channel_inputs()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_channel_half_gates_hidden_channels(dtype: torch.dtype) -> None:
    x, norm_weight, norm_bias, expand, expand_bias, project, project_bias, gates, share = channel_inputs(
        dtype
    )
    hidden = F.gelu(F.conv2d(layer_norm(x, norm_weight, norm_bias), expand, expand_bias))
    branch = F.conv2d(gates[:, None, None] * hidden, project, project_bias)
    got = nested_channel_half(
        x, norm_weight, norm_bias, expand, expand_bias, project, project_bias, gates, share
    )
    torch.testing.assert_close(got, x + share * branch)


def test_open_gates_are_the_largest_block_and_closed_ones_a_smaller() -> None:
    *block, _, _ = channel_inputs(torch.float32)
    x, norm_weight, norm_bias, expand, expand_bias, project, project_bias = block
    one = torch.ones(())
    torch.testing.assert_close(run_channels(*block, torch.ones(16), one), channel_half(*block))
    half = (torch.arange(16) < 8).float()
    smaller = channel_half(
        x, norm_weight, norm_bias, expand[:8], expand_bias[:8], project[:, :8], project_bias
    )
    torch.testing.assert_close(run_channels(*block, half, one), smaller)


@pytest.mark.parametrize("kernels", ["1", "0"])
def test_without_a_share_of_blocks_the_input_passes_unchanged(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QNAS_KERNELS", kernels)
    *inputs, shares = mixer_inputs(7, 3, torch.float32)
    torch.testing.assert_close(run_mixer((3, 5, 7), *inputs, 0 * shares), inputs[0], rtol=0, atol=0)
    *block, gates, _ = channel_inputs(torch.float32)
    torch.testing.assert_close(run_channels(*block, gates, torch.zeros(())), block[0], rtol=0, atol=1e-7)
