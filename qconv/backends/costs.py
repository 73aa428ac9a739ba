"""What an exact evaluation costs: the one model by which backend "auto" chooses.

    seconds = latency + built / building rate + run / running rate

`run` are the multiplications that a call's patches need in inference, which is what the ledger counts; `built` those
that turn the weights into what all patches share, which happens once a call, and in inference not at all where it is
kept. A latency and two rates describe a way to evaluate a circuit, others in training than in inference. Those of
the compiled ways in inference were fitted on two cores of one machine and rounded; the others are estimates beside
them. benchmarks/costs.py checks all of them against the clock, says how often the cheapest way was chosen, and fits
anew. On devices other than the CPU the
compiled loops do not run, and the rates of the plain torch ways are taken for the CPU's: this was not measured.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from qconv.backends.protocol import Compiled


class Call(NamedTuple):
    """What a backend is asked for at once.

    Args:
        patches: Patches.
        filters: Circuits with weights of their own.
        training: Whether gradients are taken.
        device: Type of torch device: "cpu", "cuda" ...
        images: Whether the patches lie in images (a layer), rather than in a table of inputs.
    """

    patches: int
    filters: int = 1
    training: bool = True
    device: str = "cpu"
    images: bool = True


@dataclass(frozen=True)
class Work:
    """What a call needs.

    Args:
        way: A key of WAYS.
        built: Multiplications from the weights to what all patches share, once a call.
        kept: Whether inference finds that again instead.
    """

    way: str
    built: int
    kept: bool


@dataclass(frozen=True)
class Rates:
    """How fast one way of evaluating is.

    Args:
        latency: Seconds of a call with hardly any patches.
        building: Multiplications a second from the weights.
        running: Multiplications a second on patches.
    """

    latency: float
    building: float
    running: float


# By way: in inference, and in training (forward and backward, in multiplications of the forward pass).
WAYS = {
    "compiled polynomial": (Rates(3e-05, 20000000000.0, 75000000000.0), Rates(0.0002, 1000000000.0, 20000000000.0)),
    "polynomial": (Rates(0.0008, 10000000000.0, 60000000000.0), Rates(0.0025, 3000000000.0, 15000000000.0)),
    "compiled train": (Rates(5e-05, 1000000000.0, 80000000000.0), Rates(0.0002, 100000000.0, 15000000000.0)),
    "train": (Rates(0.001, 1000000000.0, 5000000000.0), Rates(0.004, 100000000.0, 1200000000.0)),
    "compiled states": (Rates(8e-05, 10000000000.0, 75000000000.0), Rates(0.0003, 10000000000.0, 20000000000.0)),
    "states": (Rates(0.0015, 10000000000.0, 10000000000.0), Rates(0.005, 10000000000.0, 3000000000.0)),
    "network": (Rates(0.005, 3000000000.0, 3000000000.0), Rates(0.015, 1000000000.0, 1000000000.0)),
    "quadratic form": (Rates(0.00025, 500000000.0, 12000000000.0), Rates(0.0015, 300000000.0, 4000000000.0)),
}


@runtime_checkable
class Priced(Compiled, Protocol):
    """A Compiled that says what a call of it needs."""

    def work(self, call: Call) -> Work:
        """What `call` needs besides the multiplications that `counts` has."""
        ...


def multiplications(counts: Counter[str]) -> int:
    """Of a ledger's operations those that take time."""
    return sum(amount for key, amount in counts.items() if key.startswith(("mac:", "mul:")))


def seconds(compiled: Priced, call: Call) -> float:
    """Predicted time of a call.

    Args:
        compiled: How the circuit would be evaluated.
        call: What would be asked.
    """
    work = compiled.work(call)
    rates = WAYS[work.way][call.training]
    counts = compiled.counts(call.patches, call.filters)
    run = multiplications(counts)
    built = 0 if work.kept and not call.training else work.built
    return rates.latency + built / rates.building + run / rates.running
