"""A readable model.py of plain torch modules, its weights beside it as safetensors; nothing imports qnas.

The network is written out from the layers that it was lowered to, with the sources of the few classes
that torch lacks. Norms are not folded, so that it can be trained further.
"""

import inspect
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from textwrap import indent
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from qnas import __version__
from qnas.common.errors import ExportError
from qnas.common.text import escaped
from qnas.deploy.export import plain
from qnas.deploy.export.copied_source import Copied
from qnas.deploy.export.product import FilePrecision, Product, Run, Variant
from qnas.nn.blocks import (
    CLIP_RANGE,
    BatchNorm2d,
    ChannelLayerNorm,
    GlobalAveragePool,
    LayerScale,
    build_block,
)
from qnas.nn.padding import SameConv2d
from qnas.nn.wired_blocks import MBConvBlock, StarBlock
from qnas.spaces.blocks import BLOCKS, module_of
from qnas.spaces.layer import LAYERSCALE, LayerSpec
from qnas.spaces.lower import BlockSpec
from qnas.spaces.neurons import NEURONS, Neuron

WEIGHTS = ".safetensors"
# names that a file has before anything is copied into it
_GIVEN = {
    *("OrderedDict", "Path", "Tensor", "build", "load", "load_file", "nn", "preprocess", "_pixels", "sys"),
    *("torch", "SIGNIFICANT_BITS", "PADS"),
}
_WIDTH = 75  # of a block that is written on one line, without its surroundings
_DTYPES: dict[FilePrecision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}


def _convolution(spec: LayerSpec) -> str:
    groups = spec.c_in if spec.op == "dwconv" else 1
    options = [
        f"stride={spec.stride}" if spec.stride > 1 else "",
        f"padding={spec.padding}" if spec.padding and not spec.same else "",
        f"groups={groups}" if groups > 1 else "",
        "" if spec.bias else "bias=False",
    ]
    name = SameConv2d.__name__ if spec.same else "nn.Conv2d"
    return f"{name}({', '.join([f'{spec.c_in}, {spec.c_out}, {spec.kernel}', *filter(None, options)])})"


def _batch_norm(spec: LayerSpec) -> str:
    return f"nn.BatchNorm2d({spec.c_out}{'' if spec.eps is None else f', eps={spec.eps}'})"


# Operators of layer.OPS as they are written; `add`, `mul`, `scale` and `square` are in the blocks' forward.
LAYERS: dict[str, Callable[[LayerSpec], str]] = {
    "conv": _convolution,
    "dwconv": _convolution,
    "linear": lambda spec: f"nn.Linear({spec.c_in}, {spec.c_out}{'' if spec.bias else ', bias=False'})",
    "layernorm": lambda spec: f"ChannelLayerNorm({spec.c_out}, eps={spec.eps or '1e-6'})",
    "batchnorm": _batch_norm,
    "layerscale": lambda spec: f"LayerScale({spec.c_out})",
    "gelu": lambda _: "nn.GELU()",
    "relu": lambda _: "nn.ReLU()",
    "relu6": lambda _: "nn.ReLU6()",
    "hswish": lambda _: "nn.Hardswish()",
    "hsigmoid": lambda _: "nn.Hardsigmoid()",
    "clip": lambda _: f"nn.Hardtanh({CLIP_RANGE[0]}, {CLIP_RANGE[1]})",
    "gap": lambda _: "GlobalAveragePool()",
}


_IN_FORWARD = {"add", "mul", "scale", "square"}


def _layer(spec: LayerSpec) -> str:
    if spec.op not in LAYERS:
        raise ExportError(f"format standalone: layer {spec.op} has no form in plain torch yet")
    return f"nn.Linear({spec.c_in}, classes)" if spec.role == "classifier" else LAYERS[spec.op](spec)


# Shipped blocks that are written layer by layer, whatever class runs the layers.
_LAYERED = ("mbconv", "star")


def _chain(block: BlockSpec) -> str:
    adds = block.layers[-1].op == "add"
    layers = block.layers[:-1] if adds else block.layers
    return _ordered("Residual" if adds else "nn.Sequential", layers)


def _ordered(name: str, layers: Iterable[LayerSpec], options: str = "") -> str:
    """Write the call of a class with an OrderedDict of the layers, and with options."""
    lines = [f"{spec.role}={_layer(spec)}," for spec in layers]
    body = indent("\n".join(lines), " " * 8)
    return f"{name}(\n    OrderedDict(\n{body}\n    ){options}\n)"


