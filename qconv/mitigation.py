"""Errors of a noisy device made smaller without correcting them: extrapolation to zero noise, inverted readout errors.

Both wrap a backend and are backends themselves, so they go where a backend goes: into a layer, `simulate`, and one into
the other. What they gain in bias they pay for in variance: mitigated values scatter more under shots, and may leave
[-1, 1].

Other methods are mitiq's (extra `mitiq`, which wants NumPy below 2.3). Its functions take an executor, a function of a
circuit of Qiskit's, which any backend can be:

    def run(circuit: QuantumCircuit) -> float:
        read = from_qiskit(circuit, observables=["ZII"])
        return float(simulate(read, none, none, backend="statevector", noise=noise))  # none: torch.zeros(1, 0)

    mitiq.zne.execute_with_zne(to_qiskit(kernel).assign_parameters(numbers), run)

Source: Temme, Bravyi & Gambetta, Phys. Rev. Lett. 119, 180509 (2017) and Li & Benjamin, Phys. Rev. X 7, 021050 (2017)
for extrapolation; Giurgica-Tiron et al., Digital zero noise extrapolation (arXiv:2005.10921) for folding; Bravyi,
Sheldon, Kandala, McKay & Gambetta (arXiv:2006.14044), section II, for inverted readout errors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from circuits.circuit import Circuit, Gate
from circuits.gates import GATES
from circuits.naming import unknown
from circuits.noise import NoiseModel, ReadoutError
from qconv.backends.loading import as_backend
from qconv.backends.protocol import Backend, Compiled, Real, check_options
from qconv.gradients import compile_differentiable

EXTRAPOLATIONS = ("linear", "richardson", "exponential")
# A measured bit that tells less than this of the qubit cannot be inverted.
LEAST_FACTOR = 1e-3
# Beyond [-1, 1] by more than shots explain: a decay that says so was none.
WILD = 1.5


def fold(circuit: Circuit, scale: float, gates: Iterable[str] | None = None) -> Circuit:
    """The same circuit with more gates: G becomes G G^-1 G ..., which does nothing more but collect noise.

    Noise that commutes with its gate is scaled exactly; of other noise a part of first order stays, half the difference
    between it before and behind the gate.

    Args:
        circuit: The circuit; a state preparation stays as it is.
        scale: How many times as many of those gates it shall have, at least 1. Odd numbers are met exactly; others by
            folding some gates once more, spread evenly, to the nearest number (see `folded_scale`).
        gates: Names of the gates to fold; None for all. Noise that follows some gates only is scaled as those are;
            where a gate's inverse has another name (S and Sdg), the noise must follow both.

    Raises:
        ValueError: For a scale below 1, an unknown gate, or no gate to fold.

    Source: Giurgica-Tiron et al. (arXiv:2005.10921), section II, folding of gates.
    """
    if not 1 <= scale < float("inf"):
        raise ValueError(f"scale is {scale}: give a number of at least 1")
    places = _foldable(circuit, gates)
    if scale > 1 and not places:
        raise ValueError(f"circuit has 0 gates to fold ({gates or 'all'} asked): its noise cannot be scaled by {scale}")
    pairs = round((scale - 1) * len(places) / 2)
    folded: list[Gate] = []
    for position, gate in enumerate(circuit.gates):
        folded.append(gate)
        if position in places:
            k = places[position]
            times = (k + 1) * pairs // len(places) - k * pairs // len(places)
            folded += [gate.inverse(), gate] * times
    return Circuit(circuit.n_wires, tuple(folded), circuit.observables)


def _foldable(circuit: Circuit, gates: Iterable[str] | None) -> dict[int, int]:
    """Positions of gates to fold, each with its number among them."""
    names = None if gates is None else set(gates)
    for name in names or ():
        if name not in GATES:
            raise unknown("gate to fold", name, GATES)
    places = (
        k for k, g in enumerate(circuit.gates) if g.spec.inverse is not None and (names is None or g.name in names)
    )
    return {position: k for k, position in enumerate(places)}


def folded_scale(circuit: Circuit, scale: float, gates: Iterable[str] | None = None) -> float:
    """The scale that `fold` reaches: 1 + 2 k / d for the nearest whole k, d gates to fold."""
    d = len(_foldable(circuit, gates))
    return 1 + 2 * round((scale - 1) * d / 2) / d if d else 1.0


def extrapolation_weights(scales: Sequence[float], kind: str) -> Real:
    """Weights c_k with value(0) = sum c_k value(scale_k).

    Args:
        scales: At least two, all different.
        kind: "linear" (least squares) or "richardson" (the polynomial through all points).

    Raises:
        ValueError: For an unknown kind, or fewer than two different scales.
    """
    if kind not in EXTRAPOLATIONS[:2]:
        raise unknown("extrapolation", kind, EXTRAPOLATIONS[:2])
    _check_scales(scales)
    degree = 1 if kind == "linear" else len(scales) - 1
    # The constant term of the fit is linear in the values.
    return np.asarray(np.linalg.pinv(np.vander(np.array(scales, dtype=float), degree + 1))[-1], dtype=np.float64)


def _check_scales(scales: Sequence[float]) -> None:
    if len(scales) < 2 or len(set(scales)) != len(scales) or not all(1 <= scale < float("inf") for scale in scales):
        raise ValueError(f"scales are {tuple(scales)}: give at least 2 different numbers of at least 1")


@runtime_checkable
class Folding(Protocol):
    """A backend that may run circuits of other gates than are written, and then folds those gates itself."""

    def folded(self, scale: int) -> Backend | None:
        """The same backend with scale times as many of its gates, for an odd scale; None if it runs what is written."""
        ...


@runtime_checkable
class Placing(Protocol):
    """A backend that may run circuits on qubits of its own choice."""

    def measured_qubits(self, circuit: Circuit, shots: int | None) -> list[list[int]] | None:
        """The qubits that the wires are measured on, by measurement setting; None where wires stay where they are."""
        ...

    def placed(self, qubits: Sequence[int]) -> Backend:
        """The same backend with wires on these qubits."""
        ...


def _folding(backend: Backend, scale: int) -> Backend | None:
    """See Folding; also of a backend inside of others."""
    if isinstance(backend, Folding):
        return backend.folded(scale)
    inner = getattr(backend, "backend", None)
    own = _folding(inner, scale) if isinstance(inner, Backend) else None
    if own is None:
        return None
    # Not by copy.copy, which loses executors.
    wrapper: Backend = object.__new__(type(backend))
    vars(wrapper).update({**vars(backend), "backend": own})
    return wrapper


class _ZeroNoiseCompiled:
    """See ZeroNoise; its parts are those of Composed, one a scale."""

    differentiable = True
    evaluates_again = False

    def __init__(self, parts: Iterable[tuple[Circuit, Compiled]], scales: list[float], kind: str, limit: float) -> None:
        self.parts = tuple(parts)
        self._scales, self._kind, self._limit = scales, kind, limit
        self._linear = extrapolation_weights(scales, "richardson" if kind == "richardson" else "linear")

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        values = torch.stack([part(inputs, weights) for _, part in self.parts], dim=-1)
        factors = torch.as_tensor(self._linear, dtype=values.dtype, device=values.device)
        linear = values @ factors
        return linear if self._kind != "exponential" else self._decayed(values, linear)

    def _decayed(self, values: Tensor, linear: Tensor) -> Tensor:
        """Values extrapolated as a decay to the limit, or linearly where there is none to see."""
        scales = torch.as_tensor(self._scales, dtype=values.dtype, device=values.device)
        above = values - self._limit
        one_side = (above > 0).all(-1) | (above < 0).all(-1)
        size = torch.where(one_side[..., None], above.abs(), 1.0)
        # A line through log |value - limit|. Errors of equal size in the values are larger in small values' logarithms,
        # which the squares make up for.
        weights = (size / size.amax(-1, keepdim=True)).square()
        s0, s1, s2 = (weights.sum(-1), (weights * scales).sum(-1), (weights * scales.square()).sum(-1))
        t0, t1 = (weights * size.log()).sum(-1), (weights * scales * size.log()).sum(-1)
        determinant = s0 * s2 - s1.square()
        # Where the values after the first are nothing beside it, no line is left to be told.
        seen = one_side & (determinant > 1e-4 * s0 * s2) & (s0 * t1 < s1 * t0)
        intercept = (s2 * t0 - s1 * t1) / torch.where(seen, determinant, 1.0)
        fitted = self._limit + above[..., 0].sign() * torch.where(seen, intercept, 0.0).exp()
        return torch.where(seen & (fitted.detach().abs() < WILD), fitted, linear)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: the circuits of all scales."""
        return sum((part.counts(patches, filters) for _, part in self.parts), Counter[str]())


