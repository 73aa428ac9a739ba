"""Writes docs/backends.md: what every backend can do, as the conformance suite finds it, and what a patch costs there.

python -m benchmarks.backends                  # the capabilities; a cost measured before stays on the page
python -m benchmarks.backends --timings        # the costs too: minutes, on a quiet machine
(The page says so itself where no cost was measured yet.)
"""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.timing import alternate
from circuits import Channel, NoiseModel, kernel
from qconv import load_backend
from qconv.backends.loading import as_backend
from qconv.distribution import distribute
from qconv.gradients import compile_differentiable, differentiate
from qconv.mitigation import ZeroNoise
from qconv.testing import CHECKS, Conformance, backend_conformance

PAGE = Path(__file__).parents[1] / "docs" / "backends.md"
COSTS = "## Cost of a patch"
UNMEASURED = f"""{COSTS}

Not measured yet: `python -m benchmarks.backends --timings` does, on a quiet machine.
"""
PATCHES, FEW_PATCHES, SHOTS = 256, 16, 100
CELLS = {"passed": "yes", "partly": "partly", "refused": "no", "failed": "**fails**"}


@dataclass(frozen=True)
class Listed:
    """A backend of the page.

    Args:
        load: Makes it.
        needs: A package that is no dependency of qconv; empty for none.
        options: Of backend_conformance.
        fast: Whether it takes patches as one batch.
        clifford: Whether it runs Clifford gates alone: its cost is that of angles which are multiples of pi/2.
    """

    load: Callable[[], Any]
    needs: str = ""
    options: Callable[[], Mapping[str, Any]] = field(default=dict)
    fast: bool = True
    clifford: bool = False


def _device() -> Any:
    from qiskit.providers.fake_provider import GenericBackendV2

    return GenericBackendV2(4, seed=1)


def _sampler() -> Any:
    from qiskit.primitives import StatevectorSampler

    # A generator, not a number: with a number every call and job would repeat the same shots.
    return StatevectorSampler(seed=np.random.default_rng(0))


def _ibm() -> Any:
    from qiskit_ibm_runtime.fake_provider import FakeManilaV2

    return FakeManilaV2()


def _modeled(device: Callable[[], Any]) -> Callable[[], Mapping[str, Any]]:
    return lambda: {"reference": load_backend("qiskit", noise_model=device())}


def _pennylane(device: str, needs: str = "", clifford: bool = False, **options: Any) -> Listed:
    return Listed(lambda: load_backend("pennylane", device=device, **options), needs, fast=False, clifford=clifford)


def _aer(method: str, clifford: bool = False) -> Listed:
    return Listed(lambda: load_backend("qiskit", method=method), fast=False, clifford=clifford)


_LINE = [[a, b] for a in range(4) for b in range(4) if abs(a - b) == 1]
_STEP = "with shots, finite differences need a step that suits them: give one"
_SCATTERED = dict.fromkeys(("shots", "joint shots", "seeds", "gradients under shots", "noise under shots"), _STEP)
_SIGNS = "values are no means of signs, but sums of such means"
_ESTIMATES = "one direction's estimate scatters around the gradient"
_SPSA = dict.fromkeys(("input gradient", "weight gradient", "gradients under shots", "stacking"), _ESTIMATES)
_COMBINED = dict.fromkeys(("shots", "joint shots", "gradients under shots", "noise under shots"), _SIGNS)
_SEED = {"seed": None, "without": {"seeds": "a sampler draws from a seed of its own, given when it is made"}}

