"""Quantizers by name."""

import difflib
import re
from collections.abc import Callable
from functools import partial

from classical.quantizers.affine import LSQ, IntegerActivation, IntegerWeight
from classical.quantizers.base import Float, Quantizer, Role
from classical.quantizers.binary import BNN, XNORActivation, XNORWeight
from classical.quantizers.codebooks import LQ, NAQ
from classical.quantizers.relaxed import RelaxedQuantizer
from classical.quantizers.ternary import TTQ, TWN
from classical.quantizers.uniform import HWGQ, DoReFaActivation, DoReFaWeight

Builder = Callable[[], Quantizer]
_BITS = range(2, 17)


def _learned(role: Role) -> dict[str, Builder]:
    return {
        **{f"lq{n}": partial(LQ, n, role) for n in range(1, 5)},
        **{f"lsq{n}": partial(LSQ, n, role) for n in range(2, 9)},
        **{f"rq{n}": partial(RelaxedQuantizer, n, role) for n in range(2, 9)},
        **{f"rq_st{n}": partial(RelaxedQuantizer, n, role, hard=True) for n in range(2, 9)},
    }


_BUILDERS: dict[Role, dict[str, Builder]] = {
    "weight": {
        "float": Float,
        **{f"int{n}": partial(IntegerWeight, n) for n in _BITS},
        **{f"int{n}_channel": partial(IntegerWeight, n, per_channel=True) for n in _BITS},
        **{f"int{n}_affine": partial(IntegerWeight, n, symmetric=False) for n in _BITS},
        **{f"int{n}_channel_affine": partial(IntegerWeight, n, per_channel=True, symmetric=False) for n in _BITS},
        "bnn": BNN,
        "xnor": XNORWeight,
        "twn": TWN,
        "ttq": TTQ,
        **{f"dorefa{n}": partial(DoReFaWeight, n) for n in range(1, 9)},
        **{f"naq{n}": partial(NAQ, n) for n in (3, 5, 7, 9)},
        **_learned("weight"),
    },
    "activation": {
        "float": Float,
        **{f"int{n}": partial(IntegerActivation, n) for n in _BITS},
        "bnn": BNN,
        "xnor": XNORActivation,
        **{f"dorefa{n}": partial(DoReFaActivation, n) for n in range(1, 9)},
        **{f"hwgq{n}": partial(HWGQ, n) for n in range(1, 5)},
        **_learned("activation"),
    },
}


def quantizer_names(role: Role = "weight") -> tuple[str, ...]:
    """Names that `quantizer` accepts for weights or for activations.

    Raises:
        ValueError: role is neither "weight" nor "activation".
    """
    if role not in tuple(_BUILDERS):  # among keys, a list would be a TypeError
        raise ValueError(f"role is {role!r} but must be 'weight' or 'activation'")
    return tuple(_BUILDERS[role])


def quantizer(spec: str | Quantizer, role: Role = "weight") -> Quantizer:
    """Build a quantizer from its name; a quantizer object is returned as it is, so a shared one shares its range.

    Args:
        spec: a name of `quantizer_names(role)`, or a Quantizer.
        role: "weight" or "activation".

    Raises:
        ValueError: unknown name, or a quantizer of the other role.
    """
    names = quantizer_names(role)
    if isinstance(spec, Quantizer):
        if role not in spec.roles:
            raise ValueError(f"quantizer {spec!r} is for {' and '.join(spec.roles)}, not for {role}: choose another")
        return spec
    if spec in names:
        return _BUILDERS[role][spec]()
    if isinstance(spec, str) and any(spec in table for table in _BUILDERS.values()):
        raise ValueError(f"quantizer {spec!r} is not for {role}s: choose one of {_families(names)}")
    near = difflib.get_close_matches(spec.lower(), names, n=1, cutoff=0.5) if isinstance(spec, str) else []
    hint = f"the nearest name is {near[0]!r}. " if near else ""
    raise ValueError(f"unknown {role} quantizer {spec!r}: {hint}Valid names: {_families(names)}")


def _families(names: tuple[str, ...]) -> str:
    """The names, those of consecutive numbers only as the first and the last of them: int2 ... int16."""
    families: dict[str, dict[int, str]] = {}
    for name in names:
        family, number = re.sub(r"\d+", "", name), re.search(r"\d+", name)
        families.setdefault(family, {})[int(number[0]) if number else 0] = name
    shown: list[str] = []
    for group in families.values():
        several = 1 < len(group) == max(group) - min(group) + 1
        shown += [f"{group[min(group)]} ... {group[max(group)]}"] if several else group.values()
    return ", ".join(shown)
