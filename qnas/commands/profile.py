"""`qnas profile`: a measurement of this machine as a device."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from qnas.commands import completion
from qnas.commands.options import Force, Json, Quiet, Threads, choice, option, show
from qnas.common.resources import DEFAULT_SPACE
from qnas.common.units import format_ms
from qnas.runs.text import field, next_command

if TYPE_CHECKING:
    from qnas.deploy.profiling import Profile

_SHOWN = 5  # names of noisy blocks
_BIASED = 0.05  # sums of blocks with a larger bias need a correction


def profile(
    space: Annotated[str, option("A space by name or path.", complete=completion.spaces)] = DEFAULT_SPACE,
    runtime: Annotated[str, choice("torch", "onnxruntime", "openvino")] = "onnxruntime",
    device_name: Annotated[str | None, option("Name of the device file.  [default: local-RUNTIME]")] = None,
    target: Annotated[
        str, option("cpu, or cuda with runtime torch.", complete=completion.one_of("cpu", "cuda"))
    ] = "cpu",
    cuda_graph: Annotated[
        bool, option("Replay a CUDA graph instead of launching every kernel.", "--cuda-graph")
    ] = False,
    precision: Annotated[
        str,
        option(
            "fp32, or int8 (onnxruntime and openvino): a device of files in int8.",
            complete=completion.one_of("fp32", "int8"),
        ),
    ] = "fp32",
    threads: Threads = 1,
    repeats: Annotated[
        int | None, option("Runs of every block; noisy ones get up to 4 times as many.", least=1)
    ] = None,
    out: Annotated[Path, option("The folder of the device file.")] = Path("devices"),
    resume: Annotated[bool, option("Continue an interrupted measurement.", "--resume")] = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Measure every distinct block of a space on this machine and write a device file.

    Example: qnas profile --space quadranet-small --runtime onnxruntime
    """
    from qnas.latency.device import check_own_name
    from qnas.spaces.space import load_space

    if device_name is not None:
        check_own_name(device_name, "--device-name")
    searched = load_space(space)  # all checks without torch, which takes seconds to import, come first
    from qnas.deploy.profiling import REPEATS, profile_space
    from qnas.deploy.runtimes import open_runtime

    given: Any = precision  # checked by open_runtime
    opened = open_runtime(runtime, target=target, threads=threads, cuda_graph=cuda_graph, precision=given)
    suffix = "-cuda-graph" if cuda_graph else "-cuda" if target == "cuda" else ""
    suffix += "" if precision == "fp32" else f"-{precision}"
    measured = profile_space(
        searched,
        opened,
        name=device_name or f"local-{runtime}{suffix}",
        folder=out,
        repeats=repeats or REPEATS,
        resume=resume,
        force=force,
        quiet=quiet,
    )
    content = {
        "device": measured.device.name,
        "device_file": str(measured.device_file),
        "table_file": str(measured.table_file),
        "space": searched.name,
        "parts": len(measured.parts),
        "fastest_ms": measured.table.fastest_ms,
        "slowest_ms": measured.table.slowest_ms,
        "networks": [{"sum_ms": total, "measured_ms": whole} for total, whole in measured.networks],
        "noisy": list(measured.noisy),
        "outliers": list(measured.outliers),
    }
    show(content, _lines(measured, space), as_json=as_json)


def _lines(measured: "Profile", space: str) -> Iterator[str]:
    from qnas.deploy.timing import TOLERANCE

    table, device = measured.table, measured.device
    errors = [abs(total / whole - 1) for total, whole in measured.networks]
    noisy = ", ".join(measured.noisy[:_SHOWN])
    more = f" and {len(measured.noisy) - _SHOWN} more" if len(measured.noisy) > _SHOWN else ""
    hint = "; qnas calibrate corrects that" if abs(measured.bias) > _BIASED else ""
    yield field("device", f"{device.name}: {device.title}")
    yield field("", device.runtime)
    yield field(
        "measured",
        f"{len(measured.parts)} blocks of {table.space}; its networks take "
        f"{format_ms(table.fastest_ms)} to {format_ms(table.slowest_ms)}",
    )
    yield field(
        "check",
        f"sums of blocks are {abs(measured.bias):.1%} {'above' if measured.bias > 0 else 'below'} "
        f"{len(errors)} whole networks on average, at most {max(errors):.1%} off{hint}",
    )
    yield field("noisy", f"spread above {TOLERANCE:.0%}: {noisy}{more}" if noisy else "nothing")
    for i, text in enumerate(measured.outliers):
        yield field("" if i else "outlier", text)
    yield field("files", f"{measured.device_file}, {measured.table_file}")
    yield next_command(f"qnas search --device {measured.device_file} --space {space} --budget ...")
