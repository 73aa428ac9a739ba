"""A circuit as a drawing in text."""

from collections.abc import Sequence
from itertools import combinations
from math import isclose, pi, prod
from textwrap import wrap

from circuits.options import is_whole

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
    return _sum([_times(scale, symbol), *([number(offset)] if offset else [])])


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
        return _times(scale * terms[0][0], "".join(brackets))
    parts = [(scale * c, "".join(_factor_text(f, subscript) for f in product)) for c, product in terms]
    if len(parts) > MOST_TERMS:
        used = sorted({factor[0] for _, product in terms for factor in product})
        return f"f(x{subscript.format(used[0])}..x{subscript.format(used[-1])})"
    top = parts[0][0]
    shift = [number(offset)] if offset else []
    # What is equal but for the sign is taken out.
    if len(parts) > 1 and abs(top) != 1 and all(isclose(abs(c), abs(top)) for c, _ in parts):
        return _sum([_times(top, f"({_sum([_times(round(c / top), name) for c, name in parts])})"), *shift])
    return _sum([*(_times(c, name) for c, name in parts), *shift])


def _times(factor: float, text: str) -> str:
    """A number times what stands behind it."""
    written = {1.0: "", -1.0: "-"}.get(factor, number(factor))
    # Without the dot π/4x could be read as π/(4x).
    return f"{written}·{text}" if "/" in written else written + text


def _sum(texts: Sequence[str]) -> str:
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


def draw(n_wires: int, gates: Sequence[Column], observables: Sequence[str], columns: int | None = None) -> str:
    """Draw gates on wires in text.

    Args:
        n_wires: Number of wires.
        gates: The gates in the order of application.
        observables: Pauli strings read out at the end.
        columns: Characters of a line; what is longer continues below. None for lines of any length.

    Returns:
        Lines of text: a wire a line, with a line between wires for the links of two-wire gates.

    Raises:
        ValueError: For columns that are no whole number above 0.
    """
    if columns is not None and (not is_whole(columns) or columns < 1):
        raise ValueError(f"columns of a drawing are {columns!r}: give a whole number of at least 1, or None")
    cells = [_cells(n_wires, moment) for moment in moments_of(n_wires, gates)]
    prefix = len(f"{n_wires - 1}: ─")
    parts: list[list[_Cells]] = [[]]
    used = prefix
    for each in cells:
        if columns is not None and parts[-1] and used + len(each[0][0]) > columns:
            parts.append([])
            used = prefix
        parts[-1].append(each)
        used += len(each[0][0])
    lines = "\n\n".join("\n".join(_row(n_wires, part)) for part in parts)
    return "\n".join([lines, *_reads(observables, columns)])


# What a moment adds to the line of each wire, and to the line below it.
_Cells = tuple[list[str], list[str]]


def _cells(n_wires: int, gates: Sequence[Column]) -> _Cells:
    texts = ["─"] * n_wires
    linked = [False] * n_wires
    for gate in gates:
        low, high = min(gate[1]), max(gate[1])
        labels = _labels(gate)
        for wire in range(low, high + 1):
            texts[wire] = labels.get(wire, "┼")
            linked[wire] = wire < high
    width = max(map(len, texts))
    return [text.center(width, "─") + "─" for text in texts], [
        ("│" if on else " ").center(width) + " " for on in linked
    ]


def _row(n_wires: int, moments: Sequence[_Cells]) -> list[str]:
    """Lines of some moments: a wire each and, where gates link wires, one between them."""
    prefix = [f"{wire}: ─" for wire in range(n_wires)]
    width = max(map(len, prefix))
    wires = [text.rjust(width) + "".join(cells[wire] for cells, _ in moments) for wire, text in enumerate(prefix)]
    links = [" " * width + "".join(cells[wire] for _, cells in moments) for wire in range(n_wires - 1)]
    # A link line that is empty everywhere carries nothing.
    if not any("│" in line for line in links):
        return wires
    return [
        line for wire in range(n_wires) for line in (wires[wire], *(text.rstrip() for text in links[wire : wire + 1]))
    ]


def _reads(observables: Sequence[str], columns: int | None) -> list[str]:
    if not observables:
        return []
    text = "reads " + " ".join(f"<{observable}>" for observable in observables)
    return [text] if columns is None else wrap(text, columns, break_long_words=False, break_on_hyphens=False)
