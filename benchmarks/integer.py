"""What convolutions in integers cost beside nn.Conv2d in float32, on one thread.

    python -m benchmarks.integer
    python -m benchmarks.integer --rounds 15 --batch 1

128 channels, images of 28x28, kernels of 3x3. "codes" means from the codes of the inputs to accumulators, as between
the layers of an integer network; "real" means from real inputs to real outputs, as nn.Conv2d does. Signs are packed
within the time that is shown; weights were prepared before. Every layer is first seen to give what the layer it stands
for gives. Run it from the root of the repository, on a machine that does nothing else.
"""

import argparse
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.goals import digits
from benchmarks.timing import alternate
from classical.integer import IntegerLayer, integer_twin
from classical.layers import QuantizedConv2d

CHANNELS, SIDE, KERNEL = 128, 28, 3
FLOAT = "nn.Conv2d"

# At least so many times as fast as nn.Conv2d.
GOALS = {
    "binary: real": 8.0,
    "ternary, 63% zeros: codes": 1.5,
    "ternary, 90% zeros: codes": 4.0,
}


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


def calls(images: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by name, nn.Conv2d first."""
    conv = nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=KERNEL // 2, bias=False).requires_grad_(False)
    last = torch.channels_last
    other, apart = nn.Conv2d(CHANNELS, CHANNELS, KERNEL, padding=1, bias=False), images.to(memory_format=last)
    other = other.requires_grad_(False).to(memory_format=last)
    found: dict[str, Callable[[], object]] = {
        FLOAT: lambda: conv(images),
        "nn.Conv2d, channels last": lambda: other(apart),
    }
    for name, twin in twins(images).items():
        codes = twin.encode(images)
        found[f"{name}: codes"] = lambda twin=twin, codes=codes: twin.accumulate(codes)
        found[f"{name}: real"] = lambda twin=twin: twin(images)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--batch", type=int, default=8)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images = torch.randn(arguments.batch, CHANNELS, SIDE, SIDE).relu()
    rounds = alternate(calls(images), arguments.rounds)
    title = f"{CHANNELS} channels, {KERNEL}x{KERNEL}, {arguments.batch} images of {SIDE}x{SIDE}"
    table = Table("convolution", "median", "best", "times nn.Conv2d", "best by best", "goal", title=title)
    plain = rounds.timings[FLOAT]
    for name, timing in rounds.timings.items():
        ratio = plain.median / timing.median
        goal = GOALS.get(name)
        table.add_row(
            name,
            f"{1e3 * timing.median:.3g} ms",
            f"{1e3 * timing.best:.3g} ms",
            digits(ratio),
            digits(plain.best / timing.best),
            "" if goal is None else f"≥ {goal:g} {'met' if ratio >= goal else 'MISSED'}",
        )
    console = Console(width=120)
    console.print(table)
    console.print(
        f"1 thread, median of {arguments.rounds} rounds; disturbed rounds: {rounds.repeated} repeated, "
        f"{rounds.disturbed} counted all the same"
    )


if __name__ == "__main__":
    main()
