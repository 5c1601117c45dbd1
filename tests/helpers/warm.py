"""What each run would import and compute anew: imported in a process that the runs are forked from."""

from importlib import import_module

from qnas.latency.device import load_device
from qnas.latency.rivals import price_public_networks

for name in (
    *("matplotlib.backends.backend_agg", "matplotlib.figure", "sklearn.datasets"),
    *("qnas.api.searching", "qnas.api.training", "qnas.commands.cli"),
    *("qnas.search.search_result", "qnas.training.subnet_trainer"),
):
    import_module(name)
price_public_networks(load_device("vpu"))  # of the report's page; it is kept
