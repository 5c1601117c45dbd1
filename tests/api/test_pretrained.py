"""A search and a training that start from a pretrained network, here a small one."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.pretrained import MEAN, NAME, STD, built, tiny_network
from helpers.tiny import FEW

import qnas
from qnas.api import searching
from qnas.common.errors import CheckpointError, Interrupted, QnasWarning, UsageError
from qnas.common.progress import Report
from qnas.nn.pretrained import catalogue
from qnas.nn.pretrained.derivation import derived_space, own_arch
from qnas.nn.pretrained.network import PretrainedNetwork
from qnas.runs.report.commands import search_command, training_command
from qnas.spaces.space import load_space

SPACE = derived_space(tiny_network().space)
BUDGET = {"vpu": "0.4ms"}


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    know(monkeypatch, tiny_network())


def know(monkeypatch: pytest.MonkeyPatch, network: PretrainedNetwork) -> None:
    """Let the catalogue have a network, and no other."""

    def only(value: Any) -> Any:
        def get(name: str) -> Any:
            assert name == NAME, name
            return value

        return get

    for module in (catalogue, searching):
        monkeypatch.setattr(module, "network_space", only(network.space))
        monkeypatch.setattr(module, "space_around", only(SPACE))
    monkeypatch.setattr(catalogue, "load_pretrained", only(network))


def search(out: Path, **changes: Any) -> qnas.SearchResult:
    return qnas.run_search(
        budgets=BUDGET,
        pretrained=NAME,
        out=out,
        **{**FEW, "resolution_px": 16, "learning_rate": 1e-5, **changes},
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[qnas.SearchResult]:
    with pytest.MonkeyPatch.context() as patch:
        know(patch, tiny_network())
        yield search(tmp_path_factory.mktemp("runs") / "run")


def test_a_search_starts_from_the_weights_and_says_so(found: qnas.SearchResult) -> None:
    assert found.space.name == SPACE.name
    record = {"name": NAME, "sha256": tiny_network().sha256}
    assert found.run.config["pretrained"] == record
    assert found.run.config["search"]["preset"] == "pretrained"
    assert found.run.config["search"]["pretrained_rate"] == 0.1
    own = ["mbconv_k3_e1", "mbconv_k5_e6", "mbconv_k5_e6", "mbconv_k3_e4"]
    assert found.document["pretrained"] == record | {"choices": own}
    assert f"--pretrained {NAME}" in search_command(found.run.config)
    # at this rate, weights are where they were
    network = found.build().state_dict()
    own_weights = built(tiny_network()).state_dict()
    for name in ("stem.conv.weight", "stem.norm.weight", "head.expand.weight"):
        torch.testing.assert_close(network[name], own_weights[name], atol=2e-3, rtol=0)
    # the folder reads without the network
    again = load_space(found.folder / "space.yaml")
    assert again.input.mean == tuple(MEAN)


def test_a_training_after_it_normalises_as_the_network_does(found: qnas.SearchResult, tmp_path: Path) -> None:
    trained = qnas.train_subnet(found, epochs=1, resolution_px=16)
    assert trained.result["mean"] == MEAN
    assert trained.result["std"] == STD
    assert trained.config["from_supernet"]
    assert trained.config["train"]["recipe"]["backbone_rate"] == 0.25  # of finetune-pretrained
    anew = qnas.train_subnet(found, weights="scratch", epochs=1, resolution_px=16, out=tmp_path / "anew")
    assert anew.config["train"]["recipe"].get("backbone_rate", 1) == 1  # of the kind of data


def test_a_search_that_goes_on_needs_the_same_weights(
    found: qnas.SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(report: Report) -> None:
        if report.phase == "search" and report.done == 2:
            raise KeyboardInterrupt

    with pytest.raises((Interrupted, KeyboardInterrupt)):
        search(tmp_path / "run", progress=stop)
    resumed = qnas.run_search(out=tmp_path / "run", resume=True)
    assert resumed.arch == found.arch
    assert (tmp_path / "run/supernet.safetensors").read_bytes() == (
        found.folder / "supernet.safetensors"
    ).read_bytes()

    know(monkeypatch, replace(tiny_network(), sha256="0" * 64))
    (tmp_path / "run/arch.json").unlink()
    with pytest.raises(CheckpointError, match="sha256"):
        qnas.run_search(out=tmp_path / "run", resume=True)


def test_blocks_that_stay_untrained_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    network = tiny_network()
    know(monkeypatch, network)
    products = derived_space(network.space, quadratic=True)

    def stop(report: Report) -> None:
        raise KeyboardInterrupt

    for steps, is_named in (("whole", True), ("path", False)):
        recwarn.clear()
        with pytest.raises((Interrupted, KeyboardInterrupt)):
            search(tmp_path / steps, space=products, weight_steps=steps, progress=stop)
        found = [str(each.message) for each in recwarn if issubclass(each.category, QnasWarning)]
        assert any("train no mbconv_factored blocks" in text for text in found) == is_named, found


def test_another_space_must_fit(tmp_path: Path) -> None:
    with pytest.raises(
        UsageError, match="space proxyless-mobile does not fit tiny-net: padding: expected same"
    ):
        qnas.run_search("proxyless-mobile", BUDGET, pretrained=NAME, out=tmp_path / "run")
    with pytest.raises(UsageError, match=r"`pretrained=3`: expected the name of a pretrained network"):
        qnas.run_search(budgets=BUDGET, pretrained=3, out=tmp_path / "run")  # type: ignore[arg-type]


def test_the_whole_network_is_trained_without_a_search(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"epochs": 1, "resolution_px": 16, "learning_rate": 1e-6, "data": "digits"}
    trained = qnas.train_subnet(pretrained=NAME, out=tmp_path / "whole", **settings)
    assert trained.config["choices"] == list(own_arch(SPACE, tiny_network().space).choices)
    assert trained.config["pretrained"] == {"name": NAME, "sha256": tiny_network().sha256}
    assert not trained.config["from_supernet"]
    assert trained.result["mean"] == MEAN
    assert f"--pretrained {NAME}" in training_command(trained.config, of_run=False)
    assert "--weights" not in training_command(trained.config, of_run=False)
    own = built(tiny_network()).state_dict()["2_1.norm1.weight"]
    assert {round(v, 3) for v in trained.build().state_dict()["2_1.norm1.weight"].tolist()} == {
        round(v, 3) for v in own.tolist()
    }
    with pytest.raises(UsageError, match="`weights='scratch'`: `pretrained` has the weights"):
        qnas.train_subnet(pretrained=NAME, weights="scratch", out=tmp_path / "no", **settings)
    assert json.loads((tmp_path / "whole/config.json").read_text())["from_supernet"] is False
