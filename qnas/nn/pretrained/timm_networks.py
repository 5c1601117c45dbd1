"""Networks of timm as spaces of inverted residuals, with their weights, which timm downloads.

A network is read module by module, not by its name: those that `mbconv` blocks reproduce exactly are taken
(MobileNetV2, MnasNet, EfficientNet-Lite, single-path NAS), others are refused with the first thing that does
not fit: squeeze-and-excitation whose gate is a sigmoid, MobileNetV3's head, ConvNeXt's blocks.
"""

import re
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from torch import Tensor, nn

from qnas.common.errors import UsageError, first_line, one_line
from qnas.nn.pretrained.derivation import Residual, fixed_space
from qnas.nn.pretrained.network import PretrainedNetwork, digest_of_tensors
from qnas.spaces.space import SearchSpace

_ACTIVATIONS = {"ReLU": "relu", "ReLU6": "relu6", "Hardswish": "hswish"}
_SPACE_NAME = re.compile(r"[^A-Za-z0-9._-]")


def timm_space(name: str) -> SearchSpace:
    """Return a network of timm as a fixed space. Raises UsageError where timm is missing or it does not fit."""
    return space_of(_create(name, pretrained=False), name)


def load_timm(name: str) -> PretrainedNetwork:
    """Return a network of timm with its pretrained weights, from timm's cache or the hub. Raises UsageError."""
    return network_of(_create(name, pretrained=True), name)


def _create(name: str, *, pretrained: bool) -> Any:
    asked = f"pretrained timm:{one_line(name, 60)}"
    try:
        import timm  # an extra, and heavy
    except ImportError:
        raise UsageError(f"{asked}: needs timm: pip install 'quadranet-nas[timm]'") from None
    from qnas.nn.pretrained.hub import hub_problem, only_cached

    problem = hub_problem() if pretrained else ""
    try:
        with only_cached() if problem else nullcontext():
            return timm.create_model(name, pretrained=pretrained)
    except Exception as error:  # an unknown name, missing weights, no connection to the hub: almost anything
        if problem and isinstance(error, OSError):
            raise UsageError(f"{asked}: {problem}, and the weights are not in its cache") from None
        raise UsageError(f"{asked}: {first_line(error)}") from error


def network_of(model: Any, name: str) -> PretrainedNetwork:
    """Return a model of timm as a pretrained network. Raises UsageError where it does not fit."""
    space = space_of(model, name)
    state: dict[str, Tensor] = {}
    named = {
        "stem.conv": model.conv_stem,
        "stem.norm": model.bn1,
        "head.expand": model.conv_head,
        "head.norm1": model.bn2,
        "head.classifier": model.classifier,
    }
    for position, block in zip(space.positions, _blocks(model), strict=True):
        parts = _parts(block)
        named |= {f"{position.name.replace('.', '_')}.{role}": module for role, module in parts.items()}
    for prefix, module in named.items():
        state |= {f"{prefix}.{key}": tensor.detach() for key, tensor in module.state_dict().items()}
    return PretrainedNetwork(f"timm:{name}", space, state, digest_of_tensors(state))


