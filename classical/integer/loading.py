"""Compiled loops where numba is installed."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal

Kernels = Literal["auto", "numba", "torch"]


def load_kernels(choice: Kernels) -> Any:
    """The module of compiled loops, or None where torch is to run.

    Args:
        choice: "auto" for the loops if numba is installed, "numba" for them in any case, "torch" for none.

    Raises:
        ValueError: another choice.
        ImportError: "numba" where it is not installed.
    """
    if choice not in ("auto", "numba", "torch"):
        raise ValueError(f"kernels is {choice!r} but must be 'auto', 'numba' or 'torch'")
    if choice == "torch" or (choice == "auto" and find_spec("numba") is None):
        return None
    try:
        return import_module("classical.integer.kernels")
    except ImportError as error:
        raise ImportError(
            "kernels='numba' needs numba, which is not installed: pip install 'qconv[integer]'; "
            "kernels='torch' gives the same results without"
        ) from error
