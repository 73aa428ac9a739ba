"""Whether a model suits the data, and a method the numbers that the model's layers read."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.pruning.masks import private_copy
from qconv.data import Split

SIGNS = ("bnn", "xnor")
"""Quantizers of activations that keep the sign alone."""


@torch.no_grad()
def check_scores(model: nn.Module, data: Split) -> None:
    """See that a model gives a score to each class that the data have.

    Raises:
        ValueError: it does not, or the data are no Split.
    """
    if not isinstance(data, Split):
        raise ValueError(
            f"data is a {type(data).__name__} but must be a Split: load_dataset(name).split(seed=0), "
            "or Dataset(name, images, labels).split(seed=0) of your own"
        )
    classes = 1 + max(int(part.labels.max()) for part in data)
    found = private_copy(model).eval()(data.train.images[:1])
    if found.dim() != 2 or found.shape[1] < classes:
        raise ValueError(
            f"the model gives scores of shape {tuple(found.shape)} for one image, but the labels go up to "
            f"{classes - 1}: it must give (1, {classes}), a score for each class"
        )


@torch.no_grad()
def check_inputs(small: nn.Module, images: Tensor) -> None:
    """See that no layer takes signs of what cannot be negative, or quantizes to 0 and more what can.

    Args:
        small: of quantized layers; it is put into eval().
        images: a batch.

    Raises:
        ValueError: one does; all signs would be +1, all negative values 0.
    """
    quantizers = {
        name: layer.activation_quantizer
        for name, layer in small.named_modules()
        if isinstance(layer, QuantizedConv2d | QuantizedLinear)
    }
    signs = {name for name, each in quantizers.items() if each.name in SIGNS}
    unsigned = {name for name, each in quantizers.items() if each.grid[0] >= 0 and each.name != "float"}
    least: dict[str, float] = {}

    def see(_: nn.Module, inputs: tuple[Tensor, ...], name: str) -> None:
        least[name] = min(float(inputs[0].min()), least.get(name, math.inf))

    layers = {name: small.get_submodule(name) for name in sorted(signs | unsigned)}
    hooks = [layer.register_forward_pre_hook(partial(see, name=name)) for name, layer in layers.items()]
    if hooks:
        small.eval()(images)
    for hook in hooks:
        hook.remove()
    for name, smallest in least.items():
        if name in signs and smallest >= 0:
            raise ValueError(
                f"the inputs of layer {name!r} are {smallest:g} or more, so that all their signs would be +1: make the "
                "activation before it a module nn.ReLU, which is then replaced, or one with negative values"
            )
        if name in unsigned and smallest < 0:
            raise ValueError(
                f"the inputs of layer {name!r} go down to {smallest:.3g}, but {quantizers[name].name!r} has no level "
                "below 0, so that all negative ones would be lost: put nn.ReLU before the layer, "
                "skip it, or choose an intN method"
            )