@dataclass(frozen=True)
class ZeroNoise:
    """A backend whose values are extrapolated to zero noise, from circuits with folded gates.

    Every circuit runs once a scale, with `shots` each; gradients flow through all of them. Where circuits are
    transpiled (a device, a noise model of Qiskit's), all noisy gates of the transpiled circuits are folded, those of
    routing included, since a transpiler removes folds of the kernel.

    Args:
        backend: Where the circuits run: a backend, its name, or a device of Qiskit's.
        scales: How much noise, at least two of at least 1; 1 is the circuit itself. Odd where circuits are transpiled.
        extrapolation: "linear" (least squares), "richardson" (polynomial through all scales: less bias, much variance)
            or "exponential" (decay to `limit` by weighted least squares of the logarithm; values that cross it, or do
            not decay to it, are extrapolated linearly).
        gates: Names of the gates to fold; None for those that the noise model names, or all without one (where noise is
            part of the backend).
        limit: What values decay to as noise grows, for "exponential"; 0 suits depolarizing noise and flips, while under
            relaxation no single limit suits all observables: extrapolate linearly there.

    Raises:
        ValueError: For scales or an extrapolation that do not exist; when compiled, for noise that would not grow by
            the scales.

    Example:
        QuantumConv2d(1, 4, 2, backend=ZeroNoise("statevector"), noise=NoiseModel((("CNOT", channel),)))
    """

    backend: str | Backend
    scales: tuple[float, ...] = (1.0, 3.0, 5.0)
    extrapolation: str = "linear"
    gates: tuple[str, ...] | None = None
    limit: float = 0.0

    def __post_init__(self) -> None:
        _accept(self)
        object.__setattr__(self, "scales", tuple(self.scales))
        _check_scales(self.scales)
        if self.extrapolation not in EXTRAPOLATIONS:
            raise unknown("extrapolation", self.extrapolation, EXTRAPOLATIONS)

    @property
    def name(self) -> str:
        """Name of the backend, and what is done to its values."""
        return f"{_loaded(self.backend).name} (zero-noise extrapolation, {self.extrapolation})"

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> _ZeroNoiseCompiled:
        """See Backend."""
        check_options(shots, noise, seed)
        runs, reached = self._runs(circuit, noise)
        parts = [
            (own, compile_differentiable(backend, own, shots=shots, noise=noise, seed=_seed_of(seed, k)))
            for k, (backend, own) in enumerate(runs)
        ]
        return _ZeroNoiseCompiled(parts, reached, self.extrapolation, self.limit)

    def _runs(self, circuit: Circuit, noise: NoiseModel | None) -> tuple[list[tuple[Backend, Circuit]], list[float]]:
        """What runs which circuit at each scale, and the scales that are reached."""
        backend = _loaded(self.backend)
        if _folding(backend, 1) is not None:
            if self.gates is not None or any(scale % 2 != 1 for scale in self.scales):
                raise ValueError(
                    f"scales are {self.scales} and gates {self.gates}, but {backend.name} transpiles circuits into "
                    "gates of its own, all of which are folded: give odd scales, such as (1, 3, 5), and no gates"
                )
            folding = [_folding(backend, int(scale)) for scale in self.scales]
            return [(own, circuit) for own in folding if own is not None], list(self.scales)
        gates = self.gates
        if gates is None and noise is not None and noise.after:
            names = {entry[0] for entry in noise.after}
            gates = None if "*" in names else tuple(sorted(names))
        reached = [folded_scale(circuit, scale, gates) for scale in self.scales]
        places = _foldable(circuit, gates)
        if len(set(reached)) != len(reached):
            raise ValueError(
                f"scales {self.scales} become {tuple(reached)} on a circuit with {len(places)} gates to fold: give "
                "scales further apart, such as (1, 3, 5), or name other gates"
            )
        for gate in (circuit.gates[place] for place in places):
            if noise is not None and noise.channels_after(gate) != noise.channels_after(gate.inverse()):
                raise ValueError(
                    f"noise model has not the same channels after {gate.name} and after its inverse "
                    f"{gate.inverse().name}, so folds do not multiply the noise: give both the same"
                )
        return [(backend, fold(circuit, scale, gates)) for scale in self.scales], reached


