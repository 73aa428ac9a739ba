"""Whole models as files: what an inference needs, and nothing of the training.

Of a layer with a weight_quantizer the codes and scales are kept, not the real weights behind them; of a masked or
otherwise parametrized weight its value, not what it is made from. A loaded model has plain weights and fixed codes.
"""

import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from classical.layers import require_module
from classical.quantizers import Codebook, Codes, Float, Quantizer, Uneven, quantizer
from classical.storage.codings import Stored
from classical.storage.files import Sizes, read, save, sizes, values
from classical.storage.sharing import is_masked, make_permanent

_WIDEST = 8  # bytes of a number
_SPARE_BYTES = 1 << 20  # for scales whose number a model learns from the file
_BUILD = (
    "build the model as the stored one was, if that was quantized with the same quantize(...) or "
    "data_free_quantize(...); load_compressed(...) does so for a file of compress(...)"
)


class Frozen(Quantizer):
    """What a weight quantizer stated when its layer was stored: these codes, whatever becomes of the weight.

    Args:
        original: whose name, format and operation counts it keeps.
        stated: the codes.
        weight: of the layer.
    """

    def __init__(self, original: Quantizer, stated: Codes | Codebook, weight: Tensor) -> None:
        super().__init__(original.name, original.format, original.grid)
        for name in ("roles", "bits", "max_code", "planes", "scales", "asymmetric", "coding"):
            setattr(self, name, getattr(original, name))
        self._constants = original.constants(weight)
        for name, tensor in zip(stated._fields, stated, strict=True):
            self.register_buffer(name, tensor.to(weight.device))

    def _stated(self) -> Codes | Codebook:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """The stored values, of x's type; no gradient reaches x."""
        return values(self._stated()).to(x.dtype)

    def constants(self, weight: Tensor) -> int:
        """As many as the quantizer had that was stored."""
        return self._constants


class FrozenCodes(Frozen):
    """Stored codes with a scale."""

    codes: Tensor
    scale: Tensor
    zero: Tensor

    def _stated(self) -> Codes:
        return Codes(self.codes, self.scale, self.zero)

    def encode(self, x: Tensor) -> Codes:
        """The stored codes, in the scale's type."""
        return Codes(self.codes.to(self.scale.dtype), self.scale, self.zero.to(self.scale.dtype))


class FrozenLevels(Frozen, Uneven):
    """Stored codes with uneven levels."""

    marker = "levels"
    codes: Tensor
    levels: Tensor

    def __init__(self, original: Quantizer, stated: Codebook, weight: Tensor) -> None:
        super().__init__(original, stated, weight)
        self._fitted = True

    def _stated(self) -> Codebook:
        return Codebook(self.codes, self.levels)

    def codebook(self, x: Tensor) -> Codebook:
        """The stored codes and levels."""
        return self._stated()


@dataclass
class _Place:
    """A tensor of a model: an attribute of a module, under one name or, where it is shared, several."""

    names: list[str]
    module: nn.Module
    attribute: str
    quantizer: Quantizer | None = None  # of a weight whose codes are stored
    codes: Codes | Codebook | None = None

    def value(self) -> Tensor:
        """What the module computes with, pruned and parametrized."""
        if is_masked(self.module, self.attribute):  # the attribute itself is renewed only when the module runs
            value = getattr(self.module, f"{self.attribute}_orig") * getattr(self.module, f"{self.attribute}_mask")
        else:
            value = getattr(self.module, self.attribute)
        if is_lazy(value):
            raise ValueError(
                f"the {self.attribute} of {self.module} has no shape yet: run a batch through the model first"
            )
        value = value.detach()
        # A mask times a negative weight is -0: one level more, on which no output depends.
        return torch.where(value == 0, torch.zeros_like(value), value) if value.is_floating_point() else value


