"""The quadratic depthwise convolution: Y = (W_a * X) . (W_b * X) + W_c * X.

`*` is a depthwise convolution and `.` the elementwise product (QuadraNet, arXiv 2311.17956, eq. 6
and 7). `quadratic_conv2d_reference` is three convolutions under torch's autograd. It is what is exported
and what faster forms are compared with. `quadratic_conv2d` uses the fastest available form
(`choose_form`), with a backward pass that needs only x and the weights.

In eager mode this is an autograd.Function. Only tracers of programs see the operators
`qnas::quadratic_conv2d` and `qnas::quadratic_conv2d_backward`, since torch.library takes 25 us longer per
training step (65 against 40 us for empty kernels), a tenth of a native step on a 2 x 2 map.
Compilers keep the operators whole. Exporters may decompose them (`decompositions`); the ONNX exporter never
sees them. They are not in torch's own table of decompositions, because inductor, if CI is set in the
environment, refuses operators that are in this table and are still compiled whole.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qnas.nn.kernels import lean_quadratic, mixer, native, triton_quadratic

Form = Literal["native", "triton", "lean", "reference"]

# Up to this many elements of x, the lean form keeps the factors too: recomputing them takes a fifth of a
# training step on small maps, and would save a megabyte or two.
KEPT_ELEMENTS = 1 << 18

_PLAIN = (Tensor, nn.Parameter)  # subclasses may follow the operators applied to them


def quadratic_conv2d(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None = None) -> Tensor:
    """Apply the quadratic depthwise convolution at stride 1, padded to keep the size.

    x: (B, C, H, W); weights: (C, 1, k, k) with k odd; bias: (C,), added at the end. Returns (B, C, H, W).
    Under autocast it runs in autocast's dtype, as a convolution does.
    """
    channels, kernel = w_a.shape[0], w_a.shape[-1]
    assert w_a.shape == w_b.shape == w_c.shape == (channels, 1, kernel, kernel), (
        "weights must be (C, 1, k, k)"
    )
    assert kernel % 2 == 1, f"kernel must be odd, got {kernel}"
    if not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, w_a, w_b, w_c = (t.to(dtype) for t in (x, w_a, w_b, w_c))
        bias = None if bias is None else bias.to(dtype)
    if torch.compiler.is_compiling():
        if torch.onnx.is_in_onnx_export():  # ONNX has no such operator
            return quadratic_conv2d_reference(x, w_a, w_b, w_c, bias)
        whole: Tensor = torch.ops.qnas.quadratic_conv2d.default(x, w_a, w_b, w_c, bias)
        return whole
    form = choose_form(x, w_a, w_b, w_c)
    if form == "reference":
        return quadratic_conv2d_reference(x, w_a, w_b, w_c, bias)
    if torch.is_grad_enabled():
        y: Tensor = _Quadratic.apply(form, x, w_a, w_b, w_c)
        return y if bias is None else y + bias[:, None, None]
    return _forward(form, x, w_a, w_b, w_c, bias)


def quadratic_conv2d_reference(
    x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute `quadratic_conv2d` by its definition, with torch's autograd."""
    a, b, c = (
        # int: under torch.jit.trace a size is a tensor, which torch 2.8 does not accept as padding
        F.conv2d(x, w, b, padding=int(w.shape[-1]) // 2, groups=w.shape[0])
        for w, b in ((w_a, None), (w_b, None), (w_c, bias))
    )
    return a * b + c


def choose_form(x: Tensor, *weights: Tensor) -> Form:
    """Return the form for these tensors, the first whose condition holds:

    - reference: torch's operators are being followed (torch.func, a dispatch mode, torch.jit.trace, a
      subclass of Tensor), which would miss a kernel's work or record its result as a constant
    - native: on a CPU, all float32, the C++ kernels are available and support the kernel size
      (not with QNAS_KERNELS=0)
    - lean: on a CPU
    - triton: on a GPU, all of one dtype that the kernels support, Triton is installed, QNAS_KERNELS is not 0
    - reference: in all other cases
    """
    if is_watched():
        return "reference"
    tensors = (x, *weights)
    for t in tensors:
        if type(t) not in _PLAIN:
            return "reference"
    if x.is_cpu:
        for t in weights:
            if t.dtype != torch.float32:
                return "lean"
        return "native" if mixer.is_supported(x, weights[0].shape[-1]) else "lean"
    served = x.dtype in triton_quadratic.DTYPES and all(t.dtype == x.dtype for t in tensors)
    if x.is_cuda and served and native.is_enabled() and triton_quadratic.available():
        return "triton"
    return "reference"


def decompositions() -> dict[Any, Callable[..., Any]]:
    """Return torch.export's default decompositions, with this operator's into three convolutions.

    `torch.export.export(network, inputs).run_decompositions(decompositions())` returns a program that runs
    without qnas.
    """
    table: dict[Any, Callable[..., Any]] = torch.export.default_decompositions()
    table[torch.ops.qnas.quadratic_conv2d.default] = quadratic_conv2d_reference
    return table


def is_watched() -> bool:
    """Return whether torch's operators are being followed one by one, which would miss a kernel's work."""
    # torch has no public names for these
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_tracing()
    )


