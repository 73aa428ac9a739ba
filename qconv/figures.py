"""Pictures of a report: accuracy against energy, and small images. They take the page's colors, light or dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import EngFormatter, NullFormatter
from numpy.typing import NDArray

# Family -> color, and a marker for each of its arms: told apart in gray print too, legible on white and on near-black.
FAMILIES = {
    "conventional": ("#d9772b", "sD^v<>"),
    "quantum": ("#7a5cf0", "opdH8h"),
    "quantum-inspired": ("#c2458f", "opdH8h"),
    "control": ("#2a9183", "XP*hv^"),
}
_SIDE_BY_SIDE = 1.06  # ratio of drawn energies between arms of (nearly) the same energy


@dataclass(frozen=True)
class Point:
    """One arm in the picture: energies in J, accuracies as fractions; accuracy_half may be NaN (no interval)."""

    label: str
    family: str
    energy: float
    energy_low: float
    energy_high: float
    accuracy: float
    accuracy_half: float


def _drawn_energies(points: Sequence[Point]) -> list[float]:
    """Energies moved apart where they nearly coincide, so that no arm hides another; a group keeps its center."""
    order = sorted(range(len(points)), key=lambda i: points[i].energy)
    groups: list[list[int]] = []
    for i in order:
        if groups and points[i].energy < points[groups[-1][-1]].energy * _SIDE_BY_SIDE:
            groups[-1].append(i)
        else:
            groups.append([i])
    drawn = [point.energy for point in points]
    for group in groups:
        center = float(np.exp(np.mean([np.log(points[i].energy) for i in group])))
        for rank, i in enumerate(sorted(group)):
            drawn[i] = center * _SIDE_BY_SIDE ** (rank - (len(group) - 1) / 2)
    return drawn


def _accuracy_against_energy(points: Sequence[Point], ink: str, faint: str) -> Figure:
    """Scatter with error bars both ways, energy on a logarithmic axis, the legend on the right."""
    figure = Figure(figsize=(9.6, 4.8))
    axes = figure.add_axes((0.065, 0.12, 0.60, 0.85))
    used = dict.fromkeys(FAMILIES, 0)
    for point, energy in zip(points, _drawn_energies(points), strict=True):
        color, markers = FAMILIES[point.family]
        marker = markers[used[point.family] % len(markers)]
        used[point.family] += 1
        accuracy, half = 100 * point.accuracy, 100 * np.nan_to_num(point.accuracy_half)
        low, high = max(accuracy - half, 0), min(accuracy + half, 100)  # no accuracy lies outside
        axes.plot([point.energy_low, point.energy_high], [accuracy] * 2, color=color, linewidth=0.9, alpha=0.45)
        axes.plot([energy] * 2, [low, high], color=color, linewidth=1.3, alpha=0.8)
        axes.plot(energy, accuracy, marker, color=color, markersize=7.5, label=point.label)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(unit="J", sep="\N{NO-BREAK SPACE}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("modeled energy of the slot, one inference")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(True, color=faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(ink)
    axes.tick_params(which="both", colors=ink)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(ink)
    axes.legend(loc="center left", bbox_to_anchor=(1.03, 0.5), frameon=False, labelcolor=ink, labelspacing=0.9)
    return figure


def accuracy_svg(points: Sequence[Point]) -> str:
    """The picture as inline SVG, whose text and axes take the CSS variables --ink and --faint of the page."""
    ink, faint = "#010203", "#040506"  # stand-ins: matplotlib knows no CSS variables
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "qconv"}):
        _accuracy_against_energy(points, ink, faint).savefig(
            buffer, format="svg", transparent=True, metadata={"Date": None}
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]  # a page holds no XML declaration
    return svg.replace(ink, "var(--ink)").replace(faint, "var(--faint)")


def accuracy_png(points: Sequence[Point]) -> bytes:
    """The picture as PNG on white."""
    buffer = io.BytesIO()
    _accuracy_against_energy(points, "#333333", "#dddddd").savefig(buffer, format="png", dpi=160, facecolor="white")
    return buffer.getvalue()


def image_uri(pixels: NDArray[np.float32], low: float, high: float, cmap: str | Colormap = "gray") -> str:
    """A data URI of one image, one PNG pixel a value.

    Args:
        pixels: (height, width).
        low: value of the map's first color.
        high: value of its last color, above `low`.
        cmap: a matplotlib colormap.
    """
    buffer = io.BytesIO()
    imsave(buffer, pixels, vmin=low, vmax=high, cmap=cmap, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def symmetric_limit(maps: Iterable[NDArray[np.float32]]) -> float:
    """Largest absolute value over `maps`, at least 1e-6: the limit of a color scale with zero in its middle."""
    return max((float(np.abs(m).max()) for m in maps), default=0.0) or 1e-6
