"""The registry of blocks: the name, the parameters and the layers of each kind of block.

Counters, latency tables, modules and exports all read the entries of `BLOCKS`; `quadra`, `star`, `mbconv` and
`identity` are entries like those that `register_block` adds. Nothing here imports torch: the module of a
block is given by its import path, or is a class in the user's file.

Place of normalisation: with layer normalisation, a QuadraBlock is that of the paper (arXiv 2311.17956):
`x + qconv(LN(x))`, then `x + PW2(GELU(PW1(LN(x))))`. Batch normalisation must be folded at deployment, which
is impossible before a padded convolution. It therefore follows the quadratic sum (`x + clip(BN(qconv(x)))`,
folding into W_a, W_c and a bias) and the first pointwise convolution. After the neurons type3, type4 and
factored, no layer can absorb the shift, so it stays a separate operator.

Without a norm (`scale`), each half of a QuadraBlock ends with a learned scale of its channels:
`x + clip(s1 . qconv(x))`, then `x + s2 . PW2(act(PW1(x)))`. The scales start small, as those of LayerScale
(CaiT, arXiv 2103.17239): a new block is close to identity, and the map that leaves a deep stage is about as
large as the map that enters it, which a norm would see to otherwise. There are no statistics, and the scales
fold into the convolutions, except behind a square (type3), which has no negative values to give. The norms of
the stem, the transitions and the head stay.

The clip to [-6, 6] is needed since with batch normalisation, nothing else bounds what a block multiplies. In
evaluation, a norm is a constant scale and shift, so a network of d blocks that square their inputs is a
polynomial of degree 2^d: it overflows at more contrast or at another resolution than in training. With the
clip, a mixer adds at most 6 to its input. The bound is that of ReLU6, six standard deviations where the
norm's scale is 1. It costs an elementwise pass that is not fused. A learned scale is a constant in training
too, and needs it all the more. Layer normalisation bounds the input of the product itself, and the linear
neuron multiplies nothing, so neither needs a clip.

Star blocks and inverted residuals of factored neurons need none with ReLU6. It bounds one factor of a star
block, so that the product grows no faster than the other factor, which is linear in the input: the network
grows as one without products. In an inverted residual it follows the product, whose output it bounds. Any
other activation leaves a square, and these blocks then clip what they add, where their maps have the fewest
channels. In halves, a product overflows beyond 65504. With ReLU6, the other factor would have to reach 10,900
(star), or the root of the product 256; both are combinations of normalised maps. The half-precision check of
an export looks at the values on real images.
"""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from importlib import import_module
from itertools import pairwise, product
from typing import Any, TypeVar

from qnas.common.arguments import check_arguments, quoted
from qnas.common.errors import QnasError, SpaceError, abbreviate, nearest, one_line
from qnas.spaces.layer import ACTIVATIONS, LAYERSCALE, NORMS, OPS, LayerSpec
from qnas.spaces.neurons import DEFAULT_NEURON, NAME, NEURONS, SCALE, SPACES_OWN, check_free

Value = int | str  # of a parameter
Layers = tuple[LayerSpec, ...]
Definition = TypeVar("Definition", bound=Callable[..., Any])


@dataclass(frozen=True)
class Place:
    """The surroundings of a candidate's block: its shape and the space's conventions.

    `norm` and `activation` are the candidate's own where it has some (`Block.at`).
    """

    c_in: int
    c_out: int
    stride: int
    resolution_px: int
    norm: str
    activation: str
    padding: str = "symmetric"  # of convolutions with a stride; or "same"
    norm_eps: float | None = None  # None: that of `qnas.nn.blocks`

    @property
    def keeps_shape(self) -> bool:
        """Whether input and output have the same shape."""
        return self.c_in == self.c_out and self.stride == 1

    def own(self, *, norm: str = SPACES_OWN, act: str = SPACES_OWN) -> "Place":
        """Return the place with a candidate's own norm and activation, where these words are no `space`."""
        operator = {SPACES_OWN: self.norm, SCALE: LAYERSCALE}.get(norm, norm)
        return replace(self, norm=operator, activation=self.activation if act == SPACES_OWN else act)

    def settled(self, layers: Layers) -> Layers:
        """Return layers with the space's padding and epsilon, which the functions of blocks leave out."""
        return settled(layers, self.padding, self.norm_eps)


