"""From rows to conclusions: the setting chosen for each arm, intervals over seeds, paired comparisons, the verdict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit  # type: ignore[import-untyped]

from qconv.energy.units import joules
from qconv.models import ARMS, Arm
from qconv.rows import Row

QUANTUM = ("quantum", "quantum-inspired")
"""Families whose arms the comparison is about."""


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its confidence interval; half is NaN where one value gives none."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half


def t_interval(
    values: Sequence[float], *, resolution: float = 0.0, level: float = 0.95, resplit: float = 0.0
) -> Interval:
    """Student's t interval for a mean: half width t s sqrt(1/n + resplit), t of n - 1 degrees of freedom.

    Args:
        values: at least one number.
        resolution: smallest standard deviation to believe. Accuracies are whole images out of n: three equal ones
            would otherwise claim certainty.
        level: coverage, between 0 and 1.
        resplit: 0 for independent values; n_test / n_train where each value comes from a new random split of the same
            images, whose training and test parts overlap from value to value.

    Source:
        Student, The probable error of a mean, Biometrika 6 (1908). resplit: the corrected resampled t of Nadeau &
        Bengio, Inference for the generalization error, Machine Learning 52 (2003).
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan)
    deviation = max(math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)), resolution)
    return Interval(mean, float(stdtrit(n - 1, (1 + level) / 2)) * deviation * math.sqrt(1 / n + resplit))


def seeds_interval(values: Sequence[float], row: Row, *, level: float = 0.95) -> Interval:
    """Interval for the mean over seeds of test accuracies, or of their differences.

    It covers what seeds draw. With an official test part that is the training, but not the sampling of the test images;
    without one it is the split too, and the variance is Nadeau & Bengio's (see `t_interval`).

    Args:
        values: one a seed.
        row: any row of the run, for the sizes of its parts.
        level: coverage, between 0 and 1.
    """
    resplit = 0.0 if row.official_test else row.n_test / row.n_fit
    return t_interval(values, resolution=1 / row.n_test, level=level, resplit=resplit)


def signed(difference: float) -> str:
    """A difference of accuracies in percentage points with its sign: 0.0123 -> "+1.23"."""
    return f"{round(100 * difference, 2) + 0.0:+.2f}"  # + 0.0: no "-0.00"


