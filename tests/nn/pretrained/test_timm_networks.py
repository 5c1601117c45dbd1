"""Networks of timm with random weights: nothing is downloaded."""

from typing import Any

import pytest
import torch
from helpers.pretrained import built

from qnas.common.errors import UsageError

timm = pytest.importorskip("timm")

from qnas.nn.pretrained.derivation import check_fits, derived_space  # noqa: E402  # timm is an extra
from qnas.nn.pretrained.network import digest_of_tensors  # noqa: E402
from qnas.nn.pretrained.timm_networks import load_timm, network_of, timm_space  # noqa: E402


def drawn(name: str) -> Any:
    """Return a model of timm whose norms do something."""
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.2)
            torch.nn.init.normal_(module.running_mean, std=0.2)  # type: ignore[arg-type]  # has statistics
            torch.nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "activation", "padding"),
    [
        ("mobilenetv2_050", "relu6", "symmetric"),
        ("mnasnet_050", "relu", "symmetric"),
        ("efficientnet_lite0", "relu6", "symmetric"),
        ("tf_efficientnet_lite0", "relu6", "same"),
        ("spnasnet_100", "relu", "symmetric"),
    ],
)
def test_logits_are_those_of_timm(name: str, activation: str, padding: str) -> None:
    model = drawn(name)
    network = network_of(model, name)
    images = torch.randn(2, 3, 65, 65)
    expected = model(images)
    torch.testing.assert_close(
        built(network)(images), expected, atol=1e-5 * float(expected.abs().max()), rtol=0
    )
    space = network.space
    assert (space.activation, space.padding) == (activation, padding)
    assert space.input.mean == tuple(model.pretrained_cfg["mean"])
    check_fits(derived_space(space), space)
    assert network.name == f"timm:{name}"


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("fbnetc_100", "block 1, a InvertedResidual that expands by 1"),
        ("semnasnet_050", "with SqueezeExcite"),
        ("mobilenetv3_small_050", "a MobileNetV3"),
        ("mobilenetv1_100", "no convolution in its head"),
        ("convnext_atto", "a ConvNeXt"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"pretrained timm:{name}: no inverted residuals of qnas: .*{why}"):
        timm_space(name)


def test_an_unknown_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="pretrained timm:nonesuch: Unknown model"):
        timm_space("nonesuch")


def test_without_the_hub_the_cache_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("qnas.nn.pretrained.hub.hub_problem", lambda: "it is asleep")

    create = timm.create_model

    def missing(name: str, pretrained: bool) -> Any:
        if pretrained:
            raise FileNotFoundError(name)
        return create(name, pretrained=False)

    monkeypatch.setattr(timm, "create_model", missing)
    with pytest.raises(
        UsageError, match="mobilenetv2_050: it is asleep, and the weights are not in its cache"
    ):
        load_timm("mobilenetv2_050")
    with pytest.raises(UsageError, match="no inverted residuals of qnas: a MobileNetV3"):
        load_timm("mobilenetv3_small_050")


def test_the_digest_is_that_of_names_shapes_and_values() -> None:
    state = {"a": torch.zeros(2), "b": torch.ones(2)}
    same = {"b": torch.ones(2), "a": torch.zeros(2)}
    others = [
        {"a": torch.zeros(2), "b": torch.full((2,), 1.5)},
        {"a": torch.zeros(2), "c": torch.ones(2)},
        {"a": torch.zeros(2), "b": torch.ones(2, 1)},
    ]
    assert digest_of_tensors(state) == digest_of_tensors(same)
    assert len({digest_of_tensors(each) for each in [state, *others]}) == 4