def save_model(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    coding: str = "auto",
    floats: torch.dtype | None = None,
    biases: str | None = None,
) -> int:
    """Write a model's state for inference, as small as its quantization and pruning allow.

    `load_model` gives the same outputs in eval(), unless `floats` or `biases` rounds. The model is not changed. Real
    weights behind quantized ones, masks and what parametrizations are made from are not written: to go on training,
    keep the state_dict.

    Args:
        model: any module whose state_dict holds tensors only.
        path: written beside and renamed.
        coding: as for `save`.
        floats: round what is not quantized to torch.float16 or torch.bfloat16.
        biases: round biases to the codes of a weight quantizer, such as "int8".

    Returns:
        Bytes of the file.

    Raises:
        ValueError: no module, or one with state that is no tensor; a value beyond the range of `floats`; those of
            `save`.
    """
    if floats not in (None, torch.float16, torch.bfloat16):
        raise ValueError(f"floats is {floats} but must be None, torch.float16 or torch.bfloat16")
    tensors: dict[str, Stored] = {}
    with _evaluating(model):
        places = _places(model)
        for place in places:
            if place.codes is not None:
                tensors[place.names[0]] = place.codes
            elif biases is not None and place.attribute == "bias" and place.value().is_floating_point():
                tensors[place.names[0]] = quantizer(biases, "weight").integers(place.value())
            else:
                tensors[place.names[0]] = _rounded(place, floats)
        return save(tensors, path, coding=coding, metadata=_quantizers(places))