def space_of(model: Any, name: str) -> SearchSpace:
    """Return a model of timm as a fixed space. Raises UsageError with the first thing that does not fit."""

    def need(fits: object, what: str) -> None:
        if not fits:
            raise UsageError(f"pretrained timm:{one_line(name, 60)}: no inverted residuals of qnas: {what}")

    kind = type(model).__name__
    parts = ("conv_stem", "bn1", "blocks", "conv_head", "bn2", "global_pool", "classifier")
    need(kind == "EfficientNet" and all(hasattr(model, part) for part in parts), f"a {kind}")
    need(isinstance(model.classifier, nn.Linear) and model.classifier.bias is not None, "its classifier")
    need(getattr(model.global_pool, "pool_type", "") == "avg", "its pooling")
    norms, activations, pads, residuals = [model.bn1, model.bn2], [], [], []
    for number, block in enumerate(_blocks(model), 1):
        where = f"block {number}, a {type(block).__name__}"
        found = _parts(block)
        need(found, where)
        need(isinstance(getattr(block, "se", nn.Identity()), nn.Identity), f"{where} with {_se(block)}")
        need(isinstance(getattr(block, "aa", nn.Identity()), nn.Identity), f"{where} with anti-aliasing")
        depthwise, project = found["depthwise"], found["project"]
        c_in, hidden, c_out = (
            found["expand"].in_channels if "expand" in found else depthwise.in_channels,
            depthwise.in_channels,
            project.out_channels,
        )
        stride = depthwise.stride[0]
        convolutions = [found[role] for role in ("expand", "depthwise", "project") if role in found]
        need(all(c.bias is None for c in convolutions), f"{where} with biases")
        need(depthwise.groups == hidden and depthwise.dilation == (1, 1), f"{where} with grouped convolutions")
        need(all(c.kernel_size == (1, 1) and c.groups == 1 for c in convolutions if c is not depthwise), where)
        expansion, rest = divmod(hidden, c_in)
        need(rest == 0, f"{where} that expands {c_in} channels to {hidden}")
        need((expansion == 1) == ("expand" not in found), f"{where} that expands by {expansion}")
        keeps = c_in == c_out and stride == 1
        need(bool(getattr(block, "has_skip", keeps)) == keeps, f"{where} whose shortcut is missing")
        norms += [module for module in found.values() if isinstance(module, nn.BatchNorm2d)]
        activations += [found[role].act for role in ("norm1", "norm2") if role in found]
        need(isinstance(found["norm3"].act, nn.Identity), f"{where} with an activation at its end")
        pads.append(depthwise)
        residuals.append(Residual(c_out, stride, depthwise.kernel_size[0], expansion))
    activations += [model.bn1.act, model.bn2.act]
    kinds = sorted({type(act).__name__ for act in activations})
    need(len(kinds) == 1 and kinds[0] in _ACTIVATIONS, f"activation {', '.join(kinds)}")
    eps = sorted({norm.eps for norm in norms})
    need(len(eps) == 1, f"norms with several epsilons, {eps}")
    need(model.conv_stem.bias is None and model.conv_head.bias is None, "biases of its stem or head")
    strided = [conv for conv in (model.conv_stem, *pads) if conv.stride[0] > 1]
    same = {type(conv).__name__ == "Conv2dSame" for conv in strided}
    need(len(same) == 1, "two kinds of padding")
    for conv in (model.conv_stem, *pads):
        if type(conv).__name__ != "Conv2dSame":
            half = conv.kernel_size[0] // 2
            need(conv.padding == (half, half), f"padding {conv.padding} of a kernel of {conv.kernel_size[0]}")
    about = model.pretrained_cfg
    stem = model.conv_stem
    return fixed_space(
        _SPACE_NAME.sub("-", f"timm-{name}"),
        residuals,
        input={
            "channels": stem.in_channels,
            "resolution_px": int(about["input_size"][-1]),
            "mean": [float(value) for value in about["mean"]],
            "std": [float(value) for value in about["std"]],
        },
        activation=_ACTIVATIONS[kinds[0]],
        padding="same" if True in same else "symmetric",
        norm_eps=float(eps[0]),
        stem={
            "channels": stem.out_channels,
            "kernel": stem.kernel_size[0],
            "stride": stem.stride[0],
            "activation": True,
        },
        head={"channels": model.conv_head.out_channels, "classes": model.classifier.out_features},
        source=f"timm's {name}.",
    )


def _blocks(model: Any) -> Iterator[Any]:
    """Yield the blocks of all stages."""
    for stage in model.blocks:
        yield from stage


def _parts(block: Any) -> dict[str, Any]:
    """Return a block's convolutions and norms by our roles; nothing for another kind of block."""
    kind = type(block).__name__
    if kind == "InvertedResidual":
        return {
            "expand": block.conv_pw,
            "norm1": block.bn1,
            "depthwise": block.conv_dw,
            "norm2": block.bn2,
            "project": block.conv_pwl,
            "norm3": block.bn3,
        }
    if kind == "DepthwiseSeparableConv":
        return {
            "depthwise": block.conv_dw,
            "norm2": block.bn1,
            "project": block.conv_pw,
            "norm3": block.bn2,
        }
    return {}


def _se(block: Any) -> str:
    return type(block.se).__name__
