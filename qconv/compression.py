"""compress(): from a float model to a compressed one, and what that gained and cost, as its file says."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from classical.data_free import Report
from classical.pruning.masks import private_copy
from classical.storage.models import load_model, save_model
from qconv.compression_checks import check_scores
from qconv.data import Split
from qconv.energy.count import Counts, Row, count
from qconv.energy.prices import estimate
from qconv.energy.units import joules
from qconv.layouts import pooling_fast
from qconv.recipes import DISTILL, Progress, Recipe, carry_out, recipe, structure
from qconv.rows import write_atomically
from qconv.train import evaluate


@dataclass(frozen=True)
class Measures:
    """What a model is worth, and what one inference of it costs.

    Args:
        accuracy: on the test images, in [0, 1].
        validation: on the validation images, in [0, 1].
        n_test, n_validation: how many images these are.
        bytes: of the model's file.
        macs: multiply-accumulates by format ("fp32*fp32": weights, activations); weights of 0 make none.
        bops: bit operations, see `qconv.energy.count`; weights of 0 cost no product.
        joules, low, high: modeled energy: arithmetic that passes over weights of 0, and the file's bits read once.
    """

    accuracy: float
    validation: float
    n_test: int
    n_validation: int
    bytes: int
    macs: Mapping[str, int]
    bops: float
    joules: float
    low: float
    high: float


@dataclass(frozen=True, eq=False)
class Compressed:
    """A compressed model beside the float model that it was made of.

    Attributes:
        model: as read back from its file, in eval mode.
        content: the file.
        recipe: how it was made; `load_compressed` needs it.
        before, after: the float model, and the compressed one.
        seconds: wall-clock s of compressing, training included.
        report: what data-free quantization did to which layers, and what it left out; None of other methods.
    """

    model: nn.Module
    content: bytes
    recipe: Recipe
    before: Measures
    after: Measures
    seconds: float
    report: Report | None = None

    @property
    def ratio(self) -> float:
        """How many times smaller the file is."""
        return self.before.bytes / self.after.bytes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file that was measured, beside its place, and rename it."""
        write_atomically(Path(path), self.content)

    def __str__(self) -> str:
        return comparison(self.before, self.after)


def compress(
    model: nn.Module,
    data: Split,
    *,
    method: str = "int8",
    bits: int | None = None,
    sparsity: float | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    distill: float = DISTILL,
    batch_size: int = 128,
    seed: int = 0,
    skip: Collection[str] = (),
    progress: Progress | None = None,
) -> Compressed:
    """Compress a float model, training it on where the method needs that, and measure both.

    The compressed model is written to a file and read back before it is measured. The same arguments give the same
    model (bit for bit with the same number of torch threads).

    Args:
        model: (B, C, H, W) -> (B, classes), trained; it stays as it is.
        data: the train part is trained on and sets ranges; validation and test are only measured.
        method: "int8" and every other quantizer, "dfq", "prune", "prune+share+huffman", ...; see `qconv.recipes`.
        bits, sparsity, epochs, lr, distill: as for `qconv.recipes.recipe`; by default the method's own.
        batch_size: images a step, from 1.
        seed: of the order of the images and of all else that is drawn, from 0.
        skip: names of layers to leave float and whole.
        progress: called with (step, epochs done, epochs, mean loss) after each epoch.

    Raises:
        ValueError: an unknown method, arguments that do not fit it, a model that it cannot be applied to, or data that
            are no Split or have more classes than the model.
    """
    chosen = recipe(method, bits=bits, sparsity=sparsity, epochs=epochs, lr=lr, distill=distill)
    check_scores(model, data)
    start = time.perf_counter()
    reports: list[Report] = []
    small = carry_out(
        chosen,
        model,
        *data.train,
        batch_size=batch_size,
        seed=seed,
        skip=skip,
        progress=progress,
        on_report=reports.append,
    )
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        before, after = Path(folder) / "before", Path(folder) / "after"
        save_model(model, before, coding="dense")
        # Where every byte counts, 8 bits do for a bias: it is added once to a sum of many products.
        save_model(small, after, coding=chosen.coding, biases="int8" if "huffman" in chosen.steps else None)
        small = load_model(structure(model, chosen, skip=skip), after).eval()
        return Compressed(
            small,
            after.read_bytes(),
            chosen,
            measure(model, data, before.stat().st_size),
            measure(small, data, after.stat().st_size),
            seconds,
            reports[0] if reports else None,
        )


def load_compressed(
    path: str | os.PathLike[str], network: nn.Module, chosen: Recipe, *, skip: Collection[str] = ()
) -> nn.Module:
    """Read the file of a compressed model.

    Args:
        path: what `Compressed.save` wrote.
        network: built like the float model, whatever its weights; it stays as it is.
        chosen: the recipe, `Compressed.recipe` or a `recipe` of the same arguments.
        skip: as for `compress`.

    Raises:
        ValueError: the file is damaged, or of another network or recipe.
        OSError: it cannot be read.
    """
    return load_model(structure(network, chosen, skip=skip), path).eval()


def measure(model: nn.Module, data: Split, file_bytes: int) -> Measures:
    """Measure a model that takes so many bytes as a file."""
    counts = count(private_copy(model), tuple(data.test.images.shape[1:]))
    fast = pooling_fast(model)
    test, validation = evaluate(fast, *data.test), evaluate(fast, *data.validation)
    sparse = counts.skipping_zeros()
    # The file stands in for the weights that each layer would read.
    rows = [replace(row, operations=_without_weights(row.operations)) for row in sparse.rows]
    energy = estimate(Counts((*rows, Row("file", "storage", (), (), Counter(weight_bits=8 * file_bytes)))))
    return Measures(
        accuracy=test.accuracy,
        validation=validation.accuracy,
        n_test=test.n,
        n_validation=validation.n,
        bytes=file_bytes,
        macs=dict(sparse.macs()),
        bops=counts.bops("uniq", skip_zeros=True),
        joules=energy.joules,
        low=energy.low,
        high=energy.high,
    )


def _without_weights(operations: Counter[str]) -> Counter[str]:
    return Counter({key: n for key, n in operations.items() if key != "weight_bits"})


def comparison(before: Measures, after: Measures) -> str:
    """A table of both, as text."""
    rows = [
        ("", "float", "compressed", ""),
        (
            f"test accuracy ({after.n_test:,} images)",
            f"{before.accuracy:.2%}",
            f"{after.accuracy:.2%}",
            f"{100 * (after.accuracy - before.accuracy):+.2f} points",
        ),
        _shrunk("file", before.bytes, after.bytes, "B"),
        _shrunk("multiply-accumulates", sum(before.macs.values()), sum(after.macs.values()), ""),
        ("  weights*activations", _formats(before), _formats(after), ""),
        _shrunk("bit operations", before.bops, after.bops, ""),
        (
            "energy, modeled",
            joules(before.joules),
            joules(after.joules),
            f"{before.joules / after.joules:.1f} times less",
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(
            cell.rjust(w) if 0 < i < 3 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


def _shrunk(name: str, before: float, after: float, unit: str) -> tuple[str, str, str, str]:
    numbers = (f"{n:,.0f} {unit}".rstrip() for n in (before, after))
    less = f"{before / after:.1f} times less" if after else ""
    return (name, *numbers, less)  # type: ignore[return-value]


def _formats(measures: Measures) -> str:
    return ", ".join(sorted(measures.macs, key=lambda pair: -measures.macs[pair]))
