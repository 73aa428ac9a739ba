"""A circuit as a figure for a paper, drawn with matplotlib (imported inside the functions)."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import inf
from numbers import Real
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from circuits.drawing import CONTROLLED, DIRECTED, Column, PlainAngle, angle_text, moments_of
from circuits.gates import AMPLITUDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lengths are inches, sizes of letters points.
WIRE_DISTANCE = 0.5
BOX_HEIGHT = 0.36
PADDING = 0.06
GAP = 0.12
LABEL_WIDTH = 0.42
MARGIN = 0.12
NAME_SIZE = 10.0
ANGLE_SIZE = 9.0

# Features blue, weights vermilion: the pair of Okabe & Ito's colors that all eyes and gray printers tell apart best.
COLORS = {"input": "#0072b2", "weight": "#d55e00", "const": "#404040"}
TINTS = {"input": "#e3f0f8", "weight": "#fcebdd", "const": "#f4f4f4", "readout": "#e6f4ea"}

_NAMES = {
    "Sdg": r"$S^\dagger$",
    "Tdg": r"$T^\dagger$",
    "SX": r"$\sqrt{X}$",
    "SXdg": r"$\sqrt{X}^\dagger$",
    "U3": r"$U_3$",
    "SQSWAP": r"$\sqrt{\mathrm{SWAP}}$",
    "SQSWAPdg": r"$\sqrt{\mathrm{SWAP}}^\dagger$",
    "ISWAP": r"$i\mathrm{SWAP}$",
    "ISWAPdg": r"$i\mathrm{SWAP}^\dagger$",
    AMPLITUDE: r"$|x\rangle$",
}
_SYMMETRIC_DOTS = ("CZ", "CCZ")


@dataclass(frozen=True)
class _Text:
    text: str
    color: str
    size: float

    @property
    def width(self) -> float:
        return _text_width(self.text, self.size)


@lru_cache(maxsize=4096)
def _text_width(text: str, size: float) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    path = TextPath((0, 0), text, size=size, prop=FontProperties(math_fontfamily="cm"))
    return float(path.get_extents().width) / 72 + 0.02


def _gate_name(name: str) -> str:
    if name in _NAMES:
        return _NAMES[name]
    if name.startswith("R") and set(name[1:]) <= set("XYZ"):
        return f"$R_{{{name[1:]}}}$"
    return f"${name}$" if len(name) == 1 else rf"$\mathrm{{{name}}}$"


# Words of drawings in text -> in mathtext.
_IN_MATH = {
    "π": r"\pi ",
    "arc": r"\mathrm{arc}",
    "sin(": r"\sin(",
    "cos(": r"\cos(",
    "²": "^2",
    "..": r"\ldots ",
    "·": r"\cdot ",
}
_IN_MATH |= {"bit": r"\mathrm{bit}_"}


def _angle_texts(angles: Sequence[PlainAngle]) -> list[_Text]:
    """Angles with commas between them, each in the color of its source."""
    texts: list[_Text] = []
    for k, angle in enumerate(angles):
        words = angle_text(*angle, subscript="_{{{}}}")
        for word, written in _IN_MATH.items():
            words = words.replace(word, written)
        comma = "," if k < len(angles) - 1 else ""
        texts.append(_Text(f"${words}{comma}$", COLORS[angle[0]], ANGLE_SIZE))
    return texts


def _labels(column: Column) -> tuple[str, list[_Text]]:
    """What stands in the box of a gate: its name, and its angles."""
    name, _, angles = column
    if name == AMPLITUDE:
        first, last = _angle_texts([angles[0]]), _angle_texts([angles[-1]])
        dots = [_Text(r"$\ldots$", COLORS[angles[0][0]], ANGLE_SIZE)]
        return _gate_name(name), first if len(angles) == 1 else [*first, *dots, *last]
    return _gate_name(CONTROLLED.get(name, name)), _angle_texts(angles)


def _width(column: Column) -> float:
    """Inches that a gate takes."""
    name = column[0]
    if name in ("CNOT", "CCX", "SWAP", "CSWAP", *_SYMMETRIC_DOTS):
        return 0.26
    title, angles = _labels(column)
    inner = max(_text_width(title, NAME_SIZE), sum(text.width for text in angles))
    return max(BOX_HEIGHT, inner + 2 * PADDING + (0.16 if name in DIRECTED else 0.0))


def _tint(column: Column) -> str:
    sources = {angle[0] for angle in column[2]}
    return TINTS["weight" if "weight" in sources else "input" if "input" in sources else "const"]


def _readouts(n_wires: int, observables: Sequence[str]) -> tuple[dict[int, list[str]], list[str]]:
    """Letters read on single wires, and the observables on several wires as mathematics."""
    single: dict[int, list[str]] = {}
    several = []
    for text in observables:
        letters = [(letter, wire) for wire, letter in enumerate(text) if letter != "I"]
        if len(letters) == 1:
            single.setdefault(letters[0][1], []).append(letters[0][0])
        else:
            several.append(r"$\langle " + "".join(f"{letter}_{{{wire}}}" for letter, wire in letters) + r"\rangle$")
    return single, several


class _Canvas:
    """Wires, boxes and links on axes whose unit is an inch."""

    def __init__(self, axes: Axes) -> None:
        self._axes = axes

    def line(self, x: Sequence[float], y: Sequence[float], order: int, width: float = 0.9) -> None:
        self._axes.plot(x, y, color="black", linewidth=width, zorder=order, solid_capstyle="butt")

    def text(self, x: float, y: float, text: _Text, **options: Any) -> None:
        options = {"ha": "center", "va": "center", "zorder": 5, "math_fontfamily": "cm", **options}
        self._axes.text(x, y, text.text, color=text.color, fontsize=text.size, **options)

    def box(self, x: float, top: float, bottom: float, width: float, tint: str) -> None:
        from matplotlib.patches import Rectangle

        corner = (x - width / 2, bottom - BOX_HEIGHT / 2)
        size = (width, top - bottom + BOX_HEIGHT)
        self._axes.add_patch(Rectangle(corner, *size, facecolor=tint, edgecolor="black", linewidth=0.8, zorder=4))

    def dot(self, x: float, y: float) -> None:
        from matplotlib.patches import Circle

        self._axes.add_patch(Circle((x, y), 0.045, facecolor="black", edgecolor="black", zorder=4))

    def target(self, x: float, y: float) -> None:
        from matplotlib.patches import Circle

        radius = 0.1
        self._axes.add_patch(Circle((x, y), radius, facecolor="white", edgecolor="black", linewidth=0.9, zorder=4))
        self.line([x - radius, x + radius], [y, y], 5)
        self.line([x, x], [y - radius, y + radius], 5)

    def cross(self, x: float, y: float) -> None:
        arm = 0.06
        self.line([x - arm, x + arm], [y - arm, y + arm], 4, 1.3)
        self.line([x - arm, x + arm], [y + arm, y - arm], 4, 1.3)

    def labels(self, x: float, y: float, title: str, angles: list[_Text]) -> None:
        """A gate's name with its angles below."""
        self.text(x, y + (0.075 if angles else 0.0), _Text(title, "black", NAME_SIZE))
        left = x - sum(text.width for text in angles) / 2
        for text in angles:
            self.text(left, y - 0.095, text, ha="left")
            left += text.width

    def gate(self, column: Column, x: float, ys: Sequence[float]) -> None:
        """A gate at x; ys are the heights of all wires of the row."""
        name, wires, _ = column
        heights = [ys[wire] for wire in wires]
        high, low = max(heights), min(heights)
        title, angles = _labels(column)
        width, tint = _width(column), _tint(column)
        if len(wires) > 1:
            self.line([x, x], [low, high], 3)
        if name in ("SWAP", "CSWAP"):
            for y in heights[:-2]:
                self.dot(x, y)
            for y in heights[-2:]:
                self.cross(x, y)
        elif name in _SYMMETRIC_DOTS:
            for y in heights:
                self.dot(x, y)
        elif name in CONTROLLED:
            for y in heights[:-1]:
                self.dot(x, y)
            if CONTROLLED[name] == "X":
                self.target(x, heights[-1])
            else:
                self.box(x, heights[-1], heights[-1], width, tint)
                self.labels(x, heights[-1], title, angles)
        elif max(wires) - min(wires) == len(wires) - 1:
            self.box(x, high, low, width, tint)
            self.labels(x, (high + low) / 2, title, angles)
            self._directions(name, x - width / 2, heights)
        else:
            for y in heights:
                self.box(x, y, y, width, tint)
                self.labels(x, y, title, angles)
            self._directions(name, x - width / 2, heights)

    def _directions(self, name: str, left: float, heights: Sequence[float]) -> None:
        if name in DIRECTED:
            for k, y in enumerate(heights):
                self.text(left + 0.07, y, _Text(str(k), COLORS["const"], 6.5))


