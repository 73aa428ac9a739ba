"""Pictures of diagnostics: fidelities against Haar, gradient variances over wires, the Fourier spectrum."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qconv.diagnostics.expressibility import Expressibility
from qconv.diagnostics.gradients import Plateau
from qconv.diagnostics.spectrum import FourierSpectrum
from qconv.figures import FAMILIES

_INK, _FAINT = "#333333", "#dddddd"
_QUANTUM, _REFERENCE = FAMILIES["quantum"][0], FAMILIES["conventional"][0]
_MARKERS = "osD^vP*X"


def _axes(title: str, across: str, upward: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 4.0), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10, color=_INK)
    axes.set_xlabel(across, color=_INK)
    axes.set_ylabel(upward, color=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(_INK)
    axes.tick_params(which="both", colors=_INK)
    axes.grid(True, color=_FAINT, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def draw_fidelities(found: Expressibility, name: str = "kernel") -> Figure:
    """The histogram of fidelities, and that of Haar-random states."""
    bins = len(found.histogram)
    title = (
        f"Expressibility of {name}: {found.corrected:.3g} nats ({found.low:.3g} to {found.high:.3g})\n"
        f"{found.pairs:,} pairs of states of {found.wires} wires, {bins} bins"
    )
    figure, axes = _axes(title, "fidelity of two states", "probability of a bin")
    edges = np.arange(bins + 1) / bins
    axes.stairs(found.histogram, edges, fill=True, color=_QUANTUM, alpha=0.55, label=name)
    axes.stairs(found.haar, edges, color=_REFERENCE, linewidth=1.8, label="Haar-random states")
    axes.set_yscale("log")
    # What a thousandth of a pair stands for is nothing that could be seen.
    axes.set_ylim(0.3 / found.pairs, 1.5)
    axes.set_xlim(0, 1)
    axes.legend(frameon=False, labelcolor=_INK)
    return figure


def draw_plateau(found: Plateau, name: str = "kernel") -> Figure:
    """Gradient variances over wires with their intervals, a line a depth."""
    figure, axes = _axes(f"Gradient variance of {name}, {found.cost} cost", "wires", "mean variance of a derivative")
    count = len(found.depths)
    for k, (row, slope) in enumerate(zip(found.points, found.slopes, strict=True)):
        values = np.array([point.value for point in row])
        ends = np.array([[point.low, point.high] for point in row]).T
        label = f"depth {slope.depth}: × 2^{slope.value:.2f} a wire ({slope.low:.2f} to {slope.high:.2f})"
        shade = 0.35 + 0.65 * (k + 1) / count
        # A percentile interval may leave out the value itself where samples are few.
        axes.errorbar(
            found.wires,
            values,
            np.abs(ends - values),
            marker=_MARKERS[k % len(_MARKERS)],
            markersize=5,
            linewidth=1.2,
            capsize=2,
            color=_QUANTUM,
            alpha=shade,
            label=label,
        )
    axes.set_yscale("log", base=2)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
    return figure


def draw_spectrum(found: FourierSpectrum, name: str = "kernel") -> Figure:
    """Power of every frequency by how many inputs it has: a point each, and their sum as a bar."""
    title = (
        f"Fourier spectrum of {name}: {found.present()} of {found.accessible()} frequencies\n"
        f"{found.samples} set{'s' if found.samples > 1 else ''} of weights, mean over outputs"
    )
    figure, axes = _axes(title, "total frequency Σ|k|", "power |c|²")
    sums = found.by_degree()
    axes.bar(np.arange(len(sums)), sums, width=0.7, color=_QUANTUM, alpha=0.35, label="all waves of this frequency")
    powers = found.power.ravel()
    seen = powers > 1e-20
    degrees, powers = found.degrees.ravel()[seen], powers[seen]
    # Spread evenly, so that equal ones can be counted.
    places = degrees.astype(float)
    for degree in np.unique(degrees):
        chosen = degrees == degree
        places[chosen] += np.linspace(-0.3, 0.3, int(chosen.sum())) if chosen.sum() > 1 else 0.0
    axes.plot(places, powers, ".", color=_REFERENCE, markersize=4, label="one wave")
    axes.set_yscale("log")
    largest = max(float(sums.max()), 1e-20)
    axes.set_ylim(max(float(powers.min(initial=largest)) / 3, largest * 1e-8), largest * 3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
    return figure