def settled(layers: Layers, padding: str, norm_eps: float | None) -> Layers:
    """Return layers with a space's padding of convolutions with a stride, and epsilon of norms."""
    if padding == "symmetric" and norm_eps is None:
        return layers
    return tuple(
        replace(layer, eps=norm_eps)
        if OPS[layer.op].scales_and_shifts
        else replace(layer, same=True)
        if padding == "same" and layer.padding and layer.stride > 1
        else layer
        for layer in layers
    )


@dataclass(frozen=True)
class Parameter:
    """A parameter of a block, either a whole number or a word."""

    name: str
    values: Collection[Value]
    default: Value | None = None  # None: it must be given
    is_sliced: bool = False  # whether a smaller value's weights are a slice of the largest's
    prefix: str = ""  # before a number in a candidate's name: k in quadra_k7_e4

    @property
    def is_word(self) -> bool:
        """Whether the values are words."""
        return isinstance(next(iter(self.values)), str)

    def problem(self, value: Any) -> str:
        """Return what was expected if a value is not allowed, otherwise ""."""
        if not self.is_word and (not isinstance(value, int) or isinstance(value, bool)):
            return "expected a whole number"
        if isinstance(value, int | str) and value in self.values:
            return ""
        if isinstance(self.values, range):
            if value < self.values[0]:
                return f"expected at least {self.values[0]}"
            if value > self.values[-1]:
                return f"expected at most {self.values[-1]}"
            if self.values.step == 2:
                return f"expected an {'odd' if self.values[0] % 2 else 'even'} number"
        *first, last = map(repr, self.values)
        return f"expected {', '.join(first)} or {last}" if first else f"expected {last}"


