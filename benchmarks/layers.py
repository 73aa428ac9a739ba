"""What quantum-inspired layers cost beside nn.Conv2d of the same shape, forward and backward.

    python -m benchmarks.layers
    python -m benchmarks.layers --rounds 15 --batch 32
    python -m benchmarks.layers --json runs/layers.json --docs docs      # docs/performance_layers.md

tensorkrowch's layer of the same matrix product state runs beside ours where it is installed (peers.txt), after both
were seen to give the same values. Run it from the root of the repository.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from benchmarks.goals import Verdict, digits
from benchmarks.record import machine
from benchmarks.report import markdown_table, measured_on, show
from benchmarks.timing import alternate
from qconv import ProbabilisticBinaryConv2d, QuantumDeformedConv2d, TensorNetworkConv2d

SHAPE = (32, 64, 3)  # in and out channels, kernel size
SIDE = 14  # pixels
BOND = 8
OURS, PEER = "MPS, bond 8", "tensorkrowch MPS, bond 8"
QUICK_BATCH = 4

# At most so many times nn.Conv2d's time.
GOALS = {
    "probabilistic binary, moments": 2.3,
    "deformed traceless, moments": 5.0,
    "deformed per pair, moments": 7.0,
    OURS: 15.0,
}
NO_GOAL = ("deformed, neighbors, moments",)


def layers() -> dict[str, nn.Module]:
    """What is timed, by name, nn.Conv2d first.

    A layer's moments are what a convolution's outputs are; the whole layer also normalizes and activates.
    """
    mps = TensorNetworkConv2d(*SHAPE, structure="mps", bond_dim=BOND, order="raster")
    found: dict[str, nn.Module] = {
        "nn.Conv2d": nn.Conv2d(*SHAPE, bias=False),
        "nn.Conv2d, BatchNorm2d, Hardtanh": nn.Sequential(
            nn.Conv2d(*SHAPE, bias=False), nn.BatchNorm2d(SHAPE[1]), nn.Hardtanh()
        ),
    }
    binary = {
        "probabilistic binary": (ProbabilisticBinaryConv2d, {}),
        "deformed traceless": (QuantumDeformedConv2d, {"deformation": "traceless"}),
        "deformed per pair": (QuantumDeformedConv2d, {"deformation": "pair"}),
        "deformed, neighbors": (QuantumDeformedConv2d, {"deformation": "neighbors"}),
    }
    for name, (kind, options) in binary.items():
        found[f"{name}, moments"] = kind(*SHAPE, output="moments", norm=False, **options)
        found[name] = kind(*SHAPE, **options)
    found[OURS] = mps
    found["tree, bond 8"] = TensorNetworkConv2d(*SHAPE, structure="tree", bond_dim=BOND)
    if find_spec("tensorkrowch") is not None:
        found[PEER] = Krowch(mps)
    return found


class Krowch(nn.Module):
    """tensorkrowch's layer with the cores of one of ours; pixels go through our feature map."""

    def __init__(self, ours: TensorNetworkConv2d) -> None:
        super().__init__()
        import tensorkrowch

        cores = [core.detach().clone() for core in ours.cores()]
        cores[0], cores[-1] = cores[0][0], cores[-1][..., 0]
        self.features = ours.feature_map
        channels = ours.feature_map.size(ours.in_channels)
        self.layer = tensorkrowch.models.ConvMPSLayer(channels, ours.out_channels, BOND, SHAPE[2], tensors=cores)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, out, H', W')."""
        result: Tensor = self.layer(self.features(images))
        return result


def step(layer: nn.Module, images: Tensor) -> Callable[[], None]:
    """Forward, and backward to weights and images."""

    def run() -> None:
        layer.zero_grad()
        images.grad = None
        result = layer(images)
        (sum(part.sum() for part in result) if isinstance(result, tuple) else result.sum()).backward()

    return run


@dataclass(frozen=True)
class Timed:
    """One layer.

    Args:
        parameters: Numbers to train.
        seconds: Forward and backward, median of the rounds.
    """

    parameters: int
    seconds: float


@dataclass(frozen=True)
class LayerRecord:
    """What was measured.

    Args:
        machine: See benchmarks.record.machine.
        batch: Images.
        rounds: That were asked for.
        repeated: Rounds left out because something disturbed them.
        disturbed: Rounds that count although something disturbed them.
        layers: By name, nn.Conv2d first.
    """

    machine: dict[str, Any]
    batch: int
    rounds: int
    repeated: int
    disturbed: int
    layers: dict[str, Timed]

    def save(self, path: Path) -> None:
        """Write a JSON file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> "LayerRecord":
        """Read one."""
        found = json.loads(path.read_text())
        return cls(**found | {"layers": {name: Timed(**timed) for name, timed in found["layers"].items()}})

    def ratio(self, name: str, other: str = "nn.Conv2d") -> float | None:
        """Seconds of one layer over those of another; None where one was not timed."""
        both = [self.layers.get(name), self.layers.get(other)]
        first, second = both
        return None if first is None or second is None else first.seconds / second.seconds


