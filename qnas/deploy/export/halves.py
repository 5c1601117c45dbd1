"""What a network computes in half precision, emulated: every result of an operator is rounded to a half.

The runtimes of a CPU compute a file of halves in single precision, and do not see what overflows on the
device. Here operators compute in single precision, as the hardware accumulates, on weights and maps that are
rounded as the device stores them. So the first result beyond the range of halves is found with its value.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from qnas.common.errors import ExportError
from qnas.deploy.export.parity import TOLERANCES, Tolerance, compare
from qnas.deploy.export.product import RealImages

LARGEST = torch.finfo(torch.float16).max  # 65504
IMAGES = 128  # at most; the emulation takes about three times as long as the network
# The role of an operator in a module; others are told by their names.
_ROLES = {"mul": "product", "add": "sum", "sub": "difference", "pow": "power"}


def check_halves(
    computed: nn.Module,
    reference: nn.Module,
    images: RealImages,
    where: str,
    tolerance: Tolerance | None = None,
) -> str:
    """Emulate a network in halves on real images; return what was seen, in a sentence.

    `computed` is the network as a file states it, in float32 and evaluation mode; `reference` is the network
    as trained, whose logits are expected. `tolerance` defaults to that of fp16 files. Raises ExportError with
    the layer if a weight or a result leaves the range of halves, and if the logits are too far off.
    """
    places = torch.linspace(0, len(images) - 1, min(IMAGES, len(images))).round().int().tolist()
    some = RealImages(
        images.pixels[places],
        images.labels[places],
        images.mean,
        images.std,
        f"{len(places)} of {images.source}",
    )
    halves = Halves(computed, where)
    seen = compare(reference, halves, some, tolerance or TOLERANCES["fp16"], where=f"{where}, in halves")
    return (
        f"emulated in half precision on {len(places)} images: the logits differ by "
        f"{seen.max_difference / (seen.scale or 1):.1e} of the largest, {seen.accuracy:.1%} are right (in "
        f"single precision {seen.network_accuracy:.1%}); the largest value is {halves.largest:.4g} of "
        f"{LARGEST:.0f}, in {halves.largest_in}"
    )


class Halves:
    """A network in emulated half precision: images (B, C, H, W), float32 -> logits (B, classes), float32.

    Raises ExportError, with the layer, for the first weight or result beyond +-65504 or not a number.
    `largest` is the largest absolute value of a result so far, in the layer `largest_in`.
    """

    def __init__(self, network: nn.Module, where: str) -> None:
        self.network, self.where = network, where
        self.largest, self.largest_in = 0.0, "the images"
        self.rounded = {
            name: self._fitting(tensor, f"weight {name} has")[0] if tensor.is_floating_point() else tensor
            for name, tensor in [*network.named_parameters(), *network.named_buffers()]
        }

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return the logits of a batch."""
        with _paths(self.network) as path, _Rounded(partial(self._result, path)):
            logits: Tensor = torch.func.functional_call(self.network, self.rounded, (_round(images),))
        return logits

    def _result(self, path: list[tuple[str, nn.Module]], operator: str, result: Tensor) -> Tensor:
        name, module = path[-1] if path else ("", self.network)
        # a module of torch is an operator; others have several
        has_one = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
        role = _ROLES.get(operator, operator)
        layer = name if has_one and name else f"{name}: {role}" if name else role
        rounded, largest = self._fitting(result, f"with real images {layer} reaches")
        if largest > self.largest:
            self.largest, self.largest_in = largest, layer
        return rounded

    def _fitting(self, tensor: Tensor, what: str) -> tuple[Tensor, float]:
        """Return a tensor rounded to halves, and its largest |value|. Raises ExportError beyond the range."""
        largest = max(-float(end) if end < 0 else float(end) for end in torch.aminmax(tensor.detach()))
        if not largest <= LARGEST:  # so that what is not a number is refused too
            raise ExportError(
                f"{self.where}: not written: {what} {largest:.5g}, and half precision ends at {LARGEST:.0f}"
            )
        return _round(tensor), largest


def _round(tensor: Tensor) -> Tensor:
    return tensor.detach().half().float()


@contextmanager
def _paths(network: nn.Module) -> Iterator[list[tuple[str, nn.Module]]]:
    """Keep the modules that are being computed, outermost first, with their names."""
    path: list[tuple[str, nn.Module]] = []

    def enter(name: str, module: nn.Module, _: Any) -> None:
        path.append((name, module))

    def leave(*_: Any) -> None:
        path.pop()

    hooks = [
        hook
        for name, module in network.named_modules()
        for hook in (
            module.register_forward_pre_hook(partial(enter, name)),
            module.register_forward_hook(leave, always_call=True),
        )
    ]
    try:
        yield path
    finally:
        for hook in hooks:
            hook.remove()


class _Rounded(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Put a function's values in place of operators' new results; it gets an operator's name and result."""

    def __init__(self, result: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.result = result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = func(*args, **(kwargs or {}))
        aliases = [each.alias_info for each in func._schema.returns]
        if any(alias is not None and not alias.is_write for alias in aliases):
            return results  # a view
        operator = func.overloadpacket.__name__.removesuffix("_")
        if operator == "mul" and args[0] is args[1]:
            operator = "square"
        if isinstance(results, Tensor):
            return self._rounded(operator, results, aliases[0] is not None)
        if not isinstance(results, tuple | list):
            return results
        return type(results)(
            self._rounded(operator, each, False) if isinstance(each, Tensor) else each for each in results
        )

    def _rounded(self, operator: str, result: Tensor, is_in_place: bool) -> Tensor:
        if not result.is_floating_point() or not result.numel():
            return result
        rounded = self.result(operator, result)
        return result.copy_(rounded) if is_in_place else rounded
