"""What pruning keeps: masks on weights as parametrizations, the layers that have them, a table of the zeros.

A mask lies on `weight` through torch.nn.utils.parametrize, so `layer.weight` is at every moment what runs: after an
optimizer's step, after loading a state_dict, in a copy. Masks of torch.nn.utils.prune are read too, and taken over
where pruning goes on.
"""

import copy
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils import prune as torch_prune

from classical.layers import require_module


class Pruning(nn.Module):
    """A parametrization of a weight that `finalize` writes into it."""


class Mask(Pruning):
    """Holds some weights at zero; they receive no gradient.

    Args:
        keep: bool, of the weight's shape, False where the weight is pruned.
    """

    keep: Tensor

    def __init__(self, keep: Tensor) -> None:
        super().__init__()
        self.register_buffer("keep", keep.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The weight, exactly +0 where it is pruned."""
        return torch.where(self.keep, weight, 0)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Store an assigned weight as it is."""
        return weight


class LayerSparsity(NamedTuple):
    """Zeros of one layer's weight; filters and channels are those with no weight left."""

    name: str
    shape: tuple[int, ...]
    weights: int
    nonzero: int
    empty_filters: int
    empty_channels: int


class Sparsity(NamedTuple):
    """Zeros in the weights of a model, a row a layer; str() is a table."""

    rows: tuple[LayerSparsity, ...]

    @property
    def weights(self) -> int:
        """Number of weights; biases and normalizations are not among them."""
        return sum(row.weights for row in self.rows)

    @property
    def nonzero(self) -> int:
        """Number of weights that are not zero."""
        return sum(row.nonzero for row in self.rows)

    @property
    def fraction(self) -> float:
        """Share of zeros, 0 to 1."""
        return 1 - self.nonzero / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        lines = [("layer", "shape", "weights", "non-zero", "zeros", "empty filters", "empty channels")]
        for row in (*self.rows, LayerSparsity("total", (), self.weights, self.nonzero, 0, 0)):
            zeros = f"{1 - row.nonzero / row.weights:.2%}" if row.weights else ""
            empty = (str(row.empty_filters), str(row.empty_channels)) if row.shape else ("", "")
            shape = "x".join(map(str, row.shape))
            lines.append((row.name or "(model)", shape, f"{row.weights:,}", f"{row.nonzero:,}", zeros, *empty))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in lines
        )


def prunable(model: nn.Module, skip: Collection[str] = ()) -> dict[str, nn.Module]:
    """Modules with a `weight` of two or more axes, by name: convolutions, linear layers, quantum kernels.

    Args:
        model: any module.
        skip: names of layers to leave out.

    Raises:
        ValueError: a name in `skip` is no such layer, nothing is left, or the model is no module.
    """
    require_module(model)
    if isinstance(skip, str):
        skip = (skip,)
    found = {name: module for name, module in model.named_modules() if _has_matrix(module)}
    check_names(skip, found)
    layers = {name: module for name, module in found.items() if name not in skip}
    if not layers:
        raise ValueError("the model has no layer to prune: no module is left with a weight of two or more axes")
    return layers


def check_names(names: Collection[str], layers: Mapping[str, Any]) -> None:
    """See that every name is that of a layer.

    Raises:
        ValueError: one is not; the message lists those there are.
    """
    for name in names:
        if name not in layers:
            raise ValueError(f"there is no prunable layer {name!r}: the layers are {', '.join(map(repr, layers))}")


def effective_weight(module: nn.Module) -> Tensor:
    """The weight that runs, detached: parametrizations and masks are applied."""
    if _torch_masked(module):  # its `weight` is of the last forward pass, not of the last optimizer step
        return (cast(Tensor, module.weight_orig) * cast(Tensor, module.weight_mask)).detach()
    return cast(Tensor, module.weight).detach()


def mask_of(module: nn.Module) -> Mask | None:
    """The mask on a module's weight, if it has one."""
    return next((part for part in _parts(module) if isinstance(part, Mask)), None)


def kept(module: nn.Module) -> Tensor:
    """Which weights of a module no mask prunes: bool, of the weight's shape."""
    found = mask_of(module)
    if found is not None:
        return found.keep
    if _torch_masked(module):
        return cast(Tensor, module.weight_mask).bool()
    return torch.ones_like(cast(Tensor, module.weight), dtype=torch.bool)


