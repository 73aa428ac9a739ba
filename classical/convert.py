"""From a float network to one of quantized layers with the same weights."""

import copy
from collections.abc import Collection
from typing import cast

from torch import nn
from torch.nn.utils import parametrize

from classical.layers import QuantizedConv2d, QuantizedLinear, attach_quantizers, require_module
from classical.pruning.masks import private_copy
from classical.quantizers import Quantizer, quantizer

Pair = tuple[str | Quantizer, str | Quantizer]


def quantize(
    model: nn.Module,
    *,
    weight: str | Quantizer = "int8",
    activation: str | Quantizer = "int8",
    first: Pair | None = None,
    last: Pair | None = None,
    skip: str | Collection[str] = (),
) -> nn.Module:
    """Copy a model with its nn.Conv2d and nn.Linear turned into QuantizedConv2d and QuantizedLinear.

    Weights, biases, modules and weights used in several places, hooks, parametrizations and pruning masks stay as they
    are. Layers of exactly these two classes are turned; classes derived from them are left alone. Learned scales of
    the weights start from the weights; ranges and learned scales of the inputs from the first batch in train().

    Args:
        model: Any module; it is not changed.
        weight, activation: Names (see `quantizer_names`) or Quantizers, of which every layer gets a copy of its own.
        first, last: (weight, activation) for the first and the last layer that is turned, in the order of
            model.named_modules(); None: as the others. A single layer is the first one.
        skip: Names of layers to leave alone, as in model.named_modules().

    Raises:
        ValueError: An unknown quantizer or name to skip; nothing to turn; a model that is no module.
    """
    require_module(model)
    for name, pair in (("first", first), ("last", last)):
        if pair is not None and (not isinstance(pair, tuple | list) or len(pair) != 2):
            raise ValueError(f"{name} is {pair!r} but must be a pair of quantizers, (weight, activation)")
    skip = (skip,) if isinstance(skip, str) else skip
    copied = private_copy(model)
    layers = {name: module for name, module in copied.named_modules() if _quantized_class(module) is not None}
    unknown = sorted(set(skip) - set(layers))
    if unknown:
        raise ValueError(f"nothing to skip at {', '.join(unknown)}: the layers are {', '.join(layers) or '(none)'}")
    chosen = {name: layer for name, layer in layers.items() if name not in skip}
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no nn.Conv2d or nn.Linear to quantize{' but the skipped' if skip else ''}"
        )
    pairs: dict[str, Pair] = dict.fromkeys(chosen, (weight, activation))
    names = list(chosen)
    pairs[names[-1]] = last or pairs[names[-1]]
    pairs[names[0]] = first or pairs[names[0]]
    for name, layer in chosen.items():
        # The class alone changes: a new module would lose hooks, masks, and its other places in the model.
        layer.__class__ = _quantized_class(layer)
        attach_quantizers(
            cast(QuantizedConv2d, layer),
            copy.deepcopy(quantizer(pairs[name][0], "weight")),
            copy.deepcopy(quantizer(pairs[name][1], "activation")),
        )
    return copied


def _quantized_class(module: nn.Module) -> type[nn.Module] | None:
    """The class that a layer is turned into; None for one that is left alone."""
    own = type(module)
    if own in _TURNED:
        return _TURNED[own]
    if parametrize.is_parametrized(module) and own.__bases__[0] in _TURNED:
        # torch gives each parametrized module a class derived from its own, which holds the parametrized attributes.
        base = _TURNED[own.__bases__[0]]
        content = {name: value for name, value in vars(own).items() if name not in ("__dict__", "__weakref__")}
        return type(f"Parametrized{base.__name__}", (base,), content)
    return None


_TURNED: dict[type[nn.Module], type[nn.Module]] = {nn.Conv2d: QuantizedConv2d, nn.Linear: QuantizedLinear}
