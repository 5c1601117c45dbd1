"""The names of a run's files and folders.

    config.json           the request with all defaults filled in, and versions
    space.yaml            a copy of the search space
    table-DEVICE.csv      a copy of the latency table
    metrics.jsonl         a line a logged step
    metrics.csv           a line an epoch, where a network is trained
    checkpoint.pt         the state of an unfinished run (and checkpoint-before.pt)
    run.lock              present while a process works in the folder
    supernet.safetensors  the trained weights of all candidates
    arch.json             the derived architecture with its certificate
    report.html           a page with all of this
    broken.csv            the images that were left out, where there are any
    budget.png            the expected amounts on their way to the limits
    search.json           the final probabilities; the k best networks ranked; the rivals
    tensorboard/          what tensorboard writes
    pareto/               what pareto writes: the best networks by budget
    derived/              what derive writes, for other devices and budgets
    subnet/               what train-subnet writes
    export/               what export writes

Every file is written whole or not at all, and can be read without qnas.
"""

from pathlib import Path

RUNS_FOLDER = Path("runs")  # where new runs go

CONFIG_FILE = "config.json"
SPACE_FILE = "space.yaml"
METRICS_FILE = "metrics.jsonl"
EPOCHS_FILE = "metrics.csv"
LOCK_FILE = "run.lock"
SUPERNET_FILE = "supernet.safetensors"
ARCH_FILE = "arch.json"
SEARCH_FILE = "search.json"
BUDGET_PLOT_FILE = "budget.png"
REPORT_FILE = "report.html"
BROKEN_FILE = "broken.csv"

DERIVED_FOLDER = "derived"
PARETO_FOLDER = "pareto"
TENSORBOARD_FOLDER = "tensorboard"
SUBNET_FOLDER = "subnet"
EXPORT_FOLDER = "export"

# in subnet/
WEIGHTS_FILE = "weights.safetensors"
RESULT_FILE = "result.json"
PREDICTIONS_FILE = "predictions.safetensors"  # the network's answer for each test image
BEST_FILE = "best.safetensors"  # the weights that did best on the test images: chosen by them
RECIPE_FILE = "recipe.yaml"
SPEED_FILE = "speed.json"  # measured on this machine, so not a part of the result
SAMPLE_FILE = "sample.safetensors"  # some test images, with which an export is checked

# what a new run in the folder of a former one removes; first what says that the former one is complete
CLEARED_FILES = (
    *(ARCH_FILE, RESULT_FILE, METRICS_FILE, EPOCHS_FILE, SUPERNET_FILE, BUDGET_PLOT_FILE, REPORT_FILE),
    *(BROKEN_FILE, SEARCH_FILE, WEIGHTS_FILE, BEST_FILE, PREDICTIONS_FILE, SAMPLE_FILE, SPEED_FILE),
)
CLEARED_FOLDERS = (SUBNET_FOLDER, EXPORT_FOLDER, DERIVED_FOLDER, PARETO_FOLDER, TENSORBOARD_FOLDER)


def table_file(device: str) -> str:
    """Return the name of a run's copy of a device's latency table."""
    return f"table-{device}.csv"
