"""Energies as text."""

import math

NBSP = "\N{NO-BREAK SPACE}"


def joules(value: float) -> str:
    """Energy with the prefix that leaves one to three digits before the point: "4.31 nJ"."""
    value = float(f"{value:.3g}")  # rounded first: 999.9 pJ is 1 nJ
    if value == 0:
        return f"0{NBSP}J"
    exponent = min(max(math.floor(math.log10(abs(value)) / 3), -5), 0)
    prefix = {0: "", -1: "m", -2: "µ", -3: "n", -4: "p", -5: "f"}[exponent]
    return f"{value / 1000.0**exponent:.3g}{NBSP}{prefix}J"