LISTED: dict[str, Listed] = {
    "auto": Listed(lambda: load_backend("auto")),
    "fourier": Listed(lambda: load_backend("fourier")),
    "statevector": Listed(lambda: load_backend("statevector")),
    "tensor_network": Listed(lambda: load_backend("tensor_network")),
    "tensor_network, mps": Listed(lambda: load_backend("tensor_network", method="mps")),
    "pennylane, default.qubit": Listed(lambda: load_backend("pennylane")),
    "pennylane, default.qubit, adjoint": _pennylane("default.qubit", diff_method="adjoint"),
    "pennylane, default.mixed": Listed(lambda: load_backend("pennylane", device="default.mixed")),
    "pennylane, lightning.qubit": _pennylane("lightning.qubit"),
    "pennylane, default.clifford": _pennylane("default.clifford", "stim", clifford=True),
    "pennylane, default.tensor": _pennylane("default.tensor", "quimb"),
    "qiskit": Listed(lambda: load_backend("qiskit"), fast=False),
    "qiskit, density_matrix": _aer("density_matrix"),
    "qiskit, matrix_product_state": _aer("matrix_product_state"),
    "qiskit, stabilizer": _aer("stabilizer", clifford=True),
    "qiskit, extended_stabilizer": _aer("extended_stabilizer", clifford=True),
    "qiskit, a coupling map": Listed(lambda: load_backend("qiskit", coupling_map=_LINE), fast=False),
    "qiskit, a device (GenericBackendV2)": Listed(_device, options=_modeled(_device), fast=False),
    "qiskit, a device of IBM's (FakeManilaV2)": Listed(_ibm, "qiskit_ibm_runtime", _modeled(_ibm), fast=False),
    "qiskit, a SamplerV2 (StatevectorSampler)": Listed(_sampler, options=lambda: _SEED, fast=False),
    "any, parameter shifts": Listed(lambda: differentiate("statevector")),
    "any, finite differences": Listed(
        lambda: differentiate("statevector", "finite-diff"), options=lambda: {"without": _SCATTERED}
    ),
    "any, SPSA": Listed(lambda: differentiate("statevector", "spsa"), options=lambda: {"without": _SPSA}),
    "any, distributed": Listed(lambda: distribute("statevector", ThreadPoolExecutor(2), 3)),
    "any, ZeroNoise": Listed(
        lambda: ZeroNoise("statevector"),
        options=lambda: {"without": {**_COMBINED, "noise": "values are to be those without noise"}},
    ),
}


def present(name: str) -> bool:
    """Whether what a backend needs is installed."""
    return not LISTED[name].needs or find_spec(LISTED[name].needs) is not None


def conformance(name: str) -> Conformance:
    """The suite on a backend of the page."""
    listed = LISTED[name]
    return backend_conformance(listed.load(), name=name, **listed.options())


def row(name: str, found: Conformance | None) -> str:
    """A row of the table; None where what the backend needs is not installed."""
    cells = ["?"] * len(CHECKS) if found is None else [CELLS[found.status(check)] for check in CHECKS]
    return f"| {name} | {' | '.join(cells)} |"


def notes(name: str, found: Conformance | None) -> str:
    """Why a backend does not do what it does not; empty where there is nothing to say."""
    if found is None:
        return f"* **{name}**: `{LISTED[name].needs}` was not installed where this page was made."
    lines = [f"* **{name}**"]
    for reason, refused in found.refusals().items():
        lines.append(f"  * {', '.join(refused)}: {reason}")
    return "\n".join(lines) if len(lines) > 1 else ""


def capabilities(results: Mapping[str, Conformance | None]) -> str:
    """The page down to the costs."""
    header = f"| backend | {' | '.join(CHECKS)} |\n|---|{'---|' * len(CHECKS)}"
    rows = "\n".join(row(name, found) for name, found in results.items())
    said = "\n".join(filter(None, (notes(name, found) for name, found in results.items())))
    return f"""<!-- Generated by `python -m benchmarks.backends`: change that, not this. -->

# Backends

What `qconv.testing.backend_conformance` finds of every backend. "yes": every case passes. "partly": the cases that the
backend takes pass, it refuses the others. "no": it refuses; its own words are below the table.

{header}
{rows}

* **values, gradients**: of six circuits (a kernel on three wires; shared and scaled weights, controlled and three-wire
  gates; re-uploading; amplitudes; Clifford angles; one wire) against dense matrices and their differences, to 1e-8 in
  double precision, and values to 1e-5 in float32.
* **batches**: each patch and filter is the same alone, among others and in reverse; no patches give no values.
* **shots**: means of signs that scatter by the binomial law, no more and no less. **joint shots**: observables that one
  measurement serves are read off the same bits, and equal patches draw bits of their own. **seeds**: the k-th call
  repeats; calls and seeds differ. **gradients under shots**: within what parameter shifts of as many shots scatter.
* **noise**: depolarizing, amplitude damping and misread bits against density matrices, exactly and by the binomial law.
  A device is compared with Aer's simulation of its own noise.
* **stacking**: a layer on a layer, values and the gradients of images and both layers' weights.
* **bad input**: no number of shots, shapes and dtypes that do not fit are refused.

To check a backend of your own: `backend_conformance(YourBackend()).raise_for_faults()`.

## What is refused

{said}
"""


