"""What convolutions in integers cost beside nn.Conv2d in float32, on one thread.

    python -m benchmarks.integer
    python -m benchmarks.integer --rounds 15 --batch 1
    python -m benchmarks.integer --json runs/integer.json --docs docs      # docs/performance_integer.md

128 channels, images of 28x28, kernels of 3x3. Each layer is timed in two ways: "real" is from real inputs to real
outputs, as nn.Conv2d does it; "codes" is from the codes of the inputs to accumulators, as between the layers of an
integer network, where encoding and rescaling fall to the layers around. Both stand beside the faster of nn.Conv2d's two
memory layouts, which is always real to real. Signs are packed within the time that is shown; weights were prepared
before. Every layer is first seen to give what the layer it stands for gives. Run it from the root of the repository, on
a machine that does nothing else.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.goals import Verdict, digits
from benchmarks.layers import at_least_one
from benchmarks.record import machine
from benchmarks.report import markdown_table, measured_on, show
from benchmarks.timing import alternate
from classical.integer import IntegerLayer, integer_twin
from classical.layers import QuantizedConv2d

CHANNELS, SIDE, KERNEL = 128, 28, 3
FLOATS = ("nn.Conv2d", "nn.Conv2d, channels last")
WAYS = ("codes", "real")
QUICK_BATCH = 1

# At least so many times as fast as the faster nn.Conv2d, in either way.
GOALS = {"binary": 8.0, "ternary, 63% zeros": 1.5, "ternary, 90% zeros": 4.0}


def layer(weight: str, activation: str, images: Tensor, zeros: float = 0.0) -> QuantizedConv2d:
    """A layer of random weights, of which a share is 0, that has seen the images."""
    found = QuantizedConv2d(
        CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2, bias=False, weight=weight, activation=activation
    )
    with torch.no_grad():
        found.weight.mul_(torch.rand_like(found.weight) >= zeros)
        if weight == "twn":
            found.weight.sign_()
        found.weight_quantizer.fit(found.weight)
        found(images)
    return found.eval()


def twins(images: Tensor) -> dict[str, IntegerLayer]:
    """Layers in integers, by name, each equal to its layer.

    Raises:
        ValueError: one is not: then there is nothing to compare.
    """
    kinds = {
        "binary": (layer("bnn", "bnn", images), "numba"),
        "binary, XNOR-Net's scale map": (layer("xnor", "xnor", images), "numba"),
        "ternary, 63% zeros": (layer("twn", "int8", images, 0.63), "numba"),
        "ternary, 90% zeros": (layer("twn", "int8", images, 0.9), "numba"),
        "ternary, 63% zeros, 2-bit inputs": (layer("twn", "lsq2", images, 0.63), "numba"),
        "quinary, 63% zeros": (layer("naq5", "int8", images, 0.63), "numba"),
        "int8": (layer("int8", "int8", images), "torch"),
        "ternary as int8": (layer("twn", "int8", images, 0.63), "torch"),
    }
    found = {}
    for name, (real, kernels) in kinds.items():
        twin = integer_twin(real, kernels=kernels)  # type: ignore[arg-type]
        with torch.no_grad():
            expected = real(images)
            error = float((twin(images) - expected).abs().max() / expected.abs().max())
        if not error < 1e-5:
            raise ValueError(f"{name} differs from its layer by {error:.1e} of the largest output, allowed are 1e-5")
        found[name] = twin
    return found


def _applied(function: Callable[[Tensor], object], x: Tensor) -> Callable[[], None]:
    def call() -> None:
        function(x)

    return call


def calls(images: Tensor) -> dict[str, Callable[[], None]]:
    """What is timed, by name, nn.Conv2d first."""
    found: dict[str, Callable[[], None]] = {}
    for name, layout in zip(FLOATS, (torch.contiguous_format, torch.channels_last), strict=True):
        conv = nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2, bias=False).requires_grad_(False)
        conv, laid = conv.to(memory_format=layout), images.to(memory_format=layout)  # type: ignore[call-overload]
        found[name] = _applied(conv, laid)
    for name, twin in twins(images).items():
        found[f"{name}: codes"] = _applied(twin.accumulate, twin.encode(images))
        found[f"{name}: real"] = _applied(twin, images)
    return found


@dataclass(frozen=True)
class IntegerRecord:
    """What was measured.

    Args:
        machine: See benchmarks.record.machine.
        batch: Images.
        rounds: That were asked for.
        repeated: Rounds left out because something disturbed them.
        disturbed: Rounds that count although something disturbed them.
        seconds: By name, "NAME: codes" and "NAME: real" of integer layers; median of the rounds.
    """

    machine: dict[str, Any]
    batch: int
    rounds: int
    repeated: int
    disturbed: int
    seconds: dict[str, float]

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "IntegerRecord":
        """Read one."""
        return cls(**json.loads(path.read_text()))

    @property
    def baseline(self) -> str:
        """The faster layout of nn.Conv2d."""
        return min(FLOATS, key=self.seconds.__getitem__)

    @property
    def kinds(self) -> list[str]:
        """Names of the integer layers."""
        return list(dict.fromkeys(name.rsplit(": ", 1)[0] for name in self.seconds if name not in FLOATS))

    def times(self, kind: str, way: str) -> float:
        """How many times as fast as the baseline a layer is in one of WAYS."""
        return self.seconds[self.baseline] / self.seconds[f"{kind}: {way}"]


def measure(rounds: int, batch: int) -> IntegerRecord:
    """Time all layers in turns, on one thread."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    timed = alternate(calls(torch.randn(batch, CHANNELS, SIDE, SIDE).relu()), rounds)
    seconds = {name: timing.median for name, timing in timed.timings.items()}
    return IntegerRecord(machine(), batch, rounds, timed.repeated, timed.disturbed, seconds)


