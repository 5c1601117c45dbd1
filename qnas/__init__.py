"""Hardware-aware neural architecture search for image networks, inside a latency budget.

Importing this package imports nothing heavy; see the modules.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("quadranet-nas")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+unknown"
