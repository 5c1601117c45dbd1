"""Your own device from measured networks: `sample`, `measure`, `fit-latency`, `calibrate`."""

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from qnas.commands import completion
from qnas.commands.options import Force, Json, Quiet, Seed, Space, Threads, argument, choice, option, show
from qnas.common.errors import CheckpointError, UsageError
from qnas.common.files import write_text
from qnas.common.resources import stems
from qnas.common.units import format_ms
from qnas.runs.names import ARCH_FILE, SPACE_FILE
from qnas.runs.text import field, next_command

if TYPE_CHECKING:
    from qnas.latency.device import Figures
    from qnas.spaces.space import SearchSpace

Times = Annotated[Path, argument("The CSV that qnas sample wrote, with latencies, or its folder.", "CSV")]
DeviceName = Annotated[str, option("Name of the new device; its file is NAME.json.")]
DeviceFile = Annotated[Path | None, option("Default: NAME.json in this folder.")]
FORMATS = ("onnx", "arch")


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
            "onnx: also the networks as files. arch: the choices only.",
            "--format",
            complete=completion.one_of(*FORMATS),
        ),
    ] = "onnx",
    out: Annotated[Path | None, option("A folder. Default: samples/SPACE.")] = None,
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

    if file_format not in FORMATS:
        raise UsageError(f"--format {file_format!r}: expected {' or '.join(FORMATS)}")
    found = load_space(space)
    table = load_table(load_device(device), found)
    networks = choose_networks(found, table, n, seed)
    folder = out or Path("samples") / found.name
    onnx = file_format == "onnx"
    path = write_sample(found, networks, folder, onnx=onnx, seed=seed, force=force, quiet=quiet)
    times = [table.latency_ms(indices) for indices in networks]
    spread = f"{format_ms(min(times))} to {format_ms(max(times))} on {table.device}"
    lines = [
        field("networks", f"{n} of {found.name}, {spread}"),
        field("files", f"{folder}/: NAME.json{', NAME.onnx' if onnx else ''}, {path.name}"),
        field("fill in", f"latency_ms in {path}, one network at a time; on this machine: qnas measure"),
        next_command(f"qnas fit-latency {path} --device-name NAME"),
    ]
    content = {"csv": str(path), "networks": n, "format": file_format, "seed": seed}
    show(content, lines, as_json=as_json)


