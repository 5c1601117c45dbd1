"""Networks of timm as spaces of inverted residuals, with their weights, which timm downloads.

A network is read module by module, not by its name: those that `mbconv` blocks reproduce exactly are taken
(MobileNetV2, MnasNet, EfficientNet-Lite, single-path NAS), others are refused with the first thing that does
not fit: squeeze-and-excitation whose gate is a sigmoid, MobileNetV3's head, ConvNeXt's blocks.
"""

import re
from collections.abc import Callable, Iterator, Sequence
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
    """Return a network of timm as a fixed space.

    Raises UsageError where timm is missing, or the network does not fit.
    """
    return space_of(_create(name, pretrained=False), name)


def load_timm(name: str) -> PretrainedNetwork:
    """Return a network of timm with its weights, from timm's cache or the hub. Raises UsageError."""
    timm_space(name)  # what does not fit is not downloaded
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
    need = _needing(name)
    kind = type(model).__name__
    parts = ("conv_stem", "bn1", "blocks", "conv_head", "bn2", "global_pool", "classifier")
    need(kind == "EfficientNet" and all(hasattr(model, part) for part in parts), f"a {kind}")
    need(isinstance(model.classifier, nn.Linear) and model.classifier.bias is not None, "its classifier")
    need(getattr(model.global_pool, "pool_type", "") == "avg", "its pooling")
    stem, head = model.conv_stem, model.conv_head
    need(isinstance(head, nn.Conv2d), "no convolution in its head")
    need(stem.bias is None and head.bias is None, "biases of its stem or head")
    residuals = [_residual(block, i, need) for i, block in enumerate(_blocks(model), 1)]
    found = [_parts(block) for block in _blocks(model)]
    norms = [model.bn1, model.bn2, *(part for each in found for part in each.values() if _is_norm(part))]
    before_last = [each[role] for each in found for role in ("norm1", "norm2") if role in each]
    kinds = sorted({type(norm.act).__name__ for norm in (model.bn1, model.bn2, *before_last)})
    need(len(kinds) == 1 and kinds[0] in _ACTIVATIONS, f"activation {', '.join(kinds)}")
    eps = sorted({norm.eps for norm in norms})
    need(len(eps) == 1, f"norms with several epsilons, {eps}")
    about = model.pretrained_cfg
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
        padding=_padding([stem, *(each["depthwise"] for each in found)], need),
        norm_eps=float(eps[0]),
        stem={
            "channels": stem.out_channels,
            "kernel": stem.kernel_size[0],
            "stride": stem.stride[0],
            "activation": True,
        },
        head={"channels": head.out_channels, "classes": model.classifier.out_features},
        source=f"timm's {name}.",
    )


Need = Callable[[object, str], None]  # raises UsageError where its first argument is false


def _needing(name: str) -> Need:
    def need(fits: object, what: str) -> None:
        if not fits:
            raise UsageError(f"pretrained timm:{one_line(name, 60)}: no inverted residuals of qnas: {what}")

    return need


def _residual(block: Any, number: int, need: Need) -> Residual:
    """Return a block's sizes. Raises UsageError where an inverted residual of qnas would compute another."""
    where = f"block {number}, a {type(block).__name__}"
    found = _parts(block)
    need(found, where)
    need(isinstance(getattr(block, "se", nn.Identity()), nn.Identity), f"{where} with {_se(block)}")
    need(isinstance(getattr(block, "aa", nn.Identity()), nn.Identity), f"{where} with anti-aliasing")
    depthwise, project = found["depthwise"], found["project"]
    hidden, c_out, stride = depthwise.in_channels, project.out_channels, depthwise.stride[0]
    c_in = found["expand"].in_channels if "expand" in found else hidden
    pointwise = [found[role] for role in ("expand", "project") if role in found]
    need(all(conv.bias is None for conv in (depthwise, *pointwise)), f"{where} with biases")
    need(depthwise.groups == hidden and depthwise.dilation == (1, 1), f"{where} with grouped convolutions")
    need(all(conv.kernel_size == (1, 1) and conv.groups == 1 for conv in pointwise), where)
    expansion, rest = divmod(hidden, c_in)
    need(rest == 0, f"{where} that expands {c_in} channels to {hidden}")
    need((expansion == 1) == ("expand" not in found), f"{where} that expands by {expansion}")
    keeps = c_in == c_out and stride == 1
    need(bool(getattr(block, "has_skip", keeps)) == keeps, f"{where} whose shortcut is missing")
    need(isinstance(found["norm3"].act, nn.Identity), f"{where} with an activation at its end")
    return Residual(c_out, stride, depthwise.kernel_size[0], expansion)


def _padding(convolutions: Sequence[Any], need: Need) -> str:
    """Return the padding of convolutions with a stride; others must have half their kernel."""
    is_same = {conv: type(conv).__name__ == "Conv2dSame" for conv in convolutions}
    for conv in convolutions:
        half = conv.kernel_size[0] // 2
        fits = is_same[conv] or conv.padding == (half, half)
        need(fits, f"padding {conv.padding} of a kernel of {conv.kernel_size[0]}")
    strided = {same for conv, same in is_same.items() if conv.stride[0] > 1}
    need(len(strided) == 1, "two kinds of padding")
    return "same" if True in strided else "symmetric"


def _is_norm(module: Any) -> bool:
    return isinstance(module, nn.BatchNorm2d)


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