# --- tables ----------------------------------------------------------------------------------------------------------


def layer_table(record: IntegerRecord) -> list[list[str]]:
    """Both layouts of nn.Conv2d, then all integer layers in both ways."""
    head = ["convolution", "codes [ms]", "real [ms]", "times as fast, codes", "times as fast, real"]
    body = [
        [
            name,
            "",
            digits(1e3 * record.seconds[name]),
            "",
            digits(record.seconds[record.baseline] / record.seconds[name]),
        ]
        for name in FLOATS
    ]
    for kind in record.kinds:
        milliseconds = [digits(1e3 * record.seconds[f"{kind}: {way}"]) for way in WAYS]
        body.append([kind, *milliseconds, *(digits(record.times(kind, way)) for way in WAYS)])
    return [head, *body]


def goal_table(record: IntegerRecord) -> list[list[str]]:
    """Goals and what of them is reached, in both ways; int8 has none."""

    def verdict(kind: str, way: str, limit: float) -> str:
        return str(Verdict(kind, "", "", record.times(kind, way), limit, True, record.disturbed > 0))

    body = [
        [f"{kind}: times as fast as nn.Conv2d", *(verdict(kind, way, limit) for way in WAYS)]
        for kind, limit in GOALS.items()
    ]
    body.append(
        ["int8: times as fast as nn.Conv2d", *(f"{digits(record.times('int8', way))} (no goal)" for way in WAYS)]
    )
    return [["goal", *WAYS], *body]


def title(record: IntegerRecord) -> str:
    """What was timed, in words."""
    return f"{CHANNELS} channels, {KERNEL}x{KERNEL}, {record.batch} images of {SIDE}x{SIDE}"


def rounds_note(record: IntegerRecord) -> str:
    """How often it was timed, and beside what."""
    return (
        f"1 thread, median of {record.rounds} rounds; disturbed rounds: {record.repeated} repeated, {record.disturbed} "
        f"counted all the same. Ratios are to {record.baseline}, the faster of both layouts"
    )


def markdown(record: IntegerRecord) -> str:
    """The page."""
    parts = [
        "<!-- Generated by `python -m benchmarks.integer --docs docs`: change that, not this. -->",
        "# Performance of convolutions in integers",
        f"{title(record)}. {measured_on(record.machine)} {rounds_note(record)}.",
        '"Real" is from real inputs to real outputs, as nn.Conv2d does it in float32. "Codes" is from the codes of the '
        "inputs to accumulators, as between the layers of an integer network, where encoding and rescaling fall to the "
        "layers around. Packing of signs is in both. A question mark stands where disturbed rounds count.",
        markdown_table(goal_table(record)),
        markdown_table(layer_table(record)),
    ]
    return "\n\n".join(parts) + "\n"


# --- the command -----------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rounds = "rounds, in each of which every layer runs (default: %(default)s)"
    parser.add_argument("--rounds", type=at_least_one, default=15, help=rounds)
    parser.add_argument("--batch", type=at_least_one, default=8, help="images (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"1 round of {QUICK_BATCH} image: a smoke run")
    parser.add_argument("--json", type=Path, help="save the figures in this file")
    parser.add_argument("--docs", type=Path, help="write performance_integer.md into this folder")
    parser.add_argument("--from-json", type=Path, help="measure nothing: show, and write, what this file has")
    given = parser.parse_args()
    if given.quick and given.docs is not None:
        parser.error("--quick is a smoke run, which says nothing about speed: no page is written from it")
    if given.from_json is not None:
        try:
            record = IntegerRecord.load(given.from_json)
        except OSError as error:
            parser.error(f"{error}: give a file that --json wrote")
        except (ValueError, TypeError):
            parser.error(f"{given.from_json} is no record of this benchmark: give a file that --json wrote")
    else:
        record = measure(1, QUICK_BATCH) if given.quick else measure(given.rounds, given.batch)
    console = Console(width=120)
    if given.quick:
        console.print("Smoke run: says nothing about speed.")
    show(console, title(record), layer_table(record))
    if not given.quick:
        show(console, "goals", goal_table(record))
    console.print(rounds_note(record))
    if given.json is not None:
        record.save(given.json)
    if given.docs is not None:
        given.docs.mkdir(parents=True, exist_ok=True)
        (given.docs / "performance_integer.md").write_text(markdown(record))


if __name__ == "__main__":
    main()