def masked(module: nn.Module) -> Mask:
    """The mask on a module's weight; laid on if there is none, taken over from torch.nn.utils.prune if that has one."""
    found = mask_of(module)
    if found is None:
        found = Mask(kept(module))
        if _torch_masked(module):
            torch_prune.remove(module, "weight")  # type: ignore[no-untyped-call]
        parametrize.register_parametrization(module, "weight", found)
    return found


def stored_weight(module: nn.Module) -> nn.Parameter:
    """The parameter behind a module's weight: what an optimizer moves.

    Raises:
        ValueError: a parametrization keeps the weight in several parameters.
    """
    if parametrize.is_parametrized(module, "weight"):
        parts = cast(Any, module.parametrizations).weight
        if not hasattr(parts, "original"):
            raise ValueError(f"a parametrization keeps the weight of {type(module).__name__} in parts: remove it first")
        return cast(nn.Parameter, parts.original)
    return cast(nn.Parameter, module._parameters["weight_orig" if _torch_masked(module) else "weight"])


def keep_zeros(model: nn.Module, skip: Collection[str] = ()) -> None:
    """Mask every weight that is zero now, so that further training leaves it there.

    A pruned and finalized model converted to quantized layers is trained on with its zeros so.

    Args:
        model: changed in place; layers without zeros get no mask.
        skip: names of layers to leave as they are.
    """
    for module in prunable(model, skip).values():
        zero = effective_weight(module) == 0
        if zero.any():
            masked(module).keep.logical_and_(~zero)


def finalize(model: nn.Module) -> nn.Module:
    """Write masks and structure scales into the weights and take them off; also masks of torch.nn.utils.prune.

    The parameters stay the same objects, so an optimizer goes on, but nothing holds the zeros any more.

    Args:
        model: changed in place.

    Returns:
        The model.

    Raises:
        ValueError: another parametrization lies on a pruned weight, which would be written into it as well.
    """
    require_module(model)
    pruned = []
    for name, module in model.named_modules():
        parts = _parts(module)
        others = [type(part).__name__ for part in parts if not isinstance(part, Pruning)]
        if len(others) < len(parts):
            pruned.append(module)
            if others:
                raise ValueError(
                    f"the weight of {name!r} has the parametrization {others[0]} beside those of pruning: remove it "
                    "first with torch.nn.utils.parametrize.remove_parametrizations"
                )
    for module in pruned:
        _own_class(module)
        parametrize.remove_parametrizations(module, "weight")
    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, torch_prune.BasePruningMethod):
                torch_prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
    return model


def sparsity(model: nn.Module) -> Sparsity:
    """Count the zeros in the weights of every layer; print the result for a table."""
    rows = []
    for name, module in prunable(model).items():
        alive = effective_weight(module) != 0
        shape = tuple(alive.shape)
        filters, channels = ((~alive.transpose(0, axis).flatten(1).any(1)).sum() for axis in (0, 1))
        rows.append(LayerSparsity(name, shape, alive.numel(), int(alive.sum()), int(filters), int(channels)))
    return Sparsity(tuple(rows))


def private_copy(model: nn.Module) -> nn.Module:
    """A deep copy, also of a model that torch.nn.utils.prune has masked: its weights carry a graph."""
    require_module(model)
    memo: dict[int, Any] = {}
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def _parts(module: nn.Module) -> list[nn.Module]:
    if not parametrize.is_parametrized(module, "weight"):
        return []
    return list(cast(Any, module.parametrizations).weight)


def _own_class(module: nn.Module) -> None:
    """Give a parametrized module a class that no copy shares: taking off a parametrization deletes from the class."""
    shared = type(module)
    content = {name: value for name, value in vars(shared).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(shared.__name__, shared.__bases__, content)


def _torch_masked(module: nn.Module) -> bool:
    return "weight_mask" in module._buffers and "weight_orig" in module._parameters


def _has_matrix(module: nn.Module) -> bool:
    if isinstance(module, parametrize.ParametrizationList):
        return False
    if _torch_masked(module):
        return cast(Tensor, module.weight_orig).dim() > 1
    if parametrize.is_parametrized(module, "weight"):
        return cast(Tensor, module.weight).dim() > 1
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1
