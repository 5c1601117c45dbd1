"""The names of a run's files and folders.

    config.json           the request with all defaults filled in, and versions
    space.yaml            a copy of the search space
    table-DEVICE.csv      a copy of the latency table
    metrics.jsonl         one line per logged step
    metrics.csv           one line per epoch, if a network is trained
    checkpoint.pt         the state of an unfinished run (and checkpoint-before.pt)
    run.lock              present while a process works in the folder
    supernet.safetensors  the trained weights of all candidates
    arch.json             the derived architecture with its certificate
    report.html           a page about the run
    broken.csv            the images that cannot be decoded, if any
    left-out.csv          the files of the data that are not used, if any
    budget.png            the expected amounts relative to the limits, by step
    search.json           the final probabilities, the ranking, and networks for comparison
    family.yaml           the family of spaces that was searched, if there is one
    family.json           its layouts, with a bound for each, and the ranking over all of them
    layouts/              the latency tables of its layouts
    finalists/            the trainings of the finalists, a folder each, and the winner's weights
    tensorboard/          output of tensorboard
    pareto/               output of pareto: the best networks by budget
    derived/              output of derive, for other devices and budgets
    subnet/               output of train-subnet
    export/               output of export

Files are written atomically and can be read without qnas.
"""

from pathlib import Path

RUNS_FOLDER = Path("runs")  # folder of new runs

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
LEFT_OUT_FILE = "left-out.csv"
FAMILY_SPACE_FILE = "family.yaml"
FAMILY_FILE = "family.json"

LAYOUTS_FOLDER = "layouts"

FINALISTS_FOLDER = "finalists"
DERIVED_FOLDER = "derived"
PARETO_FOLDER = "pareto"
TENSORBOARD_FOLDER = "tensorboard"
SUBNET_FOLDER = "subnet"
EXPORT_FOLDER = "export"

# in finalists/, beside the winner's weights
SECONDS_FILE = "seconds.json"  # measured on this machine, so not part of the result

# in subnet/
WEIGHTS_FILE = "weights.safetensors"
RESULT_FILE = "result.json"
PREDICTIONS_FILE = "predictions.safetensors"  # the network's prediction for each test image
BEST_FILE = "best.safetensors"  # the weights with the best test accuracy: selected on test images
RECIPE_FILE = "recipe.yaml"
SPEED_FILE = "speed.json"  # measured on this machine, so not part of the result
SAMPLE_FILE = "sample.safetensors"  # some test images, to check an export

# removed by a new run in the folder of a former one, first the files that mark that one as complete
CLEARED_FILES = (
    *(ARCH_FILE, RESULT_FILE, METRICS_FILE, EPOCHS_FILE, SUPERNET_FILE, BUDGET_PLOT_FILE, REPORT_FILE),
    *(BROKEN_FILE, LEFT_OUT_FILE, SEARCH_FILE, WEIGHTS_FILE, BEST_FILE, PREDICTIONS_FILE, SAMPLE_FILE),
    *(SPEED_FILE, FAMILY_FILE, FAMILY_SPACE_FILE),
)
CLEARED_FOLDERS = (
    *(FINALISTS_FOLDER, SUBNET_FOLDER, EXPORT_FOLDER, DERIVED_FOLDER, PARETO_FOLDER),
    *(TENSORBOARD_FOLDER, LAYOUTS_FOLDER),
)


def table_file(device: str) -> str:
    """Return the name of a run's copy of a device's latency table."""
    return f"table-{device}.csv"


def layout_folder(space: str) -> str:
    """Return the folder of the space at one layout of a family."""
    return f"{LAYOUTS_FOLDER}/{space}"