@dataclass(frozen=True)
class Chosen:
    """An arm at the setting that its validation accuracy chose; `rows` in the order of seeds."""

    arm: Arm
    setting: tuple[float, float]
    rows: tuple[Row, ...]

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds, ascending."""
        return tuple(row.task.seed for row in self.rows)

    @property
    def val_accuracy(self) -> float:
        """Mean over seeds: what the choice was made by."""
        return math.fsum(row.val_accuracy for row in self.rows) / len(self.rows)

    @property
    def test(self) -> Interval:
        """Test accuracy, mean and 95 % interval over seeds (see `seeds_interval`)."""
        return seeds_interval([row.test_accuracy for row in self.rows], self.rows[0])


def _rank(rows: Sequence[Row]) -> tuple[float, float]:
    """Higher is better: mean validation accuracy, then lower mean validation loss (a diverged one last)."""
    loss = math.fsum(row.val_loss for row in rows) / len(rows)
    return math.fsum(row.val_accuracy for row in rows) / len(rows), -loss if math.isfinite(loss) else -math.inf


def choose_settings(rows: Iterable[Row]) -> dict[str, Chosen]:
    """For each arm the setting with the highest mean validation accuracy over seeds; ties go to the lower loss.

    Args:
        rows: finished rows of one comparison; every arm and setting with the same seeds.

    Returns:
        Arm name -> choice, in the order of `ARMS`.

    Raises:
        ValueError: there are no rows, or a setting lacks seeds that others have.
    """
    groups: dict[str, dict[tuple[float, float], list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: (row.task.setting, row.task.seed)):
        groups[row.task.arm][row.task.setting].append(row)
    if not groups:
        raise ValueError("there are no rows to compare: run `qconv compare` first")
    seeds = {row.task.seed for settings in groups.values() for group in settings.values() for row in group}
    for arm, settings in groups.items():
        for setting, group in settings.items():
            if (have := {row.task.seed for row in group}) != seeds:
                raise ValueError(
                    f"arm {arm} at lr {setting[0]:g}, slot multiplier {setting[1]:g} has seeds {sorted(have)}, but the "
                    f"run has {sorted(seeds)}: finish the run first"
                )
    chosen = {}
    for arm in sorted(groups, key=list(ARMS).index):
        setting = max(groups[arm], key=lambda s: _rank(groups[arm][s]))
        chosen[arm] = Chosen(ARMS[arm], setting, tuple(groups[arm][setting]))
    return chosen


def best(chosen: Mapping[str, Chosen], *families: str) -> Chosen | None:
    """The arm of the families with the highest validation accuracy (ties: lower loss), None where there is none."""
    return max((c for c in chosen.values() if c.arm.family in families), key=lambda c: _rank(c.rows), default=None)


@dataclass(frozen=True)
class Comparison:
    """`a` against `b`, paired by seed: difference of test accuracies a - b, as fractions.

    `interval` covers 95 % for this comparison alone, `adjusted` 95 % for all comparisons of the report together
    (Bonferroni); both are those of `seeds_interval`.
    """

    a: Chosen
    b: Chosen
    interval: Interval
    adjusted: Interval

    @property
    def outcome(self) -> str:
        """ "beat", "lost to", or "no difference shown"."""
        return _outcome(self.interval)

    @property
    def adjusted_outcome(self) -> str:
        """The same by the adjusted interval."""
        return _outcome(self.adjusted)

    def sentence(self) -> str:
        """The comparison in words, with its numbers."""
        n, seeds = self.a.rows[0].n_test, len(self.a.rows)
        a, b = (f"{c.arm.title} ({100 * c.test.mean:.2f} %)" for c in (self.a, self.b))
        costs = " against ".join(joules(c.rows[0].slot_energy) for c in (self.a, self.b))
        costs = f"the slot costs {costs} an inference (modeled)"
        difference = f"{signed(self.interval.mean)} points"
        if math.isnan(self.interval.half):
            found = f"{a} against {b}: no difference can be shown with one seed"
            return f"{found} ({difference}, no interval; {n} test images); {costs}."
        found = f"{a} {self.outcome} {b}"
        if self.outcome == "no difference shown":
            found = f"{a} against {b}: no difference shown at this size"
        bounds = f"95 % interval {signed(self.interval.low)} to {signed(self.interval.high)}"
        return f"{found}: {difference}, {bounds} ({seeds} paired seeds, {n} test images each); {costs}."


def _outcome(interval: Interval) -> str:
    if interval.low > 0:
        return "beat"
    return "lost to" if interval.high < 0 else "no difference shown"  # NaN compares false: no difference shown


def compare(a: Chosen, b: Chosen, *, comparisons: int = 1) -> Comparison:
    """Compare two arms seed by seed.

    Args:
        a: first arm.
        b: second arm, with the same seeds.
        comparisons: how many the report makes; the adjusted interval allows for all of them.

    Raises:
        ValueError: the seeds differ.
    """
    if a.seeds != b.seeds:
        raise ValueError(f"arms are compared seed by seed, but {a.arm.name} has {a.seeds} and {b.arm.name} {b.seeds}")
    differences = [x.test_accuracy - y.test_accuracy for x, y in zip(a.rows, b.rows, strict=True)]
    first = a.rows[0]
    return Comparison(
        a, b, seeds_interval(differences, first), seeds_interval(differences, first, level=1 - 0.05 / comparisons)
    )


def _rivals(of: Chosen, chosen: Mapping[str, Chosen]) -> list[Chosen]:
    """What an arm is compared with, the one of the verdict first.

    An arm that fills the slot meets the best conventional one and every control; a whole network its own controls, the
    best in validation first, and the network without its last ingredient.
    """
    if of.arm.whole:
        own = [chosen[name] for name in of.arm.controls if name in chosen]
        simpler = [c for name, c in chosen.items() if name == of.arm.simpler]
        return sorted(own, key=lambda c: _rank(c.rows), reverse=True) + simpler
    conventional = best(chosen, "conventional")
    others = [conventional] if conventional else []
    return others + [c for c in chosen.values() if c.arm.family == "control"]


def comparisons(chosen: Mapping[str, Chosen]) -> list[Comparison]:
    """Each arm of `QUANTUM`, the best in validation first, against what it is to be compared with."""
    quantum = sorted((c for c in chosen.values() if c.arm.family in QUANTUM), key=lambda c: _rank(c.rows), reverse=True)
    pairs = [(a, b) for a in quantum for b in _rivals(a, chosen)]
    return [compare(a, b, comparisons=len(pairs)) for a, b in pairs]


def verdict(chosen: Mapping[str, Chosen]) -> str:
    """One sentence: did the best quantum arm beat the best conventional one, and at what modeled energy?

    Of a whole network the best of its own controls stands for the conventional arm. Both are chosen by validation
    accuracy.
    """
    quantum = best(chosen, *QUANTUM)
    if quantum is None:
        return "No verdict: the run has no quantum arm."
    names = quantum.arm.controls
    classical = (
        best({name: chosen[name] for name in names if name in chosen}, "control")
        if quantum.arm.whole
        else best(chosen, "conventional")
    )
    if classical is None:
        missing = f"control of {quantum.arm.name} ({', '.join(names)})" if quantum.arm.whole else "conventional arm"
        return f"No verdict: the run has no {missing}."
    return compare(quantum, classical).sentence()