def _layered(block: BlockSpec) -> str:
    with torch.device("meta"):
        module = build_block(block)
    layers = [spec for spec in block.layers if spec.op not in _IN_FORWARD]
    if isinstance(module, MBConvBlock):
        return _ordered("MBConvBlock", layers, f",\n    is_residual={module.is_residual},")
    return _ordered("StarBlock", layers) if isinstance(module, StarBlock) else _chain(block)


def _quadra(block: BlockSpec) -> str:
    place, parameters = block.place, block.parameters
    assert place is not None
    by_role = {spec.role: spec for spec in block.layers}
    neuron = _neuron(block)
    biases = [f"{role}={has}" for role, has in neuron.convolution_biases(place.norm).items()]
    mixer = [neuron.formula.__name__, str(place.c_in), f"kernel={parameters['kernel']}", *biases]
    arguments = [
        str(place.c_in),
        f"expansion={parameters['expansion']}",
        f"mixer=Mixer({', '.join(mixer)})",
        f"act={_layer(by_role['act'])}",
    ]
    if place.norm != "layernorm":
        arguments.insert(3, f"clip={_layer(by_role['clip']) if 'clip' in by_role else 'nn.Identity()'}")
    if place.norm_eps is not None and place.norm != LAYERSCALE:
        arguments.append(f"eps={place.norm_eps}")
    return _call(_QUADRA_BLOCKS[place.norm], arguments)


_QUADRA_BLOCKS = {  # by norm
    "layernorm": "QuadraBlock",
    "batchnorm": "QuadraBlockBN",
    LAYERSCALE: "QuadraBlockScaled",
}


def _neuron(block: BlockSpec) -> Neuron:
    return NEURONS[str(block.parameters["neuron"])]


def _registered_module(block: BlockSpec) -> tuple[Callable[..., Any], dict[str, Any]] | None:
    """Return the constructor of a registered block's module, with its arguments; None for layers."""
    if block.block not in BLOCKS or block.block in _LAYERED or BLOCKS[block.block].module is None:
        return None
    assert block.place is not None
    return module_of(BLOCKS[block.block], block.place, block.parameters)


def _call(name: str, arguments: Sequence[str]) -> str:
    line = f"{name}({', '.join(arguments)})"
    if len(line) <= _WIDTH:
        return line
    lines = "".join(f"\n    {argument}," for argument in arguments)
    return f"{name}({lines}\n)"


def _written(block: BlockSpec) -> str:
    if block.block == "quadra":
        return _quadra(block)
    if block.block in _LAYERED:
        return _layered(block)
    if made := _registered_module(block):
        make, arguments = made
        return _call(make.__name__, [f"{name}={value!r}" for name, value in arguments.items()])
    return _chain(block)


# Classes that torch lacks, in the order in which a file defines them.
CLASSES = (
    SameConv2d,
    ChannelLayerNorm,
    GlobalAveragePool,
    LayerScale,
    plain.Residual,
    plain.Mixer,
    plain.QuadraBlock,
    plain.QuadraBlockBN,
    plain.QuadraBlockScaled,
    StarBlock,
    MBConvBlock,
)


def attribute(module: str) -> str:
    """Return the name of a network's submodule in the file.

    >>> attribute("3_1"), attribute("stem")
    ('stage3_1', 'stem')
    """
    return f"stage{module}" if module[0].isdigit() else module


def source(product: Product, precision: FilePrecision) -> str:
    """Return the text of model.py.

    Raises ExportError for a layer that has no plain form, or a block whose source cannot be copied.
    """
    built = "\n".join(_built(block) for block in product.blocks if block.layers)
    copied = _copied(product)
    constants = {
        "CLASSES": _listed(product.classes),
        "MEAN": repr(product.mean),
        "STD": repr(product.std),
        "CHANNELS, RESOLUTION_PX": f"{product.channels}, {product.resolution_px}",
        "SIGNIFICANT_BITS": f"{product.bits}  # of images of more than 8",
        "PADS": f"{product.pads}  # whether slightly smaller images get a black border",
        "DTYPE": f"{_DTYPES[precision]}  # of the images and the logits",
    }
    return _FORM.format(
        title=f"{product.name}, an image network of {len(product.classes)} classes, by qnas {__version__}.",
        name=product.name,
        constants="\n".join(f"{key} = {value}" for key, value in constants.items()),
        imports="".join(f"\n{line}" for line in copied.imports),
        definitions="\n\n".join(_definitions(built, copied)),
        built=indent(built, " " * 12),
    )