def load_model(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Fill a model with what `save_model` wrote.

    Masks and parametrizations give way to plain parameters, and weight quantizers to the stored codes, which later
    changes of the weights do not reach.

    Args:
        model: built as the stored one was, with or without its masks; changed in place, and returned. A file of another
            model leaves it as it is.
        path: of the file.

    Raises:
        ValueError: the file is damaged, or was written from another model: other names, shapes, quantizers or types of
            numbers. Only a file of half precision, as `floats` makes it, fits a model of more.
        OSError: it cannot be read.
    """
    file = sizes(path)
    with _evaluating(model):
        places = _places(model)
        _compare(file, places, path)
        found = read(path, max_bytes=_WIDEST * sum(place.value().numel() for place in places) + _SPARE_BYTES)
        _compare_types(found, places, path)
        state: dict[str, Tensor] = {}
        for place in places:
            make_permanent(place.module, place.attribute)
            stored = found[place.names[0]]
            if place.quantizer is None or isinstance(stored, Tensor):
                state |= dict.fromkeys(place.names, values(stored))
            else:
                weight = getattr(place.module, place.attribute)
                weight.copy_(values(stored))
                frozen: Frozen
                if isinstance(stored, Codebook):
                    frozen = FrozenLevels(place.quantizer, stored, weight)
                else:
                    frozen = FrozenCodes(place.quantizer, stored, weight)
                place.module.weight_quantizer = frozen.eval()
        try:
            model.load_state_dict(model.state_dict() | state)
        except RuntimeError as error:
            raise ValueError(f"{os.fspath(path)} does not fit the model: {error}") from error
    return model


def _places(model: nn.Module) -> list[_Place]:
    """Every tensor that an inference needs, once."""
    found: dict[tuple[int, str], _Place] = {}
    for name, place in _walk(model, ""):
        own = vars(place.module)["_parameters"] | vars(place.module)["_buffers"]
        # A tensor of two modules is one, unless a module computes or quantizes it first.
        plain = place.attribute in own and place.codes is None
        key = (id(own[place.attribute]), "") if plain else (id(place.module), place.attribute)
        found.setdefault(key, place).names.append(name)
    return list(found.values())


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, _Place]]:
    if type(module).get_extra_state is not nn.Module.get_extra_state:
        raise ValueError(f"{prefix[:-1]!r} ({type(module).__name__}) has state that is no tensor: it cannot be stored")
    parameters, buffers = dict(module.named_parameters(recurse=False)), dict(module.named_buffers(recurse=False))
    masked = [name for name in (key.removesuffix("_mask") for key in buffers) if is_masked(module, name)]
    hidden = {f"{name}{part}" for name in masked for part in ("_orig", "_mask")} | module._non_persistent_buffers_set
    parametrized = [*getattr(module, "parametrizations", ())] if parametrize.is_parametrized(module) else []
    for attribute in dict.fromkeys((*parametrized, *masked, *parameters, *buffers)):
        if attribute not in hidden:
            place = _Place([], module, attribute)
            own = getattr(module, "weight_quantizer", None)
            if attribute == "weight" and isinstance(own, Quantizer):
                place.codes = _codes(own, place.value())
                if place.codes is not None:
                    place.quantizer = own
                    hidden.add("weight_quantizer")
            yield prefix + attribute, place
    if parametrized:
        hidden.add("parametrizations")
    for name, child in module._modules.items():
        if child is not None and name not in hidden:
            yield from _walk(child, f"{prefix}{name}.")


def _codes(own: Quantizer, weight: Tensor) -> Codes | Codebook | None:
    """What a quantizer states, scales rather than levels where it can; None of one that only computes."""
    if isinstance(own, Float):
        return None
    for state in (own.integers, own.codebook):
        try:
            return state(weight)
        except (ValueError, NotImplementedError):
            continue
    return None


def _rounded(place: _Place, floats: torch.dtype | None) -> Tensor:
    value = place.value()
    if floats is None or not value.is_floating_point():
        return value
    rounded = value.to(floats)
    if not torch.equal(rounded.isfinite(), value.isfinite()):
        raise ValueError(f"{place.names[0]!r} has values beyond the range of {floats}: choose torch.bfloat16 or None")
    return rounded


def _quantizers(places: list[_Place]) -> dict[str, str]:
    """Names of the quantizers whose codes are stored, by the name of the weight."""
    return {place.names[0]: place.quantizer.name for place in places if place.quantizer is not None}


def _compare(file: Sizes, places: list[_Place], path: str | os.PathLike[str]) -> None:
    """Check that a file holds what a model has."""
    stored = {tensor.name: tensor.shape for tensor in file.tensors}
    own = {place.names[0]: place for place in places}
    only = [f"the file lacks {_some(own.keys() - stored)}"] if own.keys() - stored else []
    only += [f"the model lacks {_some(stored.keys() - own)}"] if stored.keys() - own else []
    if only:
        raise ValueError(f"{os.fspath(path)} is of another model: {'; '.join(only)}: {_BUILD}")
    for name, place in own.items():
        # A quantizer that has learned nothing yet does not know how many scales there will be.
        waiting = isinstance(place.module, Quantizer) and not place.module.calibrated
        if stored[name] != place.value().shape and not waiting:
            raise ValueError(
                f"{os.fspath(path)} is of another model: {name!r} has shape {stored[name]} in the file but "
                f"{tuple(place.value().shape)} in the model"
            )
    quantizers = _quantizers(places)
    for name in sorted(file.metadata.keys() | quantizers):
        there, here = file.metadata.get(name, "float"), quantizers.get(name, "float")
        if there != here:
            raise ValueError(
                f"{os.fspath(path)} holds {name!r} quantized by {there!r} but the model quantizes it by {here!r}: "
                f"{_BUILD}"
            )


def _compare_types(found: Mapping[str, Stored], places: list[_Place], path: str | os.PathLike[str]) -> None:
    """Check that a file's numbers are of the model's types: the outputs would be others."""
    for place in places:
        stored, own = found[place.names[0]], place.value().dtype
        if isinstance(stored, Tensor):
            there, here = stored.dtype, own
            rounded = there in (torch.float16, torch.bfloat16) and here in (torch.float32, torch.float64)
        else:
            # Scales and levels are of float32 at least.
            there = (stored.scale if isinstance(stored, Codes) else stored.levels).dtype
            here, rounded = torch.promote_types(own, torch.float32), False
        if there != here and not rounded:
            raise ValueError(
                f"{os.fspath(path)} holds {place.names[0]!r} in {there} but the model in {here}: turn the model's "
                "numbers into those of the file, by model.to()"
            )


def _some(names: Set[str]) -> str:
    few = sorted(names)[:4]
    return ", ".join(map(repr, few)) + (f" and {len(names) - len(few)} more" if len(names) > len(few) else "")


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In eval(), where no parametrization moves its state, and without gradients."""
    require_module(model)
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
