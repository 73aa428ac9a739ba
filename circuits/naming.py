"""One clear error for a name that does not exist."""

from collections.abc import Iterable
from difflib import get_close_matches


def unknown(kind: str, name: object, known: Iterable[str]) -> ValueError:
    """Build the error for an unknown name, with the nearest valid one.

    Args:
        kind: What is named, for the message ("kernel", "gate").
        name: What the user wrote.
        known: The valid names.

    Returns:
        A ValueError ready to raise.
    """
    names = list(known)
    lower = {each.lower(): each for each in names}
    near = get_close_matches(name.lower(), lower, n=1, cutoff=0.5) if isinstance(name, str) else []
    hint = f"did you mean {lower[near[0]]!r}? " if near else ""
    return ValueError(f"unknown {kind} {name!r}: {hint}Valid names: {', '.join(names)}")
