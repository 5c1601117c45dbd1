"""Hardware-aware neural architecture search for image networks, inside a latency budget.

    import qnas

    result = qnas.run_search("quadranet-mobile", budgets={"vpu": "30ms"}, data="digits")
    trained = qnas.train_subnet(result)
    qnas.export(trained, formats=["onnx"])

Importing the package loads nothing heavy: each name below is loaded when it is first used, and torch only
by those that need it. Errors that the user can mend are `QnasError`; nothing prints unless asked.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qnas.api.deriving import Derivation as Derivation
    from qnas.api.deriving import ParetoFronts as ParetoFronts
    from qnas.api.deriving import derive as derive
    from qnas.api.deriving import pareto as pareto
    from qnas.api.results import DerivedNetwork as DerivedNetwork
    from qnas.api.results import SearchResult as SearchResult
    from qnas.api.results import TrainedNetwork as TrainedNetwork
    from qnas.common.errors import Interrupted as Interrupted
    from qnas.common.errors import QnasError as QnasError
    from qnas.latency.device import Device as Device
    from qnas.latency.device import load_device as load_device
    from qnas.spaces.arch import Arch as Arch
    from qnas.spaces.space import SearchSpace as SearchSpace
    from qnas.spaces.space import load_space as load_space

try:
    __version__ = version("quadranet-nas")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"

# What the package offers, by the module that has it.
_OFFERED = {
    "qnas.api.deriving": ("Derivation", "ParetoFronts", "derive", "pareto"),
    "qnas.api.results": ("DerivedNetwork", "SearchResult", "TrainedNetwork"),
    "qnas.common.errors": ("Interrupted", "QnasError"),
    "qnas.latency.device": ("Device", "load_device"),
    "qnas.spaces.arch": ("Arch",),
    "qnas.spaces.space": ("SearchSpace", "load_space"),
}
_MODULE_OF = {name: module for module, names in _OFFERED.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    """Load what is asked for from the module that has it (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value  # so that it is loaded once
    return value


def __dir__() -> list[str]:
    return __all__