def measure(rounds: int, batch: int) -> LayerRecord:
    """Time all layers in turns."""
    torch.manual_seed(0)
    found = layers()
    # Means of bits for the binary layers, pixels for the others: any numbers in [0, 1] are both.
    images = torch.rand(batch, SHAPE[0], SIDE, SIDE, requires_grad=True)
    if PEER in found:
        with torch.no_grad():
            torch.testing.assert_close(found[PEER](images), found[OURS](images), rtol=1e-3, atol=1e-3)
    timed = alternate({name: step(layer, images) for name, layer in found.items()}, rounds)
    results = {
        name: Timed(sum(p.numel() for p in layer.parameters()), timed.timings[name].median)
        for name, layer in found.items()
    }
    return LayerRecord(machine(), batch, rounds, timed.repeated, timed.disturbed, results)


# --- tables ----------------------------------------------------------------------------------------------------------


def layer_table(record: LayerRecord) -> list[list[str]]:
    """All layers beside nn.Conv2d; a peer that is not installed is named."""
    body = []
    for name, timed in record.layers.items():
        ratio = record.ratio(name)
        assert ratio is not None
        body.append([name, f"{timed.parameters:,}", digits(1e3 * timed.seconds), digits(ratio)])
    if PEER not in record.layers:
        body.append([PEER, "", "left out: tensorkrowch is not installed", ""])
    return [["layer", "parameters", "forward + backward [ms]", "/ nn.Conv2d"], *body]


def goal_table(record: LayerRecord) -> list[list[str]]:
    """Goals and what of them is reached; what has no goal, with its ratio."""
    disturbed = record.disturbed > 0
    body = [
        [f"{name} / nn.Conv2d", str(Verdict(name, "", "", record.ratio(name), limit, False, disturbed))]
        for name, limit in GOALS.items()
    ]
    faster = Verdict(PEER, "", "", record.ratio(PEER, OURS), 1.0, True, disturbed)
    body.append([f"{OURS}: times faster than tensorkrowch's layer of the same model", str(faster)])
    for name in NO_GOAL:
        ratio = record.ratio(name)
        body.append([f"{name} / nn.Conv2d", "not measured" if ratio is None else f"{digits(ratio)} (no goal)"])
    return [["goal", "today"], *body]


def title(record: LayerRecord) -> str:
    """What was timed, in words."""
    return f"{SHAPE[0]} to {SHAPE[1]} channels, {SHAPE[2]}x{SHAPE[2]}, {record.batch} images of {SIDE}x{SIDE}"


def rounds_note(record: LayerRecord) -> str:
    """How often it was timed."""
    return (
        f"{record.machine['threads']} threads, median of {record.rounds} rounds; disturbed rounds: {record.repeated} "
        f"repeated, {record.disturbed} counted all the same"
    )


def markdown(record: LayerRecord) -> str:
    """The page."""
    parts = [
        "<!-- Generated by `python -m benchmarks.layers --docs docs`, part of `make bench`: change that, not this. -->",
        "# Performance of quantum-inspired layers",
        f"Forward and backward, to weights and images, float32: {title(record)}. {measured_on(record.machine)} "
        f"{rounds_note(record)}.",
        '"Moments" are what a convolution\'s outputs are: means and variances. The whole layer also normalizes and '
        "activates. A question mark stands where disturbed rounds count.",
        markdown_table(goal_table(record)),
        markdown_table(layer_table(record)),
    ]
    return "\n\n".join(parts) + "\n"


# --- the command -----------------------------------------------------------------------------------------------------


def at_least_one(text: str) -> int:
    """A whole number from 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rounds = "rounds, in each of which every layer runs (default: %(default)s)"
    parser.add_argument("--rounds", type=at_least_one, default=7, help=rounds)
    parser.add_argument("--batch", type=at_least_one, default=128, help="images (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"1 round of {QUICK_BATCH} images: a smoke run")
    parser.add_argument("--json", type=Path, help="save the figures in this file")
    parser.add_argument("--docs", type=Path, help="write performance_layers.md into this folder")
    parser.add_argument("--from-json", type=Path, help="measure nothing: show, and write, what this file has")
    given = parser.parse_args()
    if given.quick and given.docs is not None:
        parser.error("--quick is a smoke run, which says nothing about speed: no page is written from it")
    if given.from_json is not None:
        try:
            record = LayerRecord.load(given.from_json)
        except OSError as error:
            parser.error(f"{error}: give a file that --json wrote")
        except (ValueError, TypeError, KeyError):
            parser.error(f"{given.from_json} is no record of this benchmark: give a file that --json wrote")
    else:
        record = measure(1, QUICK_BATCH) if given.quick else measure(given.rounds, given.batch)
    console = Console(width=120)
    if given.quick:
        console.print("Smoke run: says nothing about speed.")
    show(console, title(record), layer_table(record))
    if not given.quick:
        show(console, "goals", goal_table(record))
    if PEER not in record.layers:
        console.print(f"{PEER} was left out: install it with pip install --no-deps -r benchmarks/peers.txt")
    console.print(rounds_note(record))
    if given.json is not None:
        record.save(given.json)
    if given.docs is not None:
        given.docs.mkdir(parents=True, exist_ok=True)
        (given.docs / "performance_layers.md").write_text(markdown(record))


if __name__ == "__main__":
    main()