def _rows(moments: list[list[Column]], room: float) -> Iterator[list[tuple[list[Column], float]]]:
    """Moments with their widths, as many a row as it has room for and at least one."""
    row: list[tuple[list[Column], float]] = []
    used = 0.0
    for moment in moments:
        width = max(map(_width, moment)) + GAP
        if row and used + width > room:
            yield row
            row, used = [], 0.0
        row.append((moment, width))
        used += width
    yield row


def figure(n_wires: int, gates: Sequence[Column], observables: Sequence[str], width: float = 10.0) -> Figure:
    """Draw gates on wires as a matplotlib Figure.

    Boxes that depend on a weight are tinted vermilion, those that depend on features alone blue, and angles carry the
    color of their source. Readouts of one wire stand at its end, the others below.

    Args:
        n_wires: Number of wires.
        gates: The gates in the order of application.
        observables: Pauli strings read out at the end.
        width: Of the figure in inches, at most; a longer circuit continues in a next row.

    Raises:
        ValueError: For a width that is no positive number.
    """
    from matplotlib.figure import Figure as MplFigure

    if not isinstance(width, Real) or not 0 < width < inf:
        raise ValueError(f"width of a drawing is {width!r} inches: it must be a positive number")
    single, several = _readouts(n_wires, observables)
    boxes = {
        wire: _Text("$" + ",".join(rf"\langle {letter}\rangle" for letter in letters) + "$", "black", NAME_SIZE)
        for wire, letters in single.items()
    }
    end_width = max([text.width + 2 * PADDING for text in boxes.values()], default=0.0)
    room = width - 2 * MARGIN - LABEL_WIDTH - end_width - GAP
    rows = list(_rows(moments_of(n_wires, gates), room))
    lengths = [sum(own for _, own in row) + GAP for row in rows]
    total = 2 * MARGIN + LABEL_WIDTH + max([*lengths[:-1], lengths[-1] + end_width])
    below = wrap(", ".join(text.replace(" ", "~") for text in several), max(20, int(total * 22)))
    row_height = (n_wires - 1) * WIRE_DISTANCE + BOX_HEIGHT
    height = 2 * MARGIN + len(rows) * row_height + (len(rows) - 1) * 0.3 + 0.25 * len(below)

    result = MplFigure(figsize=(total, height))
    axes = result.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, total)
    axes.set_ylim(0, height)
    axes.axis("off")
    canvas = _Canvas(axes)
    top = height - MARGIN - BOX_HEIGHT / 2
    for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        ys = [top - wire * WIRE_DISTANCE for wire in range(n_wires)]
        left = MARGIN + LABEL_WIDTH
        for wire, y in enumerate(ys):
            label = rf"${wire}\;|0\rangle$" if number == 0 else f"${wire}$"
            canvas.text(left - 0.06, y, _Text(label, "black", NAME_SIZE), ha="right")
            canvas.line([left, left + length], [y, y], 2)
        x = left + GAP / 2
        for moment, own in row:
            for column in moment:
                canvas.gate(column, x + own / 2, ys)
            x += own
        if number == len(rows) - 1:
            for wire, text in boxes.items():
                canvas.box(left + length + end_width / 2, ys[wire], ys[wire], end_width, TINTS["readout"])
                canvas.text(left + length + end_width / 2, ys[wire], text)
        top -= row_height + 0.3
    for k, line in enumerate(below):
        words = _Text(("reads " if k == 0 else "") + line.replace("~", " "), "black", NAME_SIZE)
        canvas.text(MARGIN + LABEL_WIDTH - 0.06, MARGIN + 0.1 + 0.25 * (len(below) - 1 - k), words, ha="left")
    return result


def svg(n_wires: int, gates: Sequence[Column], observables: Sequence[str], width: float = 10.0) -> str:
    """The text of `figure` as SVG, the same for the same circuit."""
    from matplotlib import rc_context

    text = io.StringIO()
    with rc_context({"svg.hashsalt": "qconv"}):
        figure(n_wires, gates, observables, width).savefig(text, format="svg", metadata={"Date": None})
    whole = text.getvalue()
    return whole[whole.index("<svg") :]
