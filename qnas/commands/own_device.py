"""Your own device from measured networks: `sample`, `measure`, `fit-latency`, `calibrate`."""

from collections.abc import Iterator, Mapping
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from qnas.commands import completion
from qnas.commands.options import Force, Json, Quiet, Seed, Space, argument, choice, option, show
from qnas.common.errors import CheckpointError, UsageError, nearest
from qnas.common.files import write_text
from qnas.common.resources import stems
from qnas.common.units import format_ms
from qnas.runs.names import ARCH_FILE, SPACE_FILE
from qnas.runs.text import field, next_command

if TYPE_CHECKING:
    from qnas.deploy.measurement import Measurement
    from qnas.deploy.timed_files import FileKind
    from qnas.latency.device import Figures
    from qnas.spaces.space import SearchSpace

Times = Annotated[Path, argument("The CSV that qnas sample wrote, with latencies, or its folder.", "CSV")]
DeviceName = Annotated[str, option("Name of the new device; its file is NAME.json.")]
DeviceFile = Annotated[Path | None, option("Default: NAME.json in this folder.")]
ELSEWHERE = "Elsewhere"
# known without loading torch, for completion
FORMATS = ("onnx", "tflite", "openvino", "vpu", "torch", "executorch")
ARCH = "arch"
PRECISIONS = ("fp32", "fp16", "int8", "int8-dynamic")
FilePrecision = Annotated[
    str, option("Of the files: fp32, fp16, int8 or int8-dynamic.", complete=completion.one_of(*PRECISIONS))
]


