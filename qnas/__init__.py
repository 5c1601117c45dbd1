"""Hardware-aware neural architecture search for image networks, inside a latency budget.

    import qnas

    result = qnas.run_search("union-mobile", budgets={"vpu": "30ms"}, data="digits")
    trained = qnas.train_subnet(result)
    qnas.export(trained, formats=["onnx"])

Importing the package loads nothing heavy: each name below is loaded at its first use, and torch only by the
names that need it. Errors that the user can fix are `QnasError`; nothing is printed unless requested.
"""

import sys
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnas.api.checking import check_data
    from qnas.api.deriving import Derivation, ParetoFronts, derive, pareto
    from qnas.api.exporting import export
    from qnas.api.measuring import measure
    from qnas.api.predicting import predict
    from qnas.api.results import DerivedNetwork, SearchResult, TrainedNetwork
    from qnas.api.rivals import rivals
    from qnas.api.searching import load_run, run_search
    from qnas.api.training import train_subnet
    from qnas.common.errors import Interrupted, QnasError
    from qnas.data.datasets import Datasets
    from qnas.data.sources import open_dataset
    from qnas.latency.device import Device, load_device
    from qnas.latency.own_latency import device_from_blocks, device_from_function
    from qnas.latency.prediction import Prediction
    from qnas.latency.rivals import Rivals
    from qnas.spaces.arch import Arch
    from qnas.spaces.blocks import register_block
    from qnas.spaces.family import SpaceFamily, load_family, make_family
    from qnas.spaces.neurons import register_neuron
    from qnas.spaces.space import SearchSpace, load_space, make_space

try:
    __version__ = version("quadranet-nas")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

# The public names, by the module that defines them.
_OFFERED = {
    "qnas.api.checking": ("check_data",),
    "qnas.api.deriving": ("Derivation", "ParetoFronts", "derive", "pareto"),
    "qnas.api.exporting": ("export",),
    "qnas.api.measuring": ("measure",),
    "qnas.api.predicting": ("predict",),
    "qnas.api.results": ("DerivedNetwork", "SearchResult", "TrainedNetwork"),
    "qnas.api.rivals": ("rivals",),
    "qnas.api.searching": ("load_run", "run_search"),
    "qnas.api.training": ("train_subnet",),
    "qnas.common.errors": ("Interrupted", "QnasError"),
    "qnas.data.datasets": ("Datasets",),
    "qnas.data.sources": ("open_dataset",),
    "qnas.latency.device": ("Device", "load_device"),
    "qnas.latency.own_latency": ("device_from_blocks", "device_from_function"),
    "qnas.latency.prediction": ("Prediction",),
    "qnas.latency.rivals": ("Rivals",),
    "qnas.spaces.arch": ("Arch",),
    "qnas.spaces.blocks": ("register_block",),
    "qnas.spaces.family": ("SpaceFamily", "load_family", "make_family"),
    "qnas.spaces.neurons": ("register_neuron",),
    "qnas.spaces.space": ("SearchSpace", "load_space", "make_space"),
}
_MODULE_OF = {name: module for module, names in _OFFERED.items() for name in names}

# written out, as the documentation and type checkers read it without running this file
__all__ = [
    "Arch",
    "Datasets",
    "Derivation",
    "DerivedNetwork",
    "Device",
    "Interrupted",
    "ParetoFronts",
    "Prediction",
    "QnasError",
    "Rivals",
    "SearchResult",
    "SearchSpace",
    "SpaceFamily",
    "TrainedNetwork",
    "__version__",
    "check_data",
    "derive",
    "device_from_blocks",
    "device_from_function",
    "export",
    "load_device",
    "load_family",
    "load_run",
    "load_space",
    "make_family",
    "make_space",
    "measure",
    "open_dataset",
    "pareto",
    "predict",
    "register_block",
    "register_neuron",
    "rivals",
    "run_search",
    "train_subnet",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if sys.platform == "win32" and _MODULE_OF[name] != "qnas.common.errors":
        from qnas.common.errors import NOT_ON_WINDOWS, QnasError

        raise QnasError(NOT_ON_WINDOWS)
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # so that it is loaded once
    return value


def __dir__() -> list[str]:
    return __all__