@dataclass(frozen=True)
class Block:
    """A kind of block."""

    name: str
    parameters: tuple[Parameter, ...]
    layers: Callable[..., Layers]  # (place, **parameters)
    keeps_shape: bool  # cannot change channels or resolution
    needs_batchnorm: bool  # is defined with batch normalisation only
    # A class or function that makes the module, or its import path "package.module:name". It is given the
    # fields of `Place` and the parameters that its signature names. None: a plain chain of the layers.
    module: Callable[..., Any] | str | None
    definition: Any  # the decorated function or class

    @property
    def shares_weights(self) -> bool:
        """Whether candidates can be slices of one largest module."""
        return all(p.is_sliced or p.is_word for p in self.parameters)

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter of that name, or None."""
        return next((p for p in self.parameters if p.name == name), None)

    def complete(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return all parameters in order, with defaults for those that are not given."""
        return {p.name: given.get(p.name, p.default) for p in self.parameters}

    def check(self, given: Mapping[str, Any]) -> Iterator[tuple[str | None, str]]:
        """Yield the problems of given parameters, each with its parameter, or None for the block."""
        for name, value in given.items():
            parameter = self.parameter(name)
            if parameter is None:
                known = [p.name for p in self.parameters]
                hint = f" ({nearest(str(name), known)})" if known else ""
                yield None, f"{self.name} takes no {one_line(name, 60)}{hint}"
            elif problem := parameter.problem(value):
                yield name, problem
        if missing := sorted(p.name for p in self.parameters if p.default is None and p.name not in given):
            yield None, f"{self.name} needs {' and '.join(missing)}"

    def settle(self, parameters: Mapping[str, Value], norm: str, activation: str) -> dict[str, Value]:
        """Return parameters with the space's norm and activation where the candidate has none of its own."""
        of_space = {"norm": norm, "act": activation}
        return {name: of_space[name] if self._is_spaces(name, v) else v for name, v in parameters.items()}

    def at(self, place: Place, parameters: Mapping[str, Value]) -> Place:
        """Return a place with the candidate's own norm and activation."""
        names = [p.name for p in self.parameters if self._is_spaces(p.name, SPACES_OWN)]
        return place.own(**{name: str(parameters.get(name, SPACES_OWN)) for name in names})

    def _is_spaces(self, name: str, value: Value) -> bool:
        """Whether a parameter stands for the norm or activation of the space, or of the candidate."""
        parameter = self.parameter(name) if name in ("norm", "act") else None
        return parameter is not None and value == SPACES_OWN and SPACES_OWN in parameter.values

    def kind(self, parameters: Mapping[str, Value]) -> str:
        """Return the name of the candidates whose weights may be slices of each other's.

        >>> BLOCKS["quadra"].kind({"kernel": 3, "expansion": 2, "neuron": "fan"})
        'quadra_fan'
        """
        return "_".join([self.name, *self._words(parameters)])

    def candidate_name(self, parameters: Mapping[str, Value]) -> str:
        """Return the name in architectures and tables.

        >>> BLOCKS["quadra"].candidate_name({"kernel": 7, "expansion": 4, "neuron": "linear"})
        'quadra_k7_e4_linear'
        """
        sizes = [f"{p.prefix}{parameters[p.name]}" for p in self.parameters if not p.is_word]
        return "_".join([self.name, *sizes, *self._words(parameters)])

    def _words(self, parameters: Mapping[str, Value]) -> list[str]:
        words = [p for p in self.parameters if p.is_word]
        given = ((p, parameters.get(p.name, p.default)) for p in words)
        return [str(value) for p, value in given if value != p.default]

    def layers_at(self, place: Place, parameters: Mapping[str, Value]) -> Layers:
        """Return the layers of the block. Raises SpaceError where they do not fit the place."""
        place = self.at(place, parameters)
        try:
            layers = self.layers(place, **parameters)
            problem = (
                "" if _are_layers(layers) else f"`layers` returned {quoted(layers)}, no tuple of LayerSpec"
            )
        except QnasError:
            raise
        except Exception as error:  # a user's function
            raise SpaceError(
                f"block {self.candidate_name(parameters)}: its layers cannot be made at {place}: "
                f"{type(error).__name__}: {one_line(error, 60)}"
            ) from error
        if problem:
            raise SpaceError(f"block {self.candidate_name(parameters)}: {problem}")
        layers = place.settled(layers)
        c_in, px, c_out = place.c_in, place.resolution_px, place.c_out
        wanted = (c_in, px, c_out, -(-px // place.stride))
        found = (c_in, px, c_in, px)
        if layers:
            found = (layers[0].c_in, layers[0].resolution_px, layers[-1].c_out, layers[-1].out_px)
        if found != wanted:
            raise SpaceError(
                "block {}: its layers go from {} channels at {} px to {} at {} px, but the place needs {} at "
                "{} px to {} at {} px".format(self.candidate_name(parameters), *found, *wanted)
            )
        return layers


def _are_layers(layers: object) -> bool:
    return isinstance(layers, tuple) and all(isinstance(layer, LayerSpec) for layer in layers)


# Kinds of block by name: the shipped ones, and those registered by the user.
BLOCKS: dict[str, Block] = {}


def register_block(
    name: str,
    *,
    parameters: Mapping[str, Collection[Value]] | None = None,
    sliced: Collection[str] = (),
    keeps_shape: bool = True,
    needs_batchnorm: bool = False,
    module: Callable[..., Any] | str | None = None,
) -> Callable[[Definition], Definition]:
    """Register a kind of block; decorate a function that returns its layers, or the class of its module.

    A function takes a `Place` and the parameters and returns a tuple of `LayerSpec` in the order in which
    they run. Without `module` the block is a chain of these layers, with the input added at the end where
    the last one is an `add`. A class is a torch module with a static method `layers`, which is such a
    function; its constructor takes any of the fields of `Place` and the parameters, by name.

    `parameters` gives the allowed values, all whole numbers or all words; a default in the signature of the
    function makes a parameter optional. `sliced` names the parameters for which a smaller value's weights
    are a slice of the largest's, the centre of kernels and the leading channels. If it names all whole-number
    parameters, the block works with weights="shared", otherwise only with weights="independent".

    Parameters `norm` and `act` with the word "space" among their values choose the norm and the activation of
    the candidate: those of the `Place` are then its own.

    Raises UsageError for an argument of another type, SpaceError where the name is taken or the parts do not
    fit each other.

    >>> @register_block("depthwise", parameters={"kernel": (3, 5)}, sliced=("kernel",))
    ... def depthwise_layers(place, kernel):
    ...     c, px = place.c_in, place.resolution_px
    ...     norm = LayerSpec("norm", place.norm, px, c, c)
    ...     return (norm, LayerSpec("depthwise", "dwconv", px, c, c, kernel))
    >>> BLOCKS.pop("depthwise").candidate_name({"kernel": 5})
    'depthwise_k5'
    """

    check_arguments(name=name, parameters=parameters, sliced=sliced, module=module)
    check_arguments(keeps_shape=keeps_shape, needs_batchnorm=needs_batchnorm)

    def register(definition: Definition) -> Definition:
        is_class = inspect.isclass(definition)
        layers = getattr(definition, "layers", None) if is_class else definition
        if not callable(layers):
            what = "the class has" if is_class else f"{quoted(definition)} is no function or class, and has"
            raise SpaceError(f"block {name}: {what} no static method `layers(place, ...)`")
        known = _parameters(name, layers, parameters or {}, sliced)
        made_by = definition if is_class else module
        block = Block(name, known, layers, keeps_shape, needs_batchnorm, made_by, definition)
        check_free(f"block {name}", getattr(BLOCKS.get(name), "definition", None), definition)
        _check_block(block)
        BLOCKS[name] = block
        return definition

    return register


def _parameters(
    block: str, layers: Callable[..., Any], values: Mapping[str, Collection[Value]], sliced: Collection[str]
) -> tuple[Parameter, ...]:
    """Return the parameters as declared, with the defaults of the function. Raises SpaceError."""
    where = f"block {one_line(block, 40)}"
    found = _arguments_of(where, layers)
    arguments = found[1:]
    problems = [] if found else ["`layers` takes no place"]
    if not NAME.fullmatch(block):
        problems.append(f"the name must be lower-case letters and digits, got {block!r}")
    taken = [argument.name for argument in arguments]
    if wrong := [name for name in values if not isinstance(name, str)]:
        raise SpaceError(f"{where}: parameters: {quoted(wrong[0])} is no name")
    if wrong := [name for name, v in values.items() if isinstance(v, str) or not isinstance(v, Collection)]:
        raise SpaceError(f"{where}: {wrong[0]}: expected a collection of values")
    if sorted(taken) != sorted(values):
        declared = ", ".join(values) or "none"
        problems.append(f"`layers` takes {', '.join(taken) or 'no parameter'}, declared are {declared}")
    problems += [f"sliced: no parameter {each}" for each in sliced if each not in values]
    reserved = {"block", *(field.name for field in fields(Place))}
    for parameter, allowed in values.items():
        if parameter == "norm" and SPACES_OWN in allowed:
            if unknown := {*allowed} - {SPACES_OWN, SCALE, *NORMS}:
                known = f"{', '.join(NORMS)} or {SCALE}"
                problems.append(f"norm: expected words of {known}, got {quoted(min(unknown, key=str))}")
        elif parameter in reserved:
            problems.append(f"a parameter cannot be called {parameter}")
        numbers = [v for v in allowed if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
        words = [v for v in allowed if isinstance(v, str) and NAME.fullmatch(v)]
        if not allowed or len(allowed) not in (len(numbers), len(words)):
            expected = "whole numbers from 0, or words of lower-case letters and digits"
            problems.append(f"{parameter}: expected {expected}")
        elif words and parameter in sliced:
            problems.append(f"sliced: {parameter} has words as values, which have no largest")
    defaults = {a.name: None if a.default is a.empty else a.default for a in arguments}
    # defaults are not named
    all_words = [
        v for p, allowed in values.items() for v in allowed if isinstance(v, str) and v != defaults.get(p)
    ]
    if len(set(all_words)) < len(all_words):
        problems.append("two parameters have a word in common, so that names would be ambiguous")
    if problems:
        raise SpaceError(f"{where}: {abbreviate(problems, '; ')}")
    letters = [parameter[0] for parameter in values]
    made: list[Parameter] = []
    for parameter, allowed in values.items():
        prefix = parameter[0] if letters.count(parameter[0]) == 1 else parameter
        made.append(Parameter(parameter, allowed, defaults[parameter], parameter in sliced, prefix))
        default = defaults[parameter]
        if default is not None and (problem := made[-1].problem(default)):
            raise SpaceError(f"block {block}: default of {parameter}: {problem}, got {default!r}")
    return tuple(made)


def _arguments_of(where: str, function: Callable[..., Any]) -> list[inspect.Parameter]:
    """Return the arguments that a function takes. Raises SpaceError where Python cannot tell."""
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise SpaceError(f"{where}: the arguments of {quoted(function)} are not known") from error


# Places at which a block is tried when it is registered: channels in and out, stride, pixels.
_TRIED = ((8, 8, 1, 9), (8, 8, 1, 16), (8, 16, 2, 9), (8, 16, 1, 8), (16, 8, 2, 16))


def _check_block(block: Block) -> None:
    """Try a block with its smallest and largest parameters. Raises SpaceError where one does not fit."""
    norms = ("batchnorm",) if block.needs_batchnorm else ("batchnorm", "layernorm")
    ordered = {p.name: sorted(p.values, key=str if p.is_word else int) for p in block.parameters}
    corners = [{name: values[i] for name, values in ordered.items()} for i in (0, -1)]
    corners += [{**corners[0], "norm": word} for word in ordered.get("norm", ())]
    for shape, norm, parameters in product(_TRIED, norms, corners):
        place = Place(*shape, norm=norm, activation="relu")
        if block.keeps_shape and not place.keeps_shape:
            continue
        layers = block.layers_at(place, parameters)
        roles = [layer.role for layer in layers]
        if len(set(roles)) < len(roles):
            raise SpaceError(f"block {block.name}: two layers have one role among {', '.join(roles)}")
        if block.module is None:
            _check_chain(block.name, layers)
    if block.module is not None and not isinstance(block.module, str):
        module_of(block, Place(8, 8, 1, 8, norms[0], "relu"), corners[0])


def _check_chain(name: str, layers: Layers) -> None:
    """Raise SpaceError where layers cannot run one after another as they are."""
    rest = layers[:-1] if layers and layers[-1].op == "add" else layers
    for layer in rest:
        if layer.op in ("add", "mul", "square"):
            problem = "cannot be in a chain; the block needs a module"
            raise SpaceError(f"block {name}: layer {layer.role} ({layer.op}) {problem}")
    for before, after in pairwise(rest):
        if (before.c_out, before.out_px) != (after.c_in, after.resolution_px):
            raise SpaceError(f"block {name}: layer {after.role} does not take what {before.role} returns")


def module_of(
    block: Block, place: Place, parameters: Mapping[str, Value]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """Return the class or function that makes a block's module, and its arguments.

    Raises SpaceError where it needs an argument that neither the place nor the block has.
    """
    make = block.module
    if isinstance(make, str):
        package, _, name = make.partition(":")
        try:
            make = getattr(import_module(package), name)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            raise SpaceError(
                f"block {block.name}: module {one_line(make, 60)!r}: {one_line(error)}"
            ) from error
    if not callable(make):
        raise SpaceError(f"block {block.name}: its module is {quoted(make)}, expected a class or a function")
    place = block.at(place, parameters)
    known = {**asdict(place), **parameters, "norm": place.norm}  # not the word of the candidate
    wanted = _arguments_of(f"block {block.name}", make)
    needed = [a for a in wanted if a.default is a.empty and a.kind not in (a.VAR_POSITIONAL, a.VAR_KEYWORD)]
    if unknown := ", ".join(a.name for a in needed if a.name not in known):
        raise SpaceError(f"block {block.name}: its module needs {unknown}, known are {', '.join(known)}")
    names = {a.name for a in wanted}
    for name, is_needed in (("norm_eps", place.norm_eps is not None), ("padding", _pads_same(place))):
        if is_needed and name not in names:
            raise SpaceError(
                f"block {block.name}: the space sets {name}={known[name]}, which its module does not take"
            )
    return make, {a.name: known[a.name] for a in wanted if a.name in known}


def _pads_same(place: Place) -> bool:
    return place.padding == "same" and place.stride > 1


@register_block(
    "quadra",
    parameters={
        "kernel": range(1, 32, 2),
        "expansion": range(1, 17),
        "neuron": NEURONS.keys(),
        "act": (SPACES_OWN, *ACTIVATIONS),
        "norm": (SPACES_OWN, *NORMS, SCALE),
    },
    sliced=("kernel", "expansion"),
    module="qnas.nn.blocks:QuadraBlock",
)
def quadra_layers(
    place: Place,
    kernel: int,
    expansion: int,
    neuron: str = DEFAULT_NEURON,
    act: str = SPACES_OWN,
    norm: str = SPACES_OWN,
) -> Layers:
    """Return the layers of a QuadraBlock: depthwise mixer of a neuron, then pointwise expansion."""
    assert place.keeps_shape
    place = place.own(norm=norm, act=act)
    c, hidden, px = place.c_in, expansion * place.c_in, place.resolution_px
    norm, pre_norm = place.norm, place.norm == "layernorm"
    clip = (LayerSpec("clip", "clip", px, c, c),) if NEURONS[neuron].multiplies else ()
    biases = NEURONS[neuron].convolution_biases(norm)
    mixer = [
        LayerSpec(role, op, px, c, c, *((kernel, 1, biases[role]) if role in biases else ()))
        for role, op in NEURONS[neuron].layers.items()
    ]
    expand = LayerSpec("expand", "conv", px, c, hidden, bias=norm != "batchnorm")
    activation = LayerSpec("act", place.activation, px, hidden, hidden)
    project = LayerSpec("project", "conv", px, hidden, c, bias=True)
    if pre_norm:
        mixer = [LayerSpec("norm1", norm, px, c, c), *mixer]
        pointwise = [LayerSpec("norm2", norm, px, c, c), expand, activation, project]
    elif norm == LAYERSCALE:
        # behind the convolution that it folds into, where it runs once folded
        at = max((i + 1 for i, s in enumerate(mixer) if s.role in NEURONS[neuron].scaled), default=len(mixer))
        mixer.insert(at, LayerSpec("scale1", norm, px, c, c))
        mixer += clip
        pointwise = [expand, activation, project, LayerSpec("scale2", norm, px, c, c)]
    else:
        # next to the convolution that it folds into, where it runs once folded
        at = len(mixer) - (mixer[-1].op == "add")
        mixer.insert(at, LayerSpec("norm1", norm, px, c, c))
        mixer += clip
        pointwise = [expand, LayerSpec("norm2", norm, px, hidden, hidden), activation, project]
    return (
        *mixer,
        LayerSpec("residual1", "add", px, c, c),
        *pointwise,
        LayerSpec("residual2", "add", px, c, c),
    )


@register_block(
    "star",
    parameters={
        "kernel": range(1, 32, 2),
        "expansion": range(1, 17),
        "mixers": ("double", "single"),
        "act": (SPACES_OWN, *ACTIVATIONS),
        "norm": (SPACES_OWN, "batchnorm"),
    },
    sliced=("kernel", "expansion"),
    needs_batchnorm=True,
    module="qnas.nn.blocks:star_block",
)
def star_layers(
    place: Place,
    kernel: int,
    expansion: int,
    mixers: str = "double",
    act: str = SPACES_OWN,
    norm: str = SPACES_OWN,
) -> Layers:
    """Return the layers of a star block (StarNet, arXiv 2403.19967), with its second depthwise or without."""
    assert place.keeps_shape
    place = place.own(norm=norm, act=act)
    c, hidden, px, norm = place.c_in, expansion * place.c_in, place.resolution_px, place.norm
    clip = LayerSpec("clip", "clip", px, c, c)
    again = LayerSpec("depthwise2", "dwconv", px, c, c, kernel, bias=True)
    return (
        LayerSpec("depthwise1", "dwconv", px, c, c, kernel),
        LayerSpec("norm1", norm, px, c, c),
        LayerSpec("factor1", "conv", px, c, hidden, bias=True),
        LayerSpec("act", place.activation, px, hidden, hidden),
        LayerSpec("factor2", "conv", px, c, hidden, bias=True),
        LayerSpec("product", "mul", px, hidden, hidden),
        LayerSpec("project", "conv", px, hidden, c),
        LayerSpec("norm2", norm, px, c, c),
        *((clip,) if place.activation != "relu6" else ()),
        *((again,) if mixers == "double" else ()),
        LayerSpec("residual", "add", px, c, c),
    )


def _squeeze_and_excitation(px: int, c: int) -> Layers:
    squeezed = 8 * -(-c // 32)
    return (
        LayerSpec("pool", "gap", px, c, c),
        LayerSpec("squeeze", "conv", 1, c, squeezed, bias=True),
        LayerSpec("squeeze_act", "relu", 1, squeezed, squeezed),
        LayerSpec("excite", "conv", 1, squeezed, c, bias=True),
        LayerSpec("gate", "hsigmoid", 1, c, c),
        LayerSpec("scale", "scale", px, c, c),
    )


@register_block(
    "mbconv",
    parameters={
        "kernel": range(1, 32, 2),
        "expansion": range(1, 17),
        "neuron": ("linear", "factored"),
        "attention": ("none", "se"),
        "act": (SPACES_OWN, *ACTIVATIONS),
        "norm": (SPACES_OWN, "batchnorm"),
    },
    sliced=("kernel", "expansion"),
    keeps_shape=False,
    needs_batchnorm=True,
    module="qnas.nn.blocks:inverted_residual",
)
def mbconv_layers(
    place: Place,
    kernel: int,
    expansion: int,
    neuron: str = "linear",
    attention: str = "none",
    act: str = SPACES_OWN,
    norm: str = SPACES_OWN,
) -> Layers:
    """Return the layers of an inverted residual (MobileNetV2, arXiv 1801.04381).

    A factored neuron is the product of two depthwise convolutions, each with a norm: it is
    (W_a * x + b_a) . (W_b * x + b_b) once they are folded. `se` is the squeeze-and-excitation of MobileNetV3
    (arXiv 1905.02244), from a quarter of the hidden channels, rounded up to eights. `act` is the activation.
    """
    place = place.own(norm=norm, act=act)
    c_in, c_out, px, norm = place.c_in, place.c_out, place.resolution_px, place.norm
    activation = place.activation
    hidden = expansion * c_in
    expand = (
        LayerSpec("expand", "conv", px, c_in, hidden),
        LayerSpec("norm1", norm, px, hidden, hidden),
        LayerSpec("act1", activation, px, hidden, hidden),
    )
    names = (("depthwise", "norm2"),) if neuron == "linear" else (("conv_a", "norm_a"), ("conv_b", "norm_b"))
    mixer = []
    for convolution, its_norm in names:
        mixer.append(LayerSpec(convolution, "dwconv", px, hidden, hidden, kernel, place.stride))
        mixer.append(LayerSpec(its_norm, norm, mixer[-1].out_px, hidden, hidden))
    px = mixer[-1].out_px
    if neuron == "factored":
        mixer.append(LayerSpec("product", "mul", px, hidden, hidden))
    clip = LayerSpec("clip", "clip", px, c_out, c_out)
    residual = LayerSpec("residual", "add", px, c_out, c_out)
    return (
        *(expand if expansion > 1 else ()),
        *mixer,
        LayerSpec("act2", activation, px, hidden, hidden),
        *(_squeeze_and_excitation(px, hidden) if attention == "se" else ()),
        LayerSpec("project", "conv", px, hidden, c_out),
        LayerSpec("norm3", norm, px, c_out, c_out),
        *((clip,) if neuron == "factored" and activation != "relu6" else ()),
        *((residual,) if place.keeps_shape else ()),
    )


@register_block("identity")
def identity_layers(place: Place) -> Layers:
    """Return no layers: the input passes unchanged."""
    assert place.keeps_shape
    return ()
