"""What we want to reach, as data, and what of it a record reaches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from benchmarks.record import Record
from benchmarks.systems import Conv
from benchmarks.workloads import WORKLOADS, Mode

KERNELS = ("heisenberg", "strongly_entangling")


@dataclass(frozen=True)
class Row:
    """A ratio between us and another system, with a goal for some workloads.

    Args:
        what: In words.
        mode: What is timed.
        other: The system beside ours.
        faster: False: our seconds over the other's, at most the goal. True: the other's over ours, at least the goal.
        limits: Goal by workload.
    """

    what: str
    mode: Mode
    other: str
    faster: bool
    limits: dict[str, float]

    def verdict(self, record: Record, workload: str, kernel: str) -> "Verdict":
        """Today's ratio beside the goal, from the process in which both ran."""
        comparison = record.find(workload, None if self.other == Conv.name else self.other)
        ours = f"qconv {kernel}"
        pair = (self.other, ours) if self.faster else (ours, self.other)
        value = None if comparison is None else comparison.ratio(self.mode, *pair)
        disturbed = comparison is not None and comparison.disturbed.get(self.mode, 0) > 0
        return Verdict(self.what, workload, kernel, value, self.limits[workload], self.faster, disturbed)


ROWS = (
    Row(
        "eval forward / nn.Conv2d",
        "forward",
        Conv.name,
        False,
        {"W1": 1, "W2": 1, "W3": 15, "W4": 6, "W5": 1},
    ),
    Row(
        "training / nn.Conv2d",
        "training",
        Conv.name,
        False,
        {"W1": 1, "W2": 1, "W3": 25, "W4": 8, "W5": 1, "W6": 1.1},
    ),
    Row(
        "times faster than PennyLane, training",
        "training",
        "PennyLane",
        True,
        {"W1": 80, "W2": 150, "W3": 250, "W4": 25, "W5": 8000, "W6": 50},
    ),
    Row(
        "times faster than tensorcircuit-ng, training",
        "training",
        "tensorcircuit-ng",
        True,
        {"W1": 40, "W2": 90, "W3": 100, "W4": 15, "W5": 150, "W6": 35},
    ),
)


@dataclass(frozen=True)
class Single:
    """A goal that is one number.

    Args:
        what: In words, with its unit.
        limit: The goal.
        least: Whether the number must be at least the goal; at most otherwise.
        value: Reads it from a record; None where it was not measured.
    """

    what: str
    limit: float
    least: bool
    value: Callable[[Record], float | None]


def _peak_gigabytes(record: Record) -> float | None:
    found = record.peak("W3", "qconv strongly_entangling")
    return None if found is None else found.peak / 1e9


def _patches_a_second(record: Record) -> float | None:
    found = record.find("N25", None)
    if found is None:
        return None
    return WORKLOADS["N25"].patches / found.seconds["forward"]["qconv strongly_entangling"] / 1e3


def _first(record: Record) -> float | None:
    return None if record.start is None else record.start.first


def _later(record: Record) -> float | None:
    return None if record.start is None else record.start.later


def _without_fast(record: Record) -> float | None:
    if record.start is None:
        return None
    ratios = (record.start.without.ratio("training", f"qconv {kernel}", Conv.name) for kernel in KERNELS)
    return max(ratio for ratio in ratios if ratio is not None)


SINGLES = (
    Single("first call with the fast extra, s", 3, False, _first),
    Single("first call in later processes, s", 0.5, False, _later),
    Single("without the fast extra: W1 training / nn.Conv2d, the slower kernel", 6, False, _without_fast),
    Single("W3 training, peak memory of the process, GB", 1, False, _peak_gigabytes),
    Single("25 qubits, depth 2: thousand patches a second, forward", 60, True, _patches_a_second),
)


@dataclass(frozen=True)
class Verdict:
    """A goal and what was measured.

    Args:
        what: The goal in words.
        workload: Its workload; "" for a single number.
        kernel: Our kernel; "" for a single number.
        value: Measured; None if it was not.
        limit: The goal.
        least: Whether value must be at least the limit.
        disturbed: Whether rounds count in which something else was running.
    """

    what: str
    workload: str
    kernel: str
    value: float | None
    limit: float
    least: bool
    disturbed: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the goal is reached; None if it was not measured."""
        if self.value is None:
            return None
        return self.value >= self.limit if self.least else self.value <= self.limit

    def __str__(self) -> str:
        bound = f"{'≥' if self.least else '≤'} {self.limit:g}"
        if self.value is None:
            return f"not measured ({bound})"
        # A disturbed ratio proves nothing either way.
        mark = "?" if self.disturbed else ""
        return f"{digits(self.value)}{mark} ({bound}) {'met' if self.met else 'MISSED'}{mark}"


def verdicts(record: Record) -> Iterator[Verdict]:
    """Every goal of the workloads measured, in the order of the table, and the single numbers."""
    measured = record.workloads()
    for row in ROWS:
        for kernel in KERNELS:
            for workload in row.limits:
                if workload in measured and kernel in WORKLOADS[workload].kernels:
                    yield row.verdict(record, workload, kernel)
    for single in SINGLES:
        yield Verdict(single.what, "", "", single.value(record), single.limit, single.least)


def digits(value: float) -> str:
    """Three significant digits, with an exponent only where there are many more."""
    if value >= 1e6:
        return f"{value:.1e}"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}" if value >= 1e-4 else f"{value:.1e}"