def sample(
    space: Annotated[
        str, option("A shipped space by name, or the path of your own YAML.", complete=completion.spaces)
    ],
    n: Annotated[int, option("Number of networks.", "--n", least=1)] = 100,
    device: Annotated[
        str, option("The networks are spread over the latencies on this device.", complete=completion.devices)
    ] = "cpu",
    file_format: Annotated[
        str,
        option(
            "Also the networks as files: onnx, tflite, openvino, vpu, torch or executorch. arch: none.",
            "--format",
            complete=completion.one_of(*FORMATS, ARCH),
        ),
    ] = "onnx",
    out: Annotated[Path | None, option("A folder. Default: samples/SPACE.")] = None,
    precision: FilePrecision = "fp32",
    seed: Seed = 0,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Write networks to time, spread over a space's latencies, and a CSV to fill in.

    The networks have random weights, batch 1 and the space's resolution.

    Example: qnas sample --space quadranet-small --n 100 --format onnx --out board
    """
    from qnas.deploy.sampling import choose_networks, write_sample
    from qnas.latency.device import load_device
    from qnas.latency.device_table import load_table
    from qnas.spaces.space import load_space

    if file_format not in (*FORMATS, ARCH):
        raise UsageError(f"--format {file_format!r}: {nearest(file_format, (*FORMATS, ARCH))}")
    found = load_space(space)
    table = load_table(load_device(device), found)
    networks = choose_networks(found, table, n, seed)
    folder = out or Path("samples") / found.name
    kind = None if file_format == ARCH else _file_kind(file_format, precision)
    path = write_sample(found, networks, folder, kind=kind, seed=seed, force=force, quiet=quiet)
    written = [] if kind is None else [file.name for file in kind.files(folder, "NAME")]
    times = [table.latency_ms(indices) for indices in networks]
    spread = f"{format_ms(min(times))} to {format_ms(max(times))} on {table.device}"
    lines = [
        field("networks", f"{n} of {found.name}, {spread}"),
        field("files", f"{folder}/: {', '.join(['NAME.json', *written, path.name])}"),
        field("fill in", f"latency_ms in {path}, one network at a time; or run qnas measure"),
        next_command(f"qnas fit-latency {path} --device-name NAME"),
    ]
    content = {"csv": str(path), "networks": n, "format": file_format, "precision": precision, "seed": seed}
    show(content, lines, as_json=as_json)


def _file_kind(file_format: str, precision: str) -> "FileKind":
    from qnas.deploy.timed_files import FileKind

    given: Any = precision  # checked by FileKind
    return FileKind(file_format, given)


def measure(
    target: Annotated[
        Path,
        argument(
            "The CSV that qnas sample wrote, or its folder; or a run whose network is exported.",
            "CSV|RUN",
            completion.runs,
        ),
    ],
    runtime: Annotated[
        str | None, choice("onnxruntime", "openvino", note=" Of this machine.  [default: onnxruntime]")
    ] = None,
    threads: Annotated[int | None, option("CPU threads of the runtime.  [default: 1]", least=1)] = None,
    command: Annotated[
        str | None,
        option(
            "A command that runs a file elsewhere and prints its time. {file} is the file's path, {name} the "
            "last part of it, {files} all files of the format. No shell is started here.",
            panel=ELSEWHERE,
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        option(
            "Regular expression whose one group is the time; its last match counts: avg=([0-9.]+)",
            panel=ELSEWHERE,
        ),
    ] = None,
    unit: Annotated[
        str | None,
        option(
            "Unit of that time: us, ms or s.  [default: as printed behind the number, else ms]",
            panel=ELSEWHERE,
            complete=completion.one_of("us", "ms", "s"),
        ),
    ] = None,
    push: Annotated[
        str | None,
        option("A command that copies {file} there, before each run.", panel=ELSEWHERE),
    ] = None,
    timeout: Annotated[
        float | None, option("Seconds that a run may take.  [default: 600]", panel=ELSEWHERE)
    ] = None,
    file_format: Annotated[
        str,
        option(
            "onnx, tflite, openvino, vpu, torch or executorch; a sample's missing files are written.",
            "--format",
            complete=completion.one_of(*FORMATS),
        ),
    ] = "onnx",
    precision: FilePrecision = "fp32",
    repeats: Annotated[
        int | None,
        option("Runs of each network; noisy ones get more.  [default: 50, of a --command 5]", least=2),
    ] = None,
    space: Space = None,
    force: Annotated[bool, option("Also measure networks that already have a latency.", "--force")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time networks: a sample's, into its CSV, or a run's exported file, into its arch.json.

    They run on this machine, or elsewhere by a --command. An interrupted measurement of a sample continues
    where it stopped, also after a command failed.

    Example: qnas measure board --runtime onnxruntime --threads 1
    """
    from qnas.api.measuring import measure as time_networks
    from qnas.deploy.sampling import CSV_FILE

    done = time_networks(
        target,
        runtime=runtime,
        threads=threads,
        command=command,
        pattern=pattern,
        unit=unit,
        push=push,
        timeout_s=timeout,
        format=file_format,
        precision=precision,
        repeats=repeats,
        space=space,
        force=force,
        quiet=quiet,
    )
    if done.document:
        show(done.document["measured"], _measured_export(done.document, target), as_json=as_json)
        return
    file = target / CSV_FILE if target.is_dir() else target
    timings = {name: vars(timing) for name, timing in done.timings.items()}
    content = {"csv": str(file), "runtime": done.runtime, "noisy": list(done.noisy), "timings": timings}
    show(content, _measured_sample(done, file), as_json=as_json)


def _measured_sample(done: "Measurement", file: Path) -> Iterator[str]:
    kept = f", {done.kept} already had a latency" if done.kept else ""
    yield field("measured", f"{len(done.timings)} networks{kept}; {done.runtime}")
    if done.timings:
        medians = [timing.median_ms for timing in done.timings.values()]
        yield field("latencies", f"{format_ms(min(medians))} to {format_ms(max(medians))}")
    if done.noisy:
        worst = done.timings[done.noisy[0]].spread
        names = ", ".join(done.noisy[:3]) + (", ..." if len(done.noisy) > 3 else "")
        yield field("noisy", f"{len(done.noisy)}, the worst +-{worst:.1%}: {names}")
    yield next_command(f"qnas fit-latency {file} --device-name NAME")


def _measured_export(document: Mapping[str, Any], folder: Path) -> Iterator[str]:
    measured = document["measured"]
    p50, p95 = format_ms(measured["p50_ms"]), format_ms(measured["p95_ms"])
    yield field("measured", f"{p50} (p95 {p95}), {measured['runtime']}, {measured['machine']}")
    if document.get("latency_ms"):
        ratio = measured["p50_ms"] / document["latency_ms"] - 1.0
        predicted = f"{format_ms(document['latency_ms'])} for {document['device']}"
        yield field("predicted", f"{predicted}: the measurement is {ratio:+.1%} from it")
        yield field("budget", f"{format_ms(document['budget_ms'])}, margin {document['margin']:.1%}")
    yield field("file", f"recorded in {folder / ARCH_FILE}")


def fit_latency(
    csv: Times,
    device_name: DeviceName,
    space: Space = None,
    out: DeviceFile = None,
    precision: Annotated[
        str | None,
        option(
            "Of the files that were timed: fp32, fp16, int8 or int8-dynamic.  [default: as the CSV says, "
            "else fp32]",
            complete=completion.one_of(*PRECISIONS),
        ),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fit a device of your own to the times of whole networks.

    The device file is valid for this space and, less surely, for others with the same operators. It records
    the error on networks left out of the fit.

    Example: qnas fit-latency board/latencies.csv --device-name board
    """
    from qnas.deploy.sampling import open_sample
    from qnas.latency.fitting.measurements import file_precision, measured_only, read_measured, the_one
    from qnas.latency.fitting.own_device import fit_own, own_device
    from qnas.runs.latency_text import figures_facts

    file, found = open_sample(csv, space)
    path = _free_file(device_name, out, force)
    networks = measured_only(read_measured(file, found), file)
    runtime = the_one("runtime", networks, file)
    file_format = the_one("format", networks, file)
    of_files = file_precision(precision, networks, file)
    fit = fit_own(found, [n.arch for n in networks], [n.latency_ms or 0.0 for n in networks], str(file))
    device = own_device(
        fit,
        name=device_name,
        space=found,
        networks=len(networks),
        runtime=runtime,
        day=date.today(),
        file_format=file_format,
        file_precision=of_files,
    )
    write_text(path, device.to_json())
    facts = {
        "device": device.name,
        "file": str(path),
        "networks": len(networks),
        "file_precision": of_files,
    }
    lines = [
        field("device", f"{device.name}, fitted to {len(networks)} networks of {found.name}, in {of_files}"),
        field("accuracy", f"{_say(fit.accuracy)}, in cross-validation"),
        field("file", str(path)),
        _next_search(path, space, found, file),
    ]
    show(facts | figures_facts(fit.accuracy), lines, as_json=as_json)


def calibrate(
    csv: Times,
    device: Annotated[
        str, option("The device to correct, by name, alias or path.", complete=completion.devices)
    ],
    device_name: DeviceName,
    level: Annotated[
        float, option("Share of networks that should stay below the prediction plus the margin.")
    ] = 0.9,
    space: Space = None,
    out: DeviceFile = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Correct a device by about 20 measured networks, and estimate the margin that budgets need.

    Writes a device of another name: the same model and tables with scale, offset and margin. The
    networks must not be those that the device was fitted to: their times are known to the fit, and
    the margin would be too small.

    Example: qnas calibrate board/latencies.csv --device cpu --device-name my-phone
    """
    from qnas.deploy.sampling import open_sample
    from qnas.latency.device import load_device
    from qnas.latency.device_table import load_table
    from qnas.latency.fitting.calibration import calibrate as fit
    from qnas.latency.fitting.calibration import check_margin, write_calibrated
    from qnas.latency.fitting.measurements import measured_only, read_measured, the_one
    from qnas.latency.table import RUNTIME
    from qnas.runs.latency_text import figures_facts

    if not 0 < level < 1:
        raise UsageError(f"--level {level:g}: expected a share above 0 and below 1, such as 0.9")
    file, found = open_sample(csv, space)
    path = _free_file(device_name, out, force)
    raw = load_device(device).model_copy(update={"calibration": None})
    networks = measured_only(read_measured(file, found), file)
    the_one("runtime", networks, file)
    table = load_table(raw, found)
    done = fit(
        [table.latency_ms(n.arch.indices(found)) for n in networks],
        [n.latency_ms or 0.0 for n in networks],
        level,
        fixed_ms=dict(table.fixed)[RUNTIME].latency_ms,
        source=f"{len(networks)} networks of {found.name}",
        where=str(file),
        day=date.today(),
    )
    calibration = done.calibration
    check_margin(calibration, str(file))
    write_calibrated(raw, done, path, name=device_name, force=force)
    content = {
        "device": device_name,
        "file": str(path),
        **calibration.model_dump(),
        "before": figures_facts(done.before),
        "after": figures_facts(done.after),
    }
    offset = ("-" if calibration.offset_ms < 0 else "+") + f" {format_ms(abs(calibration.offset_ms))}"
    lines = [
        field("device", f"{device_name}: the model of {raw.name} times {calibration.scale:.4g} {offset}"),
        field(
            "margin",
            f"{calibration.margin:.1%}: {level:.0%} of such networks stay within it (n = {calibration.n})",
        ),
        field("before", f"{_say(done.before)} of {done.before.n} networks left out of the fit"),
        field("after", _say(done.after)),
        field("file", str(path)),
        _next_search(path, space, found, file),
    ]
    show(content, lines, as_json=as_json)


def _next_search(device: Path, given: str | None, found: "SearchSpace", csv: Path) -> str:
    """Format a search with a new device in the space: the one given, a shipped one, or the CSV's copy."""
    from qnas.spaces.space import load_space

    ships = found.name in stems("search_spaces", ".yaml") and load_space(found.name).digest == found.digest
    space = given or (found.name if ships else csv.with_name(SPACE_FILE))
    return next_command(f"qnas search --device {device} --space {space} --budget ...")


def _free_file(name: str, out: Path | None, force: bool) -> Path:
    """Return the path of a device's file; refuse a bad name or an existing file before any computation."""
    from qnas.latency.device import check_own_name

    check_own_name(name, "--device-name")
    path = out or Path(f"{name}.json")
    if path.exists() and not force:
        raise CheckpointError(f"{path}: exists already: give --force to replace it, or another --out")
    return path


def _say(figures: "Figures") -> str:
    return (
        f"{figures.within_5_pct:.1f}% within 5%, {figures.within_10_pct:.1f}% within 10%, "
        f"off by {figures.rmspe_pct:.1f}% (root mean square), bias {figures.bias_pct:+.1f}%"
    )
