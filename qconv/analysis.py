"""From rows to conclusions: the setting chosen for each arm, intervals over seeds, paired comparisons, the verdict."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit  # type: ignore[import-untyped]

from qconv.models import ARMS, Arm
from qconv.rows import Row


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


def t_interval(values: Sequence[float], *, resolution: float = 0.0, level: float = 0.95) -> Interval:
    """Student's t interval for the mean of independent values.

    Args:
        values: at least one number.
        resolution: smallest standard deviation to believe. Accuracies are whole images out of n: three equal ones
            would otherwise claim certainty.
        level: coverage, between 0 and 1.

    Source:
        Student, The probable error of a mean, Biometrika 6 (1908).
    """
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, math.nan)
    deviation = max(math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1)), resolution)
    return Interval(mean, float(stdtrit(n - 1, (1 + level) / 2)) * deviation / math.sqrt(n))


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
        """Test accuracy, mean and 95 % interval over seeds."""
        return t_interval([row.test_accuracy for row in self.rows], resolution=1 / self.rows[0].n_test)


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


def best(chosen: Mapping[str, Chosen], family: str) -> Chosen | None:
    """The arm of `family` with the highest validation accuracy (ties: lower loss), None where there is none."""
    return max((c for c in chosen.values() if c.arm.family == family), key=lambda c: _rank(c.rows), default=None)


@dataclass(frozen=True)
class Comparison:
    """`a` against `b`, paired by seed: difference of test accuracies a - b, as fractions.

    `interval` covers 95 % for this comparison alone, `adjusted` 95 % for all comparisons of the report together
    (Bonferroni).
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
        size = f"{seeds} paired seed{'s' * (seeds > 1)}, {n} test images each"
        difference = f"{signed(self.interval.mean)} points"
        names = (
            f"{self.a.arm.title} ({100 * self.a.test.mean:.2f} %)",
            f"{self.b.arm.title} ({100 * self.b.test.mean:.2f} %)",
        )
        if math.isnan(self.interval.half):
            return (
                f"{names[0]} against {names[1]}: no difference can be shown with one seed "
                f"({difference}, no interval; {n} test images)."
            )
        bounds = f"95 % interval {signed(self.interval.low)} to {signed(self.interval.high)}"
        if self.outcome == "no difference shown":
            return f"{names[0]} against {names[1]}: no difference shown at this size: {difference}, {bounds} ({size})."
        return f"{names[0]} {self.outcome} {names[1]}: {difference}, {bounds} ({size})."


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
    resolution = 1 / a.rows[0].n_test
    return Comparison(
        a,
        b,
        t_interval(differences, resolution=resolution),
        t_interval(differences, resolution=resolution, level=1 - 0.05 / comparisons),
    )


def comparisons(chosen: Mapping[str, Chosen]) -> list[Comparison]:
    """Each quantum arm against the best conventional arm and against every control; the verdict's first."""
    quantum = sorted(
        (c for c in chosen.values() if c.arm.family == "quantum"), key=lambda c: _rank(c.rows), reverse=True
    )
    conventional = best(chosen, "conventional")
    others = [conventional] if conventional else []
    others += [c for c in chosen.values() if c.arm.family == "control"]
    pairs = [(a, b) for a in quantum for b in others]
    return [compare(a, b, comparisons=len(pairs)) for a, b in pairs]


def verdict(chosen: Mapping[str, Chosen]) -> str:
    """One sentence: did the best quantum arm beat the best conventional one (both chosen by validation accuracy)?"""
    quantum, conventional = best(chosen, "quantum"), best(chosen, "conventional")
    if quantum is None or conventional is None:
        return f"No verdict: the run has no {'quantum' if quantum is None else 'conventional'} arm."
    return compare(quantum, conventional).sentence()
