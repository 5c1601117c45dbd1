"""A search with a user's block, through `import qnas`."""

from pathlib import Path

import pytest
import torch
from helpers.corners import Corners
from helpers.own_blocks import Gate, register_gate

import qnas


@pytest.mark.usefixtures("_registries")
@pytest.mark.parametrize(("sliced", "weights"), [(("width",), "shared"), ((), "independent")])
def test_a_registered_block_is_searched_trained_and_derived(
    tmp_path: Path, sliced: tuple[str, ...], weights: str
) -> None:
    register_gate(sliced)
    data = Corners(120)
    space = qnas.make_space(
        "gates",
        input={"channels": 3, "resolution_px": 32},
        norm="layernorm",
        activation="gelu",
        stem={"channels": 8, "kernel": 2, "stride": 2},
        candidates=[{"block": "gate", "width": [1, 2]}],
        stages=[{"channels": 8, "positions": 2, "stride": 1}],
        head={"classes": 3},
    )
    fastest = qnas.predict((space, qnas.Arch(("gate_w1", "gate_w1"))), "cpu").latency_ms
    result = qnas.run_search(
        space,
        {"cpu": f"{fastest * 1.001:.6f}ms"},
        data=data,
        out=tmp_path / "run",
        search_epochs=1,
        warmup_epochs=0,
        resolution_px=4,
        random_networks=1,
        weights=weights,
    )
    assert result.arch.choices == ("gate_w1", "gate_w1")
    assert result.latency_ms == pytest.approx(fastest, rel=1e-6)
    network = result.build()
    assert sum(isinstance(module, Gate) for module in network.modules()) == 2
    assert network(torch.zeros(2, 3, 4, 4)).shape == (2, 3)
    trained = qnas.train_subnet(result, data=data, epochs=1)
    x = torch.randn(2, 3, 4, 4)
    assert not torch.equal(trained.build()(x), network.eval()(x))
    again = qnas.derive(result, {"cpu": f"{fastest * 2}ms"}, data=data)
    assert again.solved == 4
    assert again.heldout_accuracy is not None