def _forward(form: Form, x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None) -> Tensor:
    if form == "native":
        y = mixer.forward(x, w_a, w_b, w_c)
    elif form == "triton":
        y = triton_quadratic.quadratic_forward(x, w_a, w_b, w_c)
    else:
        return lean_quadratic.quadratic_forward(x, w_a, w_b, w_c, bias)[0]
    return y if bias is None else y.add_(bias[:, None, None])


def _backward(
    form: Form,
    grad: Tensor,
    x: Tensor,
    w_a: Tensor,
    w_b: Tensor,
    w_c: Tensor,
    needed: Sequence[bool],
    factors: lean_quadratic.Factors | None = None,
) -> lean_quadratic.Gradients:
    if torch.is_autocast_enabled(x.device.type):
        # keep the forward pass's dtypes: torch's operators would cast again
        with torch.autocast(x.device.type, enabled=False):
            return _backward(form, grad, x, w_a, w_b, w_c, needed, factors)
    if form == "native":
        return mixer.backward(grad, x, w_a, w_b, w_c, needs_x=needed[0], needs_weights=any(needed[1:]))[:4]
    if form == "triton":
        return triton_quadratic.quadratic_backward(grad, x, w_a, w_b, w_c)
    return lean_quadratic.quadratic_backward(grad, x, w_a, w_b, w_c, needed, factors)


def differentiable_gradients(
    y: Tensor, inputs: Sequence[Tensor], grad: Tensor, needed: Sequence[bool]
) -> Iterator[Tensor | None]:
    """Return differentiable gradients of y's inputs; None for those not `needed`."""
    wanted = [t for t, is_needed in zip(inputs, needed, strict=True) if is_needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True) if wanted else ())
    return (next(found) if is_needed else None for is_needed in needed)


class _Quadratic(torch.autograd.Function):
    """The operator in eager mode. It keeps x and the weights, and for a small map the factors."""

    @staticmethod
    def forward(ctx: Any, form: Form, x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor) -> Tensor:
        ctx.form = form
        if form == "lean" and x.numel() <= KEPT_ELEMENTS:
            y, factors = lean_quadratic.quadratic_forward(x, w_a, w_b, w_c)
            ctx.save_for_backward(x, w_a, w_b, w_c, *factors)
            return y
        ctx.save_for_backward(x, w_a, w_b, w_c)
        return _forward(form, x, w_a, w_b, w_c, None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, w_a, w_b, w_c, *factors = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():  # create_graph: only torch's operators have second derivatives
            inputs = (x, w_a, w_b, w_c)
            y = quadratic_conv2d_reference(*inputs)
            return (None, *differentiable_gradients(y, inputs, grad, needed))
        kept = (factors[0], factors[1]) if factors else None
        return (None, *_backward(ctx.form, grad, x, w_a, w_b, w_c, needed, kept))


# Tracers of programs see these two operators. Results are dense and in x's layout, whatever the form returns.


@torch.library.custom_op("qnas::quadratic_conv2d", mutates_args=())
def _operator(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # keep the inputs' dtypes
        y = _forward(choose_form(x, w_a, w_b, w_c), x, w_a, w_b, w_c, bias)
    return y.contiguous(memory_format=_layouts(x)[0])


@torch.library.custom_op("qnas::quadratic_conv2d_backward", mutates_args=())
def _backward_operator(
    grad: Tensor, x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, needed: Sequence[bool]
) -> list[Tensor]:
    """Return the gradients of x, w_a, w_b, w_c; empty if not needed, as operators cannot return None."""
    found = _backward(choose_form(x, w_a, w_b, w_c), grad, x, w_a, w_b, w_c, needed)
    return [
        g.contiguous(memory_format=layout) if wanted and g is not None else x.new_empty(0)
        for g, wanted, layout in zip(found, needed, _layouts(x), strict=True)
    ]


@_operator.register_fake
def _(x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, bias: Tensor | None) -> Tensor:
    return torch.empty_like(x, memory_format=_layouts(x)[0])


@_backward_operator.register_fake
def _(grad: Tensor, x: Tensor, w_a: Tensor, w_b: Tensor, w_c: Tensor, needed: Sequence[bool]) -> list[Tensor]:
    return [
        torch.empty_like(t, memory_format=layout) if wanted else x.new_empty(0)
        for t, layout, wanted in zip((x, w_a, w_b, w_c), _layouts(x), needed, strict=True)
    ]


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad
    found = _backward_operator(grad, *ctx.saved_tensors, needed[:4])
    bias = grad.sum((0, 2, 3)) if needed[4] else None
    return (*(g if wanted else None for g, wanted in zip(found, needed[:4], strict=True)), bias)


def _layouts(x: Tensor) -> tuple[torch.memory_format, ...]:
    """Return the memory formats of x and the three weights for the operators' results."""
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    return (torch.channels_last if is_last else torch.contiguous_format, *[torch.contiguous_format] * 3)


_operator.register_autograd(_differentiate, setup_context=_keep)