class _InvertedCompiled:
    """See ReadoutInversion; its one part, as of Composed, measures more observables."""

    differentiable = True
    evaluates_again = False

    def __init__(self, circuit: Circuit, measured: Compiled, matrix: Real, constant: Real) -> None:
        self.parts = ((circuit, measured),)
        self._measured, self._matrix, self._constant = measured, matrix, constant

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        values = self._measured(inputs, weights)
        matrix, constant = (
            torch.as_tensor(a, dtype=values.dtype, device=values.device) for a in (self._matrix, self._constant)
        )
        return values @ matrix + constant

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled."""
        return self._measured.counts(patches, filters)


@dataclass(frozen=True)
class ReadoutInversion:
    """A backend whose readout errors are inverted: each wire's confusion matrix is undone on the measured values.

    A misread bit's sign has the mean offset + factor * (true mean), so the product of (sign - offset) / factor over an
    observable's wires is unbiased. Its expansion needs the observable on subsets of its wires too, which are read off
    the same shots. The variance grows by about 1 / factor^2 a wire.

    Args:
        backend: Where the circuits run: a backend, its name, or a device of Qiskit's.
        errors: A ReadoutError of every wire, or {wire: ReadoutError}, such as `measure_readout` returns; None for those
            of the noise model.

    Raises:
        ValueError: When compiled without errors and without a noise model's, or for errors that leave no information.
    """

    backend: str | Backend
    errors: ReadoutError | Mapping[int, ReadoutError] | None = None

    def __post_init__(self) -> None:
        _accept(self)

    @property
    def name(self) -> str:
        """Name of the backend, and what is done to its values."""
        return f"{_loaded(self.backend).name} (readout inverted)"

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> _InvertedCompiled:
        """See Backend."""
        check_options(shots, noise, seed)
        if self.errors is None and (noise is None or noise.readout is None):
            raise ValueError(
                "readout inversion has no errors to invert: give errors=measure_readout(...), or a noise model with "
                "readout=..."
            )
        known = noise if self.errors is None else NoiseModel(readout=self.errors)
        assert known is not None
        known.check_wires(circuit.n_wires)
        sums = [_inverted(observable, known) for observable in circuit.observables]
        # The observables first: the subsets then join their measurement settings.
        strings = tuple(dict.fromkeys([*circuit.observables, *(text for terms in sums for text in terms)]))
        identity = "I" * circuit.n_wires
        strings = tuple(text for text in strings if text != identity)
        matrix = np.array([[terms.get(text, 0.0) for terms in sums] for text in strings])
        constant = np.array([terms.get(identity, 0.0) for terms in sums])
        backend = _loaded(self.backend)
        asked = circuit.with_observables(strings)
        measured = compile_differentiable(backend, asked, shots=shots, noise=noise, seed=seed)
        return _InvertedCompiled(asked, measured, matrix, constant)


def _inverted(observable: str, noise: NoiseModel) -> dict[str, float]:
    """An observable as a sum of measured ones."""
    choices: list[list[tuple[str, float]]] = []
    for wire, letter in enumerate(observable):
        error = noise.readout_of(wire) if letter != "I" else None
        if error is None:
            choices.append([(letter, 1.0)])
            continue
        if abs(error.factor) < LEAST_FACTOR:
            raise ValueError(
                f"readout of wire {wire} has p1_given_0 = {error.p1_given_0} and p0_given_1 = {error.p0_given_1}, "
                "about 1 together: its bit says nothing of the qubit and cannot be inverted"
            )
        parts = [(letter, 1 / error.factor), ("I", -error.offset / error.factor)]
        choices.append([(own, number) for own, number in parts if number])
    terms = [("".join(own for own, _ in term), prod(number for _, number in term)) for term in product(*choices)]
    return dict(terms)


def measure_readout(
    backend: Any,
    circuit: int | Circuit,
    *,
    shots: int | None = 10_000,
    noise: NoiseModel | None = None,
    seed: int | None = None,
) -> dict[int, ReadoutError]:
    """Readout errors of every wire, from two circuits: all qubits in |0>, and all in |1> by one X each.

    An X that is noisy counts as an error of the readout.

    Args:
        backend: Where the circuits run, or its name.
        circuit: Number of wires; of a device that places circuits on qubits of its own choice the circuit whose errors
            are to be inverted (`layer.circuit`), since the errors are those of the qubits that it ends on.
        shots: Samples of each of the two circuits; None for exact values.
        noise: As of Backend.compile.
        seed: As of Backend.compile.

    Returns:
        By wire.

    Raises:
        ValueError: For a number of wires where a device chooses the qubits, or a circuit whose measurement settings end
            on different ones.
    """
    check_options(shots, noise, seed)
    if not isinstance(circuit, int | Circuit):
        raise ValueError(
            f"circuit is a {type(circuit).__name__}: give a Circuit, such as layer.circuit, or a number of wires"
        )
    n_wires = circuit if isinstance(circuit, int) else circuit.n_wires
    runner = _where_measured(_loaded(backend), circuit, shots)
    observables = tuple("I" * wire + "Z" + "I" * (n_wires - wire - 1) for wire in range(n_wires))
    none = torch.zeros(1, 0, dtype=torch.float64)
    means: list[list[float]] = []
    for k, flips in enumerate(((), tuple(Gate("X", (wire,)) for wire in range(n_wires)))):
        asked = Circuit(n_wires, flips, observables)
        compiled = runner.compile(asked, shots=shots, noise=noise, seed=_seed_of(seed, k))
        means.append(compiled(none, none)[0, 0].clamp(-1, 1).tolist())
    zero, one = means
    return {wire: ReadoutError((1 - zero[wire]) / 2, (1 + one[wire]) / 2) for wire in range(n_wires)}


def _where_measured(backend: Backend, circuit: int | Circuit, shots: int | None) -> Backend:
    """A backend whose wires are on the qubits that the circuit's are measured on."""
    inner: Any = backend
    while not isinstance(inner, Placing) and isinstance(getattr(inner, "backend", None), Backend):
        inner = inner.backend
    if not isinstance(inner, Placing):
        return backend
    if isinstance(circuit, int):
        ends = Circuit(circuit, (Gate("X", (0,)),), ("Z" * circuit,))
        if inner.measured_qubits(ends, shots) is None:
            return backend
        raise ValueError(
            f"circuit is a number of wires, {circuit}, but {backend.name} chooses the qubits of each circuit: give the "
            "circuit itself, such as layer.circuit, so that the qubits are measured that it ends on"
        )
    places = inner.measured_qubits(circuit, shots)
    if places is None:
        return backend
    if any(other != places[0] for other in places):
        apart = sorted({tuple(place) for place in places})
        raise ValueError(
            f"measurement settings of the circuit end on different qubits, {apart}, so no error of a wire holds for "
            "all: give observables of one setting, circuit.with_observables(...), here and to ReadoutInversion"
        )
    if inner is not backend:
        raise ValueError(f"{backend.name} wraps a backend that places circuits on qubits: give that backend itself")
    placed = inner.placed(places[0])
    assert isinstance(placed, Placing)
    check = Circuit(circuit.n_wires, (Gate("X", (0,)),), ("Z" * circuit.n_wires,))
    if placed.measured_qubits(check, shots) != places[:1]:
        raise ValueError(f"{backend.name} does not keep to the qubits {places[0]}: measure on another device")
    return placed


def _seed_of(seed: int | None, k: int) -> int | None:
    """A seed of its own for each of several circuits, so that their shots are not the same draws."""
    return None if seed is None else int(np.random.SeedSequence([seed, k]).generate_state(1)[0])


def _accept(wrapper: ZeroNoise | ReadoutInversion) -> None:
    if not isinstance(wrapper.backend, str):
        object.__setattr__(wrapper, "backend", as_backend(wrapper.backend))


def _loaded(backend: Any) -> Backend:
    return as_backend(backend)