def measure(
    target: Annotated[
        Path,
        argument(
            "The CSV that qnas sample wrote, or its folder; or a run whose network is exported.",
            "CSV|RUN",
            completion.runs,
        ),
    ],
    runtime: Annotated[str, choice("onnxruntime", "openvino")] = "onnxruntime",
    threads: Threads = 1,
    repeats: Annotated[int, option("Runs of each network; noisy ones get more.", least=2)] = 50,
    space: Space = None,
    force: Annotated[bool, option("Also measure networks that already have a latency.", "--force")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Time networks on this machine: a sample's, into its CSV, or an exported one, into its arch.json.

    An interrupted measurement of a sample continues where it stopped.

    Example: qnas measure board --runtime onnxruntime --threads 1
    """
    from qnas.deploy.measurement import measure_sample

    if (target / ARCH_FILE).is_file():
        _measure_exported(target, runtime, threads, repeats, as_json=as_json)
        return
    file, found = _open(target, space)
    done = measure_sample(
        file, found, runtime=runtime, threads=threads, repeats=repeats, force=force, quiet=quiet
    )
    kept = f", {done.kept} already had a latency" if done.kept else ""
    lines = [field("measured", f"{len(done.timings)} networks{kept}; {done.runtime}")]
    if done.noisy:
        worst = done.timings[done.noisy[0]].spread
        names = ", ".join(done.noisy[:3]) + (", ..." if len(done.noisy) > 3 else "")
        lines.append(field("noisy", f"{len(done.noisy)}, the worst +-{worst:.1%}: {names}"))
    lines.append(next_command(f"qnas fit-latency {file} --device-name NAME"))
    timings = {name: vars(timing) for name, timing in done.timings.items()}
    content = {"csv": str(file), "runtime": done.runtime, "noisy": list(done.noisy), "timings": timings}
    show(content, lines, as_json=as_json)


def _measure_exported(folder: Path, runtime: str, threads: int, repeats: int, *, as_json: bool) -> None:
    from qnas.deploy.measurement import measure_exported

    document = measure_exported(folder, runtime=runtime, threads=threads, repeats=repeats)
    measured = document["measured"]
    p50, p95 = format_ms(measured["p50_ms"]), format_ms(measured["p95_ms"])
    lines = [field("measured", f"{p50} (p95 {p95}), {measured['runtime']}, {measured['machine']}")]
    if document.get("latency_ms"):
        ratio = measured["p50_ms"] / document["latency_ms"] - 1.0
        predicted = f"{format_ms(document['latency_ms'])} for {document['device']}"
        lines.append(field("predicted", f"{predicted}: the measurement is {ratio:+.1%} from it"))
        lines.append(field("budget", f"{format_ms(document['budget_ms'])}, margin {document['margin']:.1%}"))
    lines.append(field("file", f"recorded in {folder / 'arch.json'}"))
    show(measured, lines, as_json=as_json)


def fit_latency(
    csv: Times,
    device_name: DeviceName,
    space: Space = None,
    out: DeviceFile = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Fit a device of your own to the times of whole networks.

    The device file is valid for this space and, less surely, for others with the same operators. It records
    the error on networks left out of the fit.

    Example: qnas fit-latency board/latencies.csv --device-name board
    """
    from qnas.latency.fitting.measurements import measured_only, one_runtime, read_measured
    from qnas.latency.fitting.own_device import fit_own, own_device
    from qnas.runs.latency_text import figures_facts

    file, found = _open(csv, space)
    path = _free_file(device_name, out, force)
    networks = measured_only(read_measured(file, found), file)
    runtime = one_runtime(networks, file)
    fit = fit_own(found, [n.arch for n in networks], [n.latency_ms or 0.0 for n in networks], str(file))
    device = own_device(
        fit, name=device_name, space=found, networks=len(networks), runtime=runtime, day=date.today()
    )
    write_text(path, device.to_json())
    facts = {"device": device.name, "file": str(path), "networks": len(networks)}
    lines = [
        field("device", f"{device.name}, fitted to {len(networks)} networks of {found.name}"),
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
    from qnas.latency.device import load_device
    from qnas.latency.device_table import load_table
    from qnas.latency.fitting.calibration import calibrate as fit
    from qnas.latency.fitting.calibration import check_margin, write_calibrated
    from qnas.latency.fitting.measurements import measured_only, one_runtime, read_measured
    from qnas.latency.table import RUNTIME
    from qnas.runs.latency_text import figures_facts

    if not 0 < level < 1:
        raise UsageError(f"--level {level:g}: expected a share above 0 and below 1, such as 0.9")
    file, found = _open(csv, space)
    path = _free_file(device_name, out, force)
    raw = load_device(device).model_copy(update={"calibration": None})
    networks = measured_only(read_measured(file, found), file)
    one_runtime(networks, file)
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


def _open(csv: Path, space: str | None) -> "tuple[Path, SearchSpace]":
    """Return a sample's CSV and its space: the one named, else the copy beside the CSV."""
    from qnas.deploy.sampling import CSV_FILE
    from qnas.spaces.space import load_space

    file = csv / CSV_FILE if csv.is_dir() else csv
    if not file.is_file():
        raise UsageError(f"{file}: no such file, expected the CSV that qnas sample writes")
    beside = file.with_name(SPACE_FILE)
    if space is None and not beside.is_file():
        raise UsageError(f"{file}: no {SPACE_FILE} beside it: name the space of the networks with --space")
    return file, load_space(space or beside)


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
