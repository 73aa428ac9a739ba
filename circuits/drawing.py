"""A circuit as a drawing in text."""

from collections.abc import Sequence
from itertools import combinations
from math import isclose, pi, prod

# Plain tuples, so that this file knows no circuit type. A factor is (index, function, numbers), a term (coefficient,
# factors), an angle (source, index, scale, offset, terms of what is computed), a column (name, wires, angles).
PlainFactor = tuple[int, str, tuple[float, ...]]
PlainTerms = tuple[tuple[float, tuple[PlainFactor, ...]], ...]
PlainAngle = tuple[str, int, float, float, PlainTerms]
Column = tuple[str, tuple[int, ...], tuple[PlainAngle, ...]]

MOST_TERMS = 4  # of a sum that is written out

# Controlled gate -> what its last wire carries; the wires before it are controls.
CONTROLLED = {
    "CNOT": "X",
    "CY": "Y",
    "CZ": "Z",
    "CH": "H",
    "CRX": "RX",
    "CRY": "RY",
    "CRZ": "RZ",
    "CP": "P",
    "CRot": "Rot",
    "CU3": "U3",
    "CCX": "X",
    "CCZ": "Z",
}

# Gates that are no box alike on all of their wires: each wire says which of the gate's it is.
DIRECTED = ("RZX", "ECR")


def number(value: float) -> str:
    """A number of radians in four digits, or as a fraction of pi where it is one."""
    for divisor in (1, 2, 3, 4, 6, 8):
        multiple = value * divisor / pi
        if round(multiple) and isclose(multiple, round(multiple)):
            top = {1: "π", -1: "-π"}.get(round(multiple), f"{round(multiple)}π")
            return top if divisor == 1 else f"{top}/{divisor}"
    return f"{value:.4g}"


def angle_text(
    source: str, index: int, scale: float, offset: float, terms: PlainTerms = (), subscript: str = "{}"
) -> str:
    """An angle as drawings show it.

    Args:
        source: See Angle.
        index: See Angle.
        scale: See Angle.
        offset: See Angle.
        terms: See Feature; empty for a plain feature.
        subscript: How the index is written behind x or w, such as "_{{{}}}".
    """
    if source == "const":
        return number(offset)
    if terms:
        return _computed_text(scale, offset, terms, subscript)
    symbol = ("x" if source == "input" else "w") + subscript.format(index)
    factor = {1.0: "", -1.0: "-"}.get(scale, number(scale))
    shift = "" if offset == 0 else ("+" if offset > 0 else "") + number(offset)
    return f"{factor}{symbol}{shift}"


def _factor_text(factor: PlainFactor, subscript: str) -> str:
    index, function, numbers = factor
    name = "x" + subscript.format(index)
    if function == "x":
        return name
    if function == "step":
        return f"[{name}>{numbers[0]:.4g}]"
    if function == "bit":
        return f"bit{numbers[0]:.0f}({name})"
    return f"arccos({name}²)" if function == "arccos_square" else f"{function}({name})"


def _computed_text(scale: float, offset: float, terms: PlainTerms, subscript: str) -> str:
    centers = _centers(scale, offset, terms)
    if centers is not None:
        brackets = [
            f"({_factor_text(factor, subscript)}{'+' if center > 0 else ''}{number(center)})"
            if center
            else _factor_text(factor, subscript)
            for factor, center in centers
        ]
        top = scale * terms[0][0]
        return {1.0: "", -1.0: "-"}.get(top, number(top)) + "".join(brackets)
    parts = [(scale * c, "".join(_factor_text(f, subscript) for f in product)) for c, product in terms]
    if len(parts) > MOST_TERMS:
        used = sorted({factor[0] for _, product in terms for factor in product})
        return f"f(x{subscript.format(used[0])}..x{subscript.format(used[-1])})"
    parts += [(offset, "")] if offset else []
    texts = [({1.0: "", -1.0: "-"}.get(c, number(c)) if name else number(c)) + name for c, name in parts]
    return texts[0] + "".join(text if text.startswith("-") else f"+{text}" for text in texts[1:])


def _centers(scale: float, offset: float, terms: PlainTerms) -> list[tuple[PlainFactor, float]] | None:
    """Factors f and numbers c such that the angle is its first coefficient times prod (f + c), or None."""
    values = {frozenset(product): scale * c for c, product in terms} | {frozenset[PlainFactor](): offset}
    top, factors = scale * terms[0][0], terms[0][1]
    if len(set(factors)) < len(factors) or len(factors) > MOST_TERMS:
        return None
    whole = frozenset(factors)
    centers = {factor: values.get(whole - {factor}, 0.0) / top for factor in factors}
    for size in range(len(factors) + 1):
        for kept in combinations(factors, size):
            expected = top * prod(centers[factor] for factor in whole - set(kept))
            # Other terms than subsets of the longest one are left over.
            if not isclose(values.pop(frozenset(kept), 0.0), expected, rel_tol=1e-12, abs_tol=1e-12):
                return None
    return None if values else [(factor, centers[factor]) for factor in factors]


def _labels(column: Column) -> dict[int, str]:
    """What stands on each wire of a gate."""
    name, wires, angles = column
    inside = ",".join(angle_text(*angle) for angle in angles)
    if name == "Amplitude":
        first, last = angles[0], angles[-1]
        inside = angle_text(*first) if len(angles) == 1 else f"{angle_text(*first)}..{angle_text(*last)}"
        return dict.fromkeys(wires, f"|{inside}>")
    arguments = f"({inside})" if inside else ""
    if name in ("SWAP", "CSWAP"):
        return {wires[0]: "●"} | dict.fromkeys(wires[-2:], "x")
    if name in CONTROLLED:
        return dict.fromkeys(wires, "●") | {wires[-1]: CONTROLLED[name] + arguments}
    if name in DIRECTED:
        return {wire: f"{name}{arguments}:{k}" for k, wire in enumerate(wires)}
    return dict.fromkeys(wires, name + arguments)


def moments_of(n_wires: int, gates: Sequence[Column]) -> list[list[Column]]:
    """Gates in columns: each as far to the left as it can stand with the wires that it spans to itself."""
    free = [0] * n_wires
    moments: list[list[Column]] = []
    for gate in gates:
        low, high = min(gate[1]), max(gate[1])
        moment = max(free[low : high + 1])
        if moment == len(moments):
            moments.append([])
        moments[moment].append(gate)
        free[low : high + 1] = [moment + 1] * (high + 1 - low)
    return moments


def draw(n_wires: int, gates: Sequence[Column], observables: Sequence[str]) -> str:
    """Draw gates on wires in text.

    Args:
        n_wires: Number of wires.
        gates: The gates in the order of application.
        observables: Pauli strings read out at the end.

    Returns:
        Lines of text: a wire a line, with a line between wires for the links of two-wire gates.
    """
    prefix = [f"{wire}: ─" for wire in range(n_wires)]
    width = max(map(len, prefix))
    rows = [text.rjust(width, " ") for text in prefix]
    links = [" " * width for _ in range(n_wires)]
    for moment_gates in moments_of(n_wires, gates):
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
