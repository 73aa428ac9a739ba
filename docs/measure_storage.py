"""Measure the table of codings in storage.md, beside this file, and write it there.

    python docs/measure_storage.py
    python docs/measure_storage.py runs/pruned_lenet/lenet300-prune-*.qcnv    # rows of pruned networks too

Networks are files that examples/reproduce/pruned_lenet.py left, LeNet-300-100 on MNIST; without any, the rows of
networks stay as they are.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from classical.storage import csr, load, save, share, sizes

PAGE = Path(__file__).parent / "storage.md"
SHAPE = (300, 784)
DENSITIES = (0.5, 0.2, 0.08, 0.04, 0.024)
BITS = 4  # of shared values
NETWORK = "LeNet"
HEAD = ("density", "CSR", "`packed`", "`huffman`", "`sparse`", "`sparse_huffman` = `auto`", "bound", "bytes a non-zero")


def gaussian() -> list[tuple[str, Tensor]]:
    """The largest of normal weights, by density."""
    draws, found = torch.Generator().manual_seed(0), []
    for density in DENSITIES:
        weight = torch.randn(SHAPE, generator=draws)
        least = weight.abs().flatten().kthvalue(int((1 - density) * weight.numel())).values
        found.append((f"{100 * density:g} %", torch.where(weight.abs() > least, weight, 0)))
    return found


def network(path: Path) -> tuple[str, Tensor]:
    """The first layer of a LeNet-300-100, and how many times fewer weights the whole network has.

    Raises:
        ValueError: the file is damaged or of another network.
    """
    tensors = load(path)
    weights = [tensor for name, tensor in tensors.items() if name.endswith(".weight")]
    first = tensors.get("fc1.weight")
    if first is None or first.shape != SHAPE:
        raise ValueError(f"{path} has no fc1.weight of shape {SHAPE}: give files of pruned_lenet.py")
    fewer = sum(weight.numel() for weight in weights) / sum(int(weight.count_nonzero()) for weight in weights)
    return f"{100 * _density(first):.2g} %, {NETWORK}, {fewer:.0f} times fewer", first


def _density(weight: Tensor) -> float:
    return int(weight.count_nonzero()) / weight.numel()


def bound(weight: Tensor) -> float:
    """Bytes of independent positions and values, each by its frequency, and of the levels in float32."""
    density = _density(weight)
    _, counts = np.unique(weight[weight != 0].numpy(), return_counts=True)
    positions = -weight.numel() * (density * np.log2(density) + (1 - density) * np.log2(1 - density))
    values = -(counts * np.log2(counts / counts.sum())).sum()
    return float(positions + values) / 8 + 4 * (len(counts) + 1)


def cells(name: str, weight: Tensor) -> list[str]:
    """One row: bytes in every coding; weights share 16 values, or the fewer that they have.

    Raises:
        ValueError: another coding than sparse_huffman is the smallest, which the heading denies.
    """
    weight = share(weight, BITS).values()
    levels = len(np.unique(weight.numpy()))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weight"
        for coding in ("packed", "huffman", "sparse", "sparse_huffman", "auto"):
            save({"weight": weight}, file, coding=coding)
            found[coding] = sizes(file).tensors[0].bytes
    smallest = found.pop("auto")
    if smallest != found["sparse_huffman"]:
        raise ValueError(f"{name}: auto takes {smallest} bytes but sparse_huffman {found['sparse_huffman']}")
    rows = csr(weight).bytes((levels - 2).bit_length()) + 4 * levels
    each = smallest / int(weight.count_nonzero())
    return [name, f"{rows:,}", *(f"{n:,}" for n in found.values()), f"{bound(weight):,.0f}", f"{each:.2f}"]


def page(text: str, networks: Sequence[Path] = ()) -> str:
    """The page with the table measured now.

    Args:
        text: of the page as it is.
        networks: files of pruned networks; none to leave their rows as they are.
    """
    before, rest = text.split(f"| {HEAD[0]} | {HEAD[1]} |", 1)
    old, after = rest.split("\n\n", 1)
    rows = [cells(*each) for each in [*gaussian(), *map(network, networks)]]
    lines = ["| " + " | ".join(row) + " |" for row in (HEAD, ["---"] * len(HEAD), *rows)]
    lines[1] = "|" + "---|" * len(HEAD)
    if not networks:
        lines += [line for line in old.splitlines() if NETWORK in line]
    return before + "\n".join(lines) + "\n\n" + after


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", type=Path, help="files of pruned networks, .qcnv")
    PAGE.write_text(page(PAGE.read_text(), parser.parse_args().networks))
