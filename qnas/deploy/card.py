"""The model card of a trained network as JSON and Markdown: its task, training, accuracy and files."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qnas.common.files import write_json, write_text
from qnas.common.intervals import wilson
from qnas.common.text import in_markdown
from qnas.common.units import format_count, format_mj, format_ms
from qnas.deploy.export.formats import Exported
from qnas.deploy.export.parity import describe_drop
from qnas.deploy.export.product import Product
from qnas.deploy.export.resizing import Resizing
from qnas.deploy.file_latency import FileLatency, describe_latency
from qnas.deploy.targets import DeviceFiles, describe_device
from qnas.latency.intervals import describe_interval
from qnas.runs.folders import read_config
from qnas.runs.found_arch import FoundArch
from qnas.runs.text import balanced_text, never_text
from qnas.solver.limits import ENERGY_UNIT
from qnas.solver.solve import entry_interval, entry_latency_ms
from qnas.spaces.lower import count_macs

JSON, MARKDOWN = "model-card.json", "model-card.md"
SCHEMA = "qnas.card/1"


def _describe_input(found: FoundArch, px: int) -> str:
    colours = {1: "grey", 3: "RGB"}.get(found.space.input.channels, f"{found.space.input.channels} channels")
    return (
        f"{colours} in 0 to 1, minus mean, over std; upright by its EXIF, transparency on white, "
        f"the central square, resized to {px} x {px} px"
    )


def file_metadata(
    found: FoundArch, result: Mapping[str, Any], px: int, predicted: Sequence[FileLatency]
) -> dict[str, str]:
    """Return the metadata of a file for images of `px` pixels: strings, with lists as JSON.

    Its latency is that of the file, on the first device of the search.
    """
    first = predicted[0] if predicted else None
    known = {
        "classes": result["classes"],
        "mean": result["mean"],
        "std": result["std"],
        "input": _describe_input(found, px),
        "significant_bits": result.get("significant_bits"),
        "pads": result.get("pads"),
        "test_accuracy": result["test_accuracy"],
        "test_balanced_accuracy": result.get("test_balanced_accuracy"),
        "trained_resolution_px": result["resolution_px"],
        "space": found.space.name,
        "choices": list(found.arch.choices),
        "latency_device": first and first.device,
        "latency_budget_ms": first and first.budget_ms,
        "latency_predicted_ms": first and first.latency_ms,
        "latency_resolution_px": first and first.resolution_px,
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in known.items() if v is not None}


def file_entries(
    files: Sequence[Exported],
    measured: Mapping[str, Mapping[str, Any]],
    predicted: Sequence[FileLatency],
    resizing: Resizing | None,
) -> dict[str, dict[str, Any]]:
    """Return what a card says about each file, by the name of the one to load."""
    latencies = [each.facts() for each in predicted]
    return {
        file.files[0]: {
            **file.facts(),
            "measured": measured.get(file.files[0]),
            "predicted": latencies,
            "resizing": resizing and resizing.facts(),
        }
        for file in files
    }


def card_document(
    found: FoundArch,
    result: Mapping[str, Any],
    product: Product,
    weights_sha256: str,
    files: Mapping[str, Any],
    devices: Sequence[DeviceFiles],
) -> dict[str, Any]:
    """Return the content of a card: the network, its training, its accuracy and its files.

    `found` and `result` come from the folder of train-subnet; `files` are the entries of all files of these
    weights (`file_entries`), those of former exports too, and `devices` says which of them run where.
    """
    config = read_config(found.folder)
    accuracy, n = result["test_accuracy"], result["test_images"]
    split = {"split": name} if (name := result.get("split_names", {}).get("test")) else {}
    return {
        "schema": SCHEMA,
        "name": product.name,
        "task": {
            "kind": "image classification",
            "classes": list(product.classes),
            "input": _describe_input(found, product.resolution_px),
            "mean": list(product.mean),
            "std": list(product.std),
            "significant_bits": result.get("significant_bits"),
            "pads": product.pads,
        },
        # without the path, which has no meaning on other machines
        "data": {"kind": result["data"].partition(":")[0], "digest": config.get("data_digest")},
        "recipe": config.get("train", {}).get("recipe", {}),
        "from_supernet": config.get("from_supernet", False),
        **_pretrained(config, found),
        "accuracy": {
            "top1": accuracy,
            "images": n,
            "interval95": list(wilson(accuracy, n)),
            "balanced": result.get("test_balanced_accuracy"),  # None from an older version
            "never_predicted": result.get("never_predicted", []),
            **split,
        },
        "network": {
            "space": found.space.name,
            "space_digest": found.space.digest,
            "choices": list(found.arch.choices),
            "resolution_px": product.resolution_px,
            "trained_px": result["resolution_px"],
            "macs": count_macs(product.blocks),
            "params": result.get("params"),
        },
        "limits": found.document.get("limits", []),
        "predicted_px": found.space.input.resolution_px,
        # a latency that could not be recomputed is not certified
        "certificate": None if found.unchecked else found.document.get("certificate"),
        "unchecked": list(found.unchecked),
        "weights_sha256": weights_sha256,
        "versions": config.get("versions", {}),
        "devices": [each.facts() for each in devices],
        "files": dict(files),
    }


def _pretrained(config: Mapping[str, Any], found: FoundArch) -> dict[str, Any]:
    """Return the entry about the network whose weights the training or its search started from, if any."""
    started = config.get("pretrained")
    if started is None and config.get("from_supernet"):
        started = found.document.get("pretrained")
    return {} if started is None else {"pretrained": {key: started[key] for key in ("name", "sha256")}}


def write_card(folder: Path, card: Mapping[str, Any]) -> None:
    """Write a card as JSON and as Markdown."""
    write_json(folder / JSON, card)
    write_text(folder / MARKDOWN, markdown(card))


def markdown(card: Mapping[str, Any]) -> str:
    """Return a card as Markdown."""
    task, data, accuracy, network = (card[key] for key in ("task", "data", "accuracy", "network"))
    low, high = accuracy["interval95"]
    trained = "from the supernet's weights" if card["from_supernet"] else "from scratch"
    if started := card.get("pretrained"):
        its = f"the weights of {in_markdown(started['name'])}"
        trained = f"{trained}, which started from {its}" if card["from_supernet"] else f"from {its}"
    recipe = ", ".join(f"{key} {value}" for key, value in card["recipe"].items())
    balanced = balanced_text(accuracy["top1"], accuracy.get("balanced"))
    never = never_text(accuracy.get("never_predicted", ()), len(task["classes"]))
    # None from an older version
    at = f", trained at {trained_px} px" if (trained_px := network.get("trained_px")) else ""
    facts = [
        f"- Classes: {', '.join(in_markdown(name, 500) for name in task['classes'])}",
        f"- Input: {task['input']}; mean {_numbers(task['mean'])}, std {_numbers(task['std'])}",
        f"- Data: {data['kind']}, digest {data['digest']}",
        f"- Training: {trained}; {recipe}",
        f"- Accuracy: {accuracy['top1']:.2%} on {accuracy['images']} {accuracy.get('split', 'test')} images "
        f"(95% interval {low:.1%} to {high:.1%}){f'; {balanced}' if balanced else ''}",
        *([f"- Warning: the network {in_markdown(never, 500)}"] if never else []),
        f"- Network: space {network['space']}, {format_count(network['macs'])} MACs and "
        f"{format_count(network['params'])} parameters at {network['resolution_px']} px{at}; "
        f"{', '.join(network['choices'])}",
    ]
    made_with = f"made with qnas {card['versions'].get('qnas', '')}"
    title = f"# {card['name']}\n\nAn image network of {len(task['classes'])} classes, {made_with}."
    lists = [("", facts), ("## Latency\n\n", _latency(card)), ("## Files\n\n", _files(card["files"]))]
    lists += [("", _uses(card["files"]))]
    if devices := card.get("devices"):
        lists += [("## Devices of the search\n\n", (f"- {describe_device(each)}" for each in devices))]
    return "\n\n".join([title, *(heading + "\n".join(lines) for heading, lines in lists)]) + "\n"


def _latency(card: Mapping[str, Any]) -> Iterator[str]:
    if not card["limits"]:
        yield "The network does not come from a search, so it has no device and no budget."
        return
    for limit in card["limits"]:
        if limit["unit"] != "ms":
            show = format_mj if limit["unit"] == ENERGY_UNIT else format_count
            yield f"- {limit['name']}: {show(limit['amount'])} of at most {show(limit['budget'])}"
            continue
        kept = ", whose upper end stays within the budget" if "confidence" in limit else ""
        yield (
            f"- {limit['name']}: {format_ms(entry_latency_ms(limit))} predicted for {card['predicted_px']} "
            f"px, as searched, of a budget of {format_ms(limit['budget'])}; interval "
            f"{describe_interval(entry_interval(limit))}{kept}"
        )
    yield from (f"- Note: {reason}" for reason in card.get("unchecked", ()))
    certificate = card["certificate"]
    if certificate:
        yield (
            f"- Certificate: number {certificate['rank']} of the {certificate['solved']} networks of "
            f"highest score within the limits, by {certificate['solver']}; score "
            f"{certificate['score']:.4f}, and no network within the limits exceeds "
            f"{certificate['score_bound']:.4f}"
        )


_COLUMNS = (
    *("file", "format", "size", "input", "checked on", "largest difference", "same top-1"),
    *("accuracy (of the network)", "one image, p50 and p95", "predicted for one image"),
)


def _files(files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    yield f"| {' | '.join(_COLUMNS)} |"
    yield "|---" * len(_COLUMNS) + "|"
    for entry in files.values():
        parity, measured = entry["parity"], entry["measured"]
        batch = entry["batch"] or "batch"
        px = entry["resolution_px"]
        cells = [
            " + ".join(entry["files"]),
            f"{entry['format']}, {entry['precision']}",
            f"{entry['size_bytes'] / 1e6:.2f} MB",
            f"({batch}, C, {px}, {px})",
            f"{parity['images']} images, {entry['runtime']}",
            f"{parity['max_difference'] / (parity['scale'] or 1):.1e} of the largest logit",
            f"{parity['agreement']:.2%}",
            f"{parity['accuracy']:.2%} ({parity['network_accuracy']:.2%})"
            + describe_drop(parity.get("drop_interval95"))
            + (f"; {Resizing(**resizing).describe()}" if (resizing := entry.get("resizing")) else ""),
            _measured(measured) if measured else "not measured",
            "; ".join(map(describe_latency, entry.get("predicted", ()))) or "not predicted",
        ]
        yield f"| {' | '.join(cells)} |"


def _uses(files: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield where each file runs and how that was checked."""
    for name, entry in files.items():
        parity = entry["parity"]
        checked = (f"run in {entry['runtime']} on {parity['images']} images", *entry.get("checks", ()))
        runs_on = entry.get("runs_on") or "not recorded"  # by an older version
        yield f"- {name}: runs on {runs_on}. Checked: {'; '.join(checked)}."


def _measured(measured: Mapping[str, Any]) -> str:
    threads = f"{measured['threads']} thread{'s' * (measured['threads'] > 1)}"
    p50, p95 = format_ms(measured["p50_ms"]), format_ms(measured["p95_ms"])
    return f"{p50}, {p95}; {measured['runtime']}, {threads}, {measured['machine']}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)
