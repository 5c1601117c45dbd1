"""In place of torch's ONNX exporter, which takes seconds: equal networks are traced once."""

import io
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor


class _Program:
    """What is used of torch's ONNXProgram."""

    def __init__(self, graph: bytes) -> None:
        self.model_proto = onnx.load_from_string(graph)


class _Content(pickle.Pickler):
    """Writes tensors as their values: torch writes addresses."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        values = value.detach().contiguous().numpy().tobytes()
        facts = value.shape, value.stride(), value.dtype, value.requires_grad, type(value)
        return _Content, (tuple(map(str, facts)), values)


def _content(*values: object) -> bytes | None:
    """Return bytes that are the same for equal values only, None where there are none."""
    file = io.BytesIO()
    try:
        _Content(file).dump(values)
    except (pickle.PicklingError, AttributeError, TypeError):  # classes and functions of a test's own
        return None
    return file.getvalue()


_graphs: dict[bytes, bytes] = {}


@contextmanager
def traced_once() -> Iterator[None]:
    """Let `torch.onnx.export` give the graph of equal networks, inputs and options again, a copy each time.

    All of qnas that comes before and after it runs: a network that is lowered otherwise is another one.
    """
    trace: Callable[..., Any] = torch.onnx.export

    def export(network: Any, inputs: Any, *places: Any, **options: Any) -> Any:
        key = None if places or "f" in options else _content(network, inputs, repr(sorted(options.items())))
        if key is None:
            return trace(network, inputs, *places, **options)
        if key not in _graphs:
            _graphs[key] = trace(network, inputs, **options).model_proto.SerializeToString()
        return _Program(_graphs[key])

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(torch.onnx, "export", export)
        yield