# --- costs ------------------------------------------------------------------------------------------------------------


def costs(rounds: int) -> str:
    """The section on costs, measured now."""
    circuit = kernel("strongly_entangling", 4)
    noise = NoiseModel((("CNOT", Channel("depolarizing", 0.01)),))
    ways: dict[str, tuple[dict[str, Any], bool]] = {
        "exact": ({}, False),
        "exact, with gradients": ({}, True),
        f"{SHOTS} shots": ({"shots": SHOTS}, False),
        "noise": ({"noise": noise}, False),
    }
    lines = []
    for name, listed in LISTED.items():
        if not present(name):
            continue
        cells = [_cost(listed, circuit, options, training, rounds) for options, training in ways.values()]
        lines.append(f"| {name} | {' | '.join(cells)} |")
        print(lines[-1], flush=True)
    clifford = ", ".join(name.rpartition(" ")[2] for name, listed in LISTED.items() if listed.clifford)
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "pennylane", "qiskit", "qiskit-aer"))
    return f"""{COSTS}

Microseconds a patch of "strongly_entangling" on four wires, depth 2, one filter, four observables, in float32: medians
of {rounds} rounds on {PATCHES} patches ({FEW_PATCHES} where a backend takes one after another). Measured on
{datetime.now(UTC):%Y-%m-%d} with torch on {torch.get_num_threads()} threads, {platform.system()}, {packages}.
Layers on images are faster than this where the backend convolves: [performance.md](performance.md). A cell is empty
where the backend refuses, as said above. Simulators of Clifford gates ({clifford}) were given angles that are multiples
of pi/2, the others any.

| backend | {" | ".join(ways)} |
|---|{"---|" * len(ways)}
{chr(10).join(lines)}
"""


def _cost(listed: Listed, circuit: Any, options: dict[str, Any], training: bool, rounds: int) -> str:
    patches = PATCHES if listed.fast else FEW_PATCHES
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(patches, circuit.n_inputs, generator=generator)
    w = torch.randn(1, circuit.n_weights, generator=generator)
    if listed.clifford:
        x, w = (2 * x).round() / 2, (2 * w / math.pi).round() * math.pi / 2  # features turn by pi
    if "shots" in options:
        options = {"seed": listed.options().get("seed", 0), **options}
    try:
        compiled = compile_differentiable(as_backend(listed.load()), circuit, **options)

        def call() -> None:
            if not training:
                with torch.no_grad():
                    compiled(x, w)
                return
            a, b = x.clone().requires_grad_(), w.clone().requires_grad_()
            compiled(a, b).sum().backward()

        call()
    except ValueError:  # what the backend refuses, Unsupported and options that it needs
        return ""
    square = torch.rand(256, 256, generator=generator)

    def steady() -> None:  # tells disturbed rounds, and runs in all of them: slow calls run in the first few
        square @ square

    microseconds = 1e6 * alternate({"steady": steady, "call": call}, rounds).timings["call"].median / patches
    return f"{float(f'{microseconds:.3g}'):,g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--timings", action="store_true", help="measure the costs too, on a quiet machine")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=PAGE)
    options = parser.parse_args()
    results: dict[str, Conformance | None] = {}
    for name in LISTED:
        results[name] = conformance(name) if present(name) else None
        print(row(name, results[name]), flush=True)
    _, _, before = options.out.read_text().partition(COSTS) if options.out.exists() else ("", "", "")
    kept = f"{COSTS}{before}" if before else UNMEASURED
    options.out.write_text(f"{capabilities(results)}\n{costs(options.rounds) if options.timings else kept}")
    for found in filter(None, results.values()):
        found.raise_for_faults()


if __name__ == "__main__":
    main()
