"""Report: what each step did to which layers, and what it left alone and why."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """One thing done, or not done.

    Attributes:
        step: "fold", "clip", "equalize", "absorb", "correct", "range", ...
        layers: what it concerns, "conv1 -> conv2" for a pair.
        done: whether it was done.
        note: what came out, or the reason why it was not done.
    """

    step: str
    layers: str
    done: bool
    note: str


@dataclass(frozen=True)
class Report:
    """The entries of one or several steps, in order; + joins reports, str() is a table."""

    entries: tuple[Entry, ...] = ()

    def __add__(self, other: "Report") -> "Report":
        return Report(self.entries + other.entries)

    @property
    def done(self) -> tuple[Entry, ...]:
        """What was done."""
        return tuple(entry for entry in self.entries if entry.done)

    @property
    def skipped(self) -> tuple[Entry, ...]:
        """What was found and left alone."""
        return tuple(entry for entry in self.entries if not entry.done)

    def __str__(self) -> str:
        rows = [("step", "layers", "", "")]
        rows += [(e.step, e.layers, "done" if e.done else "skipped", e.note) for e in self.entries]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join(lines)


def names(layers: tuple[str, ...]) -> str:
    """A few names in full, many by the first, the last and how many there are."""
    return ", ".join(layers) if len(layers) < 4 else f"{layers[0]}, ..., {layers[-1]} ({len(layers)})"
