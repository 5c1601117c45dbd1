"""The timing of networks from Python: of a sample's, or of a run's exported file."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qnas.common.arguments import check_arguments
from qnas.common.errors import UsageError
from qnas.runs.names import ARCH_FILE

if TYPE_CHECKING:
    from qnas.deploy.measurement import Here, Measurement, There


def measure(
    target: str | Path,
    *,
    runtime: str | None = None,
    threads: int | None = None,
    command: str | None = None,
    pattern: str | None = None,
    unit: str | None = None,
    push: str | None = None,
    timeout_s: float | None = None,
    format: str = "onnx",
    precision: str = "fp32",
    repeats: int | None = None,
    space: str | Path | None = None,
    force: bool = False,
    quiet: bool = True,
) -> "Measurement":
    """Time the networks of a sample that have no latency yet, into its CSV, or a run's exported file.

    Files of `format` and `precision` are timed; a sample's are written where they are missing. Without a
    `command`, they run in a `runtime` of this machine, "onnxruntime" or "openvino", on `threads`. A `command`
    runs a file elsewhere, such as "adb shell /data/local/tmp/benchmark_model --graph={file}": {file} is the
    path of the file, {name} the last part of it, and {files} all files of the format. It is started
    without a shell. `pattern` is a regular expression whose one group is the time in its output, where it
    matches last, in `unit` ("us", "ms" or "s"; default: as printed behind the number, else "ms"). `push` is
    a command that copies the file over before each run; the file is then put in there. A run that takes
    longer than `timeout_s` is an error (default: 600 seconds).

    Each network has `repeats` runs (default: 50 here, 5 of a command), noisy ones up to four times as many,
    in rounds of random order. Interrupted, or after an error of the command, the next call continues.
    `force` also times networks that have a latency.

    Raises UsageError for an invalid request, MeasurementError if a command fails or prints no time,
    CheckpointError if the times in the CSV are of another runtime, or nothing is exported.
    """
    from qnas.deploy.measurement import measure_exported, measure_sample
    from qnas.deploy.sampling import open_sample
    from qnas.deploy.timed_files import FileKind

    check_arguments(target=target, threads=threads, repeats=repeats)
    folder = Path(target)
    is_run = (folder / ARCH_FILE).is_file()
    file, found = (folder, None) if is_run else open_sample(folder, space)
    by = _by(runtime, threads, command, pattern=pattern, unit=unit, push=push, timeout_s=timeout_s)
    shown: Any = precision  # checked by FileKind
    kind = FileKind(format, shown)
    if found is None:
        return measure_exported(folder, by, kind, repeats=repeats, quiet=quiet)
    return measure_sample(file, found, by, kind, repeats=repeats, force=force, quiet=quiet)


def _by(runtime: str | None, threads: int | None, command: str | None, **of_command: Any) -> "Here | There":
    """Return what runs the files. Raises UsageError for options that do not go together."""
    from qnas.deploy.elsewhere import Elsewhere
    from qnas.deploy.measurement import Here, There

    given = {name: value for name, value in of_command.items() if value is not None}
    if command is None:
        if given:
            raise UsageError(f"`{next(iter(given))}` belongs to a `command`, which runs the files elsewhere")
        return Here(runtime or "onnxruntime", threads or 1)
    for name, value in (("runtime", runtime), ("threads", threads)):
        if value is not None:
            raise UsageError(f"`{name}` is of this machine, `command` of another: leave one of them out")
    if "pattern" not in given:
        raise UsageError(
            "`command` needs a `pattern`, which finds the time in what it prints, such as avg=([0-9.]+)"
        )
    return There(Elsewhere(command, **given))
