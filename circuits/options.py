"""Options of builders: what each takes stands at its parameter, and is checked before anything is built."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter, signature
from math import inf
from numbers import Integral, Real

import numpy as np

from circuits.naming import unknown


@dataclass(frozen=True)
class Option:
    """What a keyword of a builder takes, as metadata of its annotation.

    Args:
        takes: In words, such as "a whole number of at least 1: rotations a layer".
        valid: Whether a value is one.
        names: The valid names, where a text is one of them.
    """

    takes: str
    valid: Callable[[object], bool]
    names: tuple[str, ...] = ()


def is_flag(value: object) -> bool:
    """Whether a value is True or False; texts and numbers are not."""
    return isinstance(value, bool | np.bool_)


def is_whole(value: object) -> bool:
    """Whether a value is a whole number."""
    return isinstance(value, Integral) and not is_flag(value)


def flag(meaning: str) -> Option:
    """True or False."""
    return Option(f"true or false: {meaning}", is_flag)


def one_of(names: Iterable[str], meaning: str) -> Option:
    """A name."""
    known = tuple(names)
    return Option(f"{', '.join(known)}: {meaning}", lambda value: isinstance(value, str) and value in known, known)


def whole_number(least: int, meaning: str) -> Option:
    """A whole number of at least `least`."""
    takes = f"a whole number of at least {least}: {meaning}"
    return Option(takes, lambda value: is_whole(value) and value >= least)  # type: ignore[operator]


def number(meaning: str, valid: Callable[[float], bool] = lambda value: -inf < value < inf) -> Option:
    """A finite real number, or one of which `valid` holds; `meaning` says which."""
    return Option(meaning, lambda value: isinstance(value, Real) and not is_flag(value) and valid(float(value)))


def is_list(value: object, each: Callable[[object], bool]) -> bool:
    """Whether a value is a list or tuple of such elements."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(each(part) for part in value)


def optional(option: Option, otherwise: str) -> Option:
    """The option, or None for what `otherwise` says."""
    return Option(f"{option.takes}; none for {otherwise}", lambda value: value is None or option.valid(value))


def _parameters(build: Callable[..., object]) -> dict[str, Parameter]:
    return {p.name: p for p in signature(build).parameters.values() if p.kind is Parameter.KEYWORD_ONLY}


def _option(parameter: Parameter) -> Option:
    found: Option = parameter.annotation.__metadata__[0]
    return found


def option_defaults(build: Callable[..., object]) -> dict[str, object]:
    """Options of a builder with their defaults."""
    return {name: parameter.default for name, parameter in _parameters(build).items()}


def option_values(build: Callable[..., object]) -> dict[str, str]:
    """Options of a builder, and what each takes, in words."""
    return {name: _option(parameter).takes for name, parameter in _parameters(build).items()}


def check_options(what: str, build: Callable[..., object], options: Mapping[str, object]) -> None:
    """Raise a ValueError for an option that the builder does not have, or a value that it does not take.

    Args:
        what: The builder, for the message ("kernel 'ttn'").
        build: Its keyword-only parameters are annotated with an Option.
        options: By name.
    """
    known = _parameters(build)
    for name, value in options.items():
        if name not in known:
            raise unknown(f"option of {what}", name, known)
        option = _option(known[name])
        if option.valid(value):
            continue
        if option.names and isinstance(value, str):
            raise unknown(name, value, option.names)
        raise ValueError(f"{what} was given {name} {value!r}: give {option.takes}")