def _built(block: BlockSpec) -> str:
    """Write a block as an argument of an OrderedDict, with the resolution that reaches it."""
    first, *rest = _written(block).splitlines()
    name, px = attribute(block.name.replace(".", "_")), block.layers[0].resolution_px
    if not rest:
        return f"{name}={first},  # {px} px"
    return "\n".join([f"{name}={first}  # {px} px", *rest]) + ","


def _listed(names: Iterable[str]) -> str:
    """Write a tuple of names over as many lines as it needs."""
    lines = [""]
    for name in names:
        item = f"{_quoted(name)}, "
        if lines[-1] and len(lines[-1]) + len(item) > 100:
            lines.append("")
        lines[-1] += item
    text = "\n".join(line.rstrip() for line in lines)
    return f"({text})" if len(lines) == 1 else "(\n" + indent(text, "    ") + "\n)"


def _quoted(name: str) -> str:
    """Write a name as a Python string on one line, whatever it contains.

    >>> _quoted('a "b"\\u2028c')
    '"a \\\\"b\\\\"\\\\u2028c"'
    """
    return escaped(json.dumps(name, ensure_ascii=False))


def _copied(product: Product) -> Copied:
    """Return the sources of a network's neurons and registered modules, with their dependencies."""
    names = {product.name, *(known.__name__ for known in CLASSES)}
    copied = Copied(_GIVEN | names, (*CLASSES, BatchNorm2d))
    for block in product.blocks:
        if block.block == "quadra":
            copied.add(_neuron(block).formula, annotated=False)
        elif block.layers and (made := _registered_module(block)):
            make, _ = made
            copied.add(make, without="layers" if make is BLOCKS[block.block].definition else "")
    return copied


def _definitions(built: str, copied: Copied) -> list[str]:
    """Return the sources of the definitions in use, in the order in which a file has them."""
    sources: list[str] = []
    for known in reversed(CLASSES):  # a class uses those before it
        is_used = f"{known.__name__}(" in "\n".join([built, *sources])
        if is_used or known in copied.wanted:
            lines = inspect.getsource(known).rstrip().splitlines()
            sources.insert(0, "\n".join(line.partition("  # type: ignore")[0] for line in lines) + "\n")
    if BatchNorm2d in copied.wanted:
        sources.append("BatchNorm2d = nn.BatchNorm2d\n")
    return [*sources, *copied.definitions.values()]


