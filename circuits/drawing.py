"""A circuit as a drawing in text."""

from collections.abc import Sequence
from math import isclose, pi

# (name, wires, angles as (source, index, scale, offset)): plain tuples, so that this file knows no circuit type.
Column = tuple[str, tuple[int, ...], tuple[tuple[str, int, float, float], ...]]

_CONTROLLED = {"CNOT": "X", "CY": "Y", "CZ": "Z", "CRX": "RX", "CRY": "RY", "CRZ": "RZ", "CP": "P"}


def _number(value: float) -> str:
    for divisor in (1, 2, 3, 4, 6, 8):
        multiple = value * divisor / pi
        if value and isclose(multiple, round(multiple), abs_tol=1e-12):
            top = {1: "π", -1: "-π"}.get(round(multiple), f"{round(multiple)}π")
            return top if divisor == 1 else f"{top}/{divisor}"
    return f"{value:.4g}"


def _angle(source: str, index: int, scale: float, offset: float) -> str:
    if source == "const":
        return _number(offset)
    symbol = f"{'x' if source == 'input' else 'w'}{index}"
    factor = {1.0: "", -1.0: "-"}.get(scale, _number(scale))
    shift = "" if offset == 0 else ("+" if offset > 0 else "") + _number(offset)
    return f"{factor}{symbol}{shift}"


def _labels(column: Column) -> dict[int, str]:
    """What stands on each wire of a gate."""
    name, wires, angles = column
    inside = ",".join(_angle(*angle) for angle in angles)
    if name == "Amplitude":
        first, last = angles[0], angles[-1]
        inside = _angle(*first) if len(angles) == 1 else f"{_angle(*first)}..{_angle(*last)}"
        return dict.fromkeys(wires, f"|{inside}>")
    arguments = f"({inside})" if inside else ""
    if name == "SWAP":
        return dict.fromkeys(wires, "x")
    if name in _CONTROLLED:
        return {wires[0]: "●", wires[1]: _CONTROLLED[name] + arguments}
    return dict.fromkeys(wires, name + arguments)


def draw(n_wires: int, gates: Sequence[Column], observables: Sequence[str]) -> str:
    """Draw gates on wires, each as far to the left as it can stand.

    Args:
        n_wires: Number of wires.
        gates: The gates in the order of application.
        observables: Pauli strings read out at the end.

    Returns:
        Lines of text: a wire a line, with a line between wires for the links of two-wire gates.
    """
    free = [0] * n_wires
    moments: list[list[Column]] = []
    for gate in gates:
        low, high = min(gate[1]), max(gate[1])
        moment = max(free[low : high + 1])
        if moment == len(moments):
            moments.append([])
        moments[moment].append(gate)
        free[low : high + 1] = [moment + 1] * (high + 1 - low)

    prefix = [f"{wire}: ─" for wire in range(n_wires)]
    width = max(map(len, prefix))
    rows = [text.rjust(width, " ") for text in prefix]
    links = [" " * width for _ in range(n_wires)]
    for moment_gates in moments:
        cells = ["─"] * n_wires
        linked = [False] * n_wires
        for gate in moment_gates:
            low, high = min(gate[1]), max(gate[1])
            for wire in range(low, high + 1):
                cells[wire] = _labels(gate).get(wire, "┼")
                linked[wire] = wire < high
        cell_width = max(map(len, cells))
        for wire in range(n_wires):
            rows[wire] += cells[wire].center(cell_width, "─") + "─"
            links[wire] += ("│" if linked[wire] else " ").center(cell_width) + " "
    lines: list[str] = []
    for wire in range(n_wires):
        lines.append(rows[wire])
        if wire < n_wires - 1:
            lines.append(links[wire].rstrip())
    # A link line that is empty everywhere carries nothing.
    if not any("│" in line for line in lines):
        lines = rows
    if observables:
        lines.append("reads " + " ".join(f"<{observable}>" for observable in observables))
    return "\n".join(lines)
