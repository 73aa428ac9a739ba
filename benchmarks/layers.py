"""What quantum-inspired layers cost beside nn.Conv2d of the same shape, forward and backward.

    python -m benchmarks.layers
    python -m benchmarks.layers --rounds 15 --batch 32

tensorkrowch's layer of the same matrix product state runs beside ours where it is installed (peers.txt), after both
were seen to give the same values. Run it from the root of the repository.
"""

import argparse
from collections.abc import Callable
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.goals import digits
from benchmarks.timing import alternate
from qconv import ProbabilisticBinaryConv2d, QuantumDeformedConv2d, TensorNetworkConv2d

SHAPE = (32, 64, 3)  # in and out channels, kernel size
SIDE = 14  # pixels
BOND = 8
PEER = "tensorkrowch MPS, bond 8"

# At most so many times nn.Conv2d's time.
GOALS = {
    "probabilistic binary, moments": 2.3,
    "deformed traceless, moments": 5.0,
    "deformed per pair, moments": 7.0,
    "MPS, bond 8": 15.0,
}


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
    found["MPS, bond 8"] = mps
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = layers()
    # Means of bits for the binary layers, pixels for the others: any numbers in [0, 1] are both.
    images = torch.rand(arguments.batch, SHAPE[0], SIDE, SIDE, requires_grad=True)
    if PEER in found:
        with torch.no_grad():
            torch.testing.assert_close(found[PEER](images), found["MPS, bond 8"](images), rtol=1e-3, atol=1e-3)
    rounds = alternate({name: step(layer, images) for name, layer in found.items()}, arguments.rounds)
    seconds = {name: timing.median for name, timing in rounds.timings.items()}
    title = f"{SHAPE[0]} to {SHAPE[1]} channels, {SHAPE[2]}x{SHAPE[2]}, {arguments.batch} images of {SIDE}x{SIDE}"
    table = Table("layer", "parameters", "forward + backward", "/ nn.Conv2d", "goal", title=title)
    for name, layer in found.items():
        ratio = seconds[name] / seconds["nn.Conv2d"]
        goal = GOALS.get(name)
        verdict = "" if goal is None else f"≤ {goal:g} {'met' if ratio <= goal else 'MISSED'}"
        numbers = sum(p.numel() for p in layer.parameters())
        table.add_row(name, f"{numbers:,}", f"{1e3 * seconds[name]:.3g} ms", digits(ratio), verdict)
    console = Console(width=120)
    console.print(table)
    console.print(
        f"{torch.get_num_threads()} threads, median of {arguments.rounds} rounds; disturbed rounds: {rounds.repeated} "
        f"repeated, {rounds.disturbed} counted all the same"
    )


if __name__ == "__main__":
    main()