_FORM = '''"""{title}

The weights lie beside this file. It needs torch and safetensors, and torchvision for photographs.

    python model.py photo.jpg             # its likeliest classes
    network = model.load()                # trained: images (B, C, H, W) -> logits (B, classes)
    network = model.build(classes=7)      # untrained, of other classes

A model of timm after `timm.models.register_model(model.{name})`:
`timm.create_model("{name}", pretrained=True)`, with num_classes for a new classifier.
"""

import sys
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn{imports}

WEIGHTS = Path(__file__).with_suffix(".safetensors")
{constants}


{definitions}

def build(classes: int = len(CLASSES)) -> nn.Sequential:
    """Build the network with freshly drawn weights."""
    return nn.Sequential(
        OrderedDict(
{built}
        )
    )


def load() -> nn.Sequential:
    """Return the trained network, in eval mode."""
    network = build()
    network.load_state_dict(load_file(WEIGHTS))
    return network.eval().to(DTYPE)


def preprocess(image) -> Tensor:
    """Return a PIL image as the network takes it: (1, C, H, W).

    It is turned upright, put on white where it is transparent, cut to its central square and resized. Give
    it as `Image.open` returns it: a large JPEG is then decoded at a fraction of its size, as in training.
    """
    from torchvision.transforms.v2 import functional as tv

    image.draft("", [-(-2 * RESOLUTION_PX * side // min(image.size)) for side in image.size])
    pixels = _pixels(image)
    if CHANNELS == 1 and len(pixels) == 3:
        pixels = tv.rgb_to_grayscale(pixels)
    pixels = pixels.expand(CHANNELS, -1, -1)
    side = min(pixels.shape[1:])
    pixels = tv.center_crop(pixels, [side, side])
    if PADS and side < RESOLUTION_PX < 1.5 * side:
        pixels = tv.center_crop(pixels, [RESOLUTION_PX, RESOLUTION_PX])
    pixels = tv.resize(pixels, [RESOLUTION_PX, RESOLUTION_PX], antialias=True)
    return tv.normalize(pixels / 255, MEAN, STD)[None].to(DTYPE)


def _pixels(image) -> Tensor:
    """Return the bytes of a PIL image: (1 or 3, H, W)."""
    import numpy as np
    from PIL import Image
    from torchvision.transforms.v2 import functional as tv

    if SIGNIFICANT_BITS < 16 and ";16" in str(getattr(image, "tile", "")) and image.mode[0] != "I":
        raise ValueError(f"Pillow reads 8 of its 16 bits, of which {{SIGNIFICANT_BITS}} are significant")
    image.load()
    turns = "FLIP_LEFT_RIGHT ROTATE_180 FLIP_TOP_BOTTOM TRANSPOSE ROTATE_270 TRANSVERSE ROTATE_90".split()
    try:
        orientation = image.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF beside whole pixels
        orientation = 1
    if orientation in range(2, 9):
        image = image.transpose(Image.Transpose[turns[int(orientation) - 2]])
    if image.mode[0] == "I":  # 16 bits, of which the upper 8 of the significant ones are kept
        values = np.asarray(image)
        pixels = values.clip(0, 2**SIGNIFICANT_BITS - 1) >> (SIGNIFICANT_BITS - 8)
        if isinstance(clear := image.info.get("transparency"), int):
            pixels[values == clear] = 255
        return torch.from_numpy(pixels.astype(np.uint8))[None]
    if image.mode == "F":
        return torch.from_numpy((np.asarray(image).clip(0, 1) * 255).round().astype(np.uint8))[None]
    is_grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        image = white
    return tv.pil_to_tensor(image.convert("L" if is_grey else "RGB"))


def {name}(
    pretrained: bool = False,
    num_classes: int = len(CLASSES),
    pretrained_cfg=None,
    pretrained_cfg_overlay=None,
    cache_dir=None,
) -> nn.Sequential:
    """Build the network for timm's create_model; timm's other arguments are ignored."""
    network = build(num_classes)
    if pretrained:
        weights = load_file(WEIGHTS)
        if num_classes != len(CLASSES):
            weights = {{k: v for k, v in weights.items() if not k.startswith("head.classifier.")}}
        network.load_state_dict(weights, strict=num_classes == len(CLASSES))
    network.num_classes = num_classes
    network.pretrained_cfg = {{
        "input_size": (CHANNELS, RESOLUTION_PX, RESOLUTION_PX),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "num_classes": num_classes,
    }}
    return network


if __name__ == "__main__":
    from PIL import Image

    with torch.no_grad():
        shares = load()(preprocess(Image.open(sys.argv[1]))).float().softmax(1)[0]
    for share, index in zip(*shares.topk(min(5, len(CLASSES)))):
        name = CLASSES[index]
        print(f"{{share:6.1%}}  {{name if name.isprintable() else ascii(name)}}")
'''


def write(product: Product, variant: Variant, path: Path, where: str) -> None:
    """Write a product as `path`, .py, with the .safetensors beside it. Raises ExportError."""
    path.write_text(source(product, variant.precision), encoding="utf-8")
    weights = {}
    blocks = {block.name.replace(".", "_"): block for block in product.blocks}
    for key, tensor in product.network.state_dict().items():
        module, role, *rest = key.split(".")
        block = blocks[module]
        in_mixer = block.block == "quadra" and role in _neuron(block).roles
        name = ".".join([attribute(module), *(["mixer"] if in_mixer else []), role, *rest])
        halved = tensor.to(_DTYPES[variant.precision]) if tensor.is_floating_point() else tensor
        weights[name] = halved.contiguous()
    path.with_suffix(WEIGHTS).write_bytes(save(weights))


def load(path: Path) -> Run:
    """Return the trained network that a model.py defines, as a function of float32 images."""
    module = ModuleType(path.stem)
    module.__file__ = str(path)
    # executed, not imported: an import would leave compiled code beside the file
    exec(compile(path.read_text(encoding="utf-8"), path.name, "exec"), vars(module))
    network: nn.Module = module.load()

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        logits: Tensor = network(images.to(module.DTYPE))
        return logits.float()

    return run
