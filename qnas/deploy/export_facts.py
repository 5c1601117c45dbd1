"""The metadata of exported files and the content of their card."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from qnas.common.intervals import wilson
from qnas.deploy.export.card import SCHEMA, kept_files
from qnas.deploy.export.formats import Exported
from qnas.deploy.export.product import Product
from qnas.deploy.export_request import ExportJob
from qnas.runs.folders import read_config
from qnas.runs.found_arch import FoundArch
from qnas.runs.names import WEIGHTS_FILE
from qnas.spaces.lower import count_macs


def _describe_input(found: FoundArch, px: int) -> str:
    colours = {1: "grey", 3: "RGB"}.get(found.space.input.channels, f"{found.space.input.channels} channels")
    return f"{colours} in 0 to 1, minus mean, over std; the central square, resized to {px} x {px} px"


def file_metadata(job: ExportJob) -> dict[str, str]:
    """Return the metadata of a file as strings, lists as JSON."""
    found, result = job.found, job.result
    known = {
        "classes": result["classes"],
        "mean": result["mean"],
        "std": result["std"],
        "input": _describe_input(found, job.resolution_px),
        "test_accuracy": result["test_accuracy"],
        "trained_resolution_px": result["resolution_px"],
        "space": found.space.name,
        "choices": list(found.arch.choices),
        "latency_device": found.document.get("device"),
        "latency_budget_ms": found.document.get("budget_ms"),
        "latency_predicted_ms": found.document.get("latency_ms"),
        "latency_resolution_px": found.space.input.resolution_px,
    }
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in known.items() if v is not None}


def card_document(
    job: ExportJob, product: Product, files: Sequence[Exported], measured: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the content of a card.json: the network, its training, its accuracy and its files."""
    config, found, result = read_config(job.trained), job.found, job.result
    weights = hashlib.sha256((job.trained / WEIGHTS_FILE).read_bytes()).hexdigest()
    entries = {file.files[0]: {**file.facts(), "measured": measured.get(file.files[0])} for file in files}
    accuracy, n = result["test_accuracy"], result["test_images"]
    return {
        "schema": SCHEMA,
        "name": product.name,
        "task": {
            "kind": "image classification",
            "classes": list(product.classes),
            "input": _describe_input(found, product.resolution_px),
            "mean": list(product.mean),
            "std": list(product.std),
        },
        # without the path: it says nothing to others
        "data": {"kind": result["data"].partition(":")[0], "digest": config.get("data_digest")},
        "recipe": config.get("train", {}).get("recipe", {}),
        "from_supernet": config.get("from_supernet", False),
        "accuracy": {"top1": accuracy, "images": n, "interval95": list(wilson(accuracy, n))},
        "network": {
            "space": found.space.name,
            "space_digest": found.space.digest,
            "choices": list(found.arch.choices),
            "resolution_px": product.resolution_px,
            "macs": count_macs(product.blocks),
            "params": result.get("params"),
        },
        "limits": found.document.get("limits", []),
        "predicted_px": found.space.input.resolution_px,
        "certificate": found.document.get("certificate"),
        "weights_sha256": weights,
        "versions": config.get("versions", {}),
        "files": {**kept_files(job.out, weights), **entries},
    }
