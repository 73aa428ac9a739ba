"""What an exact evaluation costs: the one model by which backend "auto" chooses.

    seconds = latency + built / building rate + run / running rate,   and three times that where gradients are taken

`run` are the multiplications that a call's patches need, which is what the ledger counts; `built` those that turn the
weights into what all patches share, which happens once a call, and in inference not at all where it is kept. A
latency and two rates describe a way to evaluate a circuit. They were measured (benchmarks/costs.py fits them
anew and says how often the cheapest way was chosen); only their ratios matter, so other machines choose alike. On
devices other than the CPU the compiled loops do not run, and the ratios of the plain torch ways are taken for the
CPU's: this was not measured.
"""

from __future__ import annotations

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
class Way:
    """How fast one way of evaluating is.

    Args:
        latency: Seconds of a call with hardly any patches.
        building: Multiplications a second from the weights.
        running: Multiplications a second on patches.
    """

    latency: float
    building: float
    running: float


WAYS = {
    "compiled polynomial": Way(3e-5, 2e10, 7.5e10),
    "polynomial": Way(8e-4, 1e10, 6e10),
    "compiled train": Way(5e-5, 8e6, 6e10),
    "train": Way(2e-3, 8e6, 6e9),
    "compiled states": Way(8e-5, 1e10, 7.5e10),
    "states": Way(1.5e-3, 1e10, 1e10),
    "quadratic form": Way(2.5e-4, 5e8, 1.2e10),
}
BACKWARD = 3  # forward and backward together, in forwards


@runtime_checkable
class Priced(Compiled, Protocol):
    """A Compiled that says what a call of it needs."""

    def work(self, call: Call) -> Work:
        """What `call` needs besides the multiplications that `counts` has."""
        ...


def seconds(compiled: Priced, call: Call) -> float:
    """Predicted time of a call.

    Args:
        compiled: How the circuit would be evaluated.
        call: What would be asked.
    """
    work = compiled.work(call)
    way = WAYS[work.way]
    counts = compiled.counts(call.patches, call.filters)
    run = sum(amount for key, amount in counts.items() if key.startswith(("mac:", "mul:")))
    built = 0 if work.kept and not call.training else work.built
    total = way.latency + built / way.building + run / way.running
    return BACKWARD * total if call.training else total
