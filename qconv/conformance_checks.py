"""What the conformance suite checks: each check compares a backend with dense matrices, or with the binomial law."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from math import pi
from typing import Any

import numpy as np
import torch
from scipy.special import chdtri  # type: ignore[import-untyped]
from torch import Tensor

from circuits.circuit import Circuit
from circuits.kernels import kernel
from circuits.noise import Channel, NoiseModel, ReadoutError
from qconv.backends.protocol import Backend, Unsupported
from qconv.conformance_cases import BEHIND_T, COINS, HALVES, USUAL, Case
from qconv.dense import Real, dense_values, differences
from qconv.gradients import compile_differentiable
from qconv.layers import QuantumConv2d

# Of a sound backend one value in 5e8 is further off.
SIGMAS = 6.0
# Of the spread of many values: one seed in 1e6 fails.
TAIL = 5e-7
SHOTS = 400
FLOAT32 = 1e-5

NOISE = NoiseModel(
    (("CNOT", Channel("depolarizing", 0.05)), ("Rot", Channel("amplitude_damping", 0.1))),
    readout=ReadoutError(0.02, 0.1),
)
_FLIPS = NoiseModel((("CNOT", Channel("bit_flip", 0.1)),))

_GRADIENTS: dict[tuple[str, tuple[int, ...], int], Real] = {}


class Suite:
    """The checks, on one backend.

    Each yields (case, deviation, bound), raises Unsupported where the backend refuses, or AssertionError.
    """

    def __init__(self, backend: Backend, reference: Backend | None, atol: float, seed: int | None) -> None:
        self.backend, self._reference, self._atol, self._seed = backend, reference, atol, seed

    def run(self, circuit: Circuit, x: Real, w: Real, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
        """Values, without gradients."""
        options.setdefault("seed", None if options.get("shots") is None else self._seed)
        compiled = compile_differentiable(self.backend, circuit, **options)
        with torch.no_grad():
            return compiled(torch.from_numpy(x).to(dtype), torch.from_numpy(w).to(dtype))

    def exact(self, circuit: Circuit, x: Real, w: Real, noise: NoiseModel | None = None) -> Real:
        """What is right."""
        if self._reference is None:
            return dense_values(circuit, x, w, noise)
        compiled = self._reference.compile(circuit, noise=noise)
        return np.asarray(compiled(torch.from_numpy(x), torch.from_numpy(w)).detach().double().numpy())

    def usual(self, attempt: Callable[[Case], Any]) -> Any:
        """What an attempt gives on the first usual case that is not refused."""
        refusal: Unsupported | None = None
        for case in USUAL:
            try:
                return attempt(case)
            except Unsupported as reason:
                refusal = refusal or reason
        assert refusal is not None
        raise refusal

    def exact_gradient(self, case: Case, numbers: tuple[Real, Real], factors: Real, of: int) -> Real:
        """Of the sum of right values times factors, with respect to inputs (0) or weights (1)."""

        def loss(moved: Real) -> Real:
            pair = [moved if k == of else given for k, given in enumerate(numbers)]
            return np.asarray((self.exact(case.circuit, pair[0], pair[1]) * factors).sum())

        if self._reference is not None:
            return self._gradient_on(self._reference, case.circuit, numbers, factors, of).numpy()
        # The same for every backend, and most of the suite's time.
        key = case.name, factors.shape, of
        if key not in _GRADIENTS:
            _GRADIENTS[key] = differences(loss, numbers[of])
        return _GRADIENTS[key]

    # --- exact values and slopes --------------------------------------------------------------------------------------

    def values(self, case: Case) -> Iterator[tuple[float, float]]:
        """Exact values, in either precision."""
        x, w = case.numbers(3, 2)
        want = self.exact(case.circuit, x, w)
        yield _off(self.run(case.circuit, x, w), want), self._atol
        yield _off(self.run(case.circuit, x, w, torch.float32), want, torch.float32), max(FLOAT32, self._atol)

    def _slopes(self, case: Case, of: int) -> Iterator[tuple[float, float]]:
        numbers = case.numbers(2, 2)
        # Unequal, so that errors do not cancel.
        factors = np.linspace(0.5, 1.5, 4 * len(case.circuit.observables)).reshape(2, 2, -1)
        got = self.gradient(case.circuit, numbers, factors, of)
        want = self.exact_gradient(case, numbers, factors, of)
        yield _off(got, want), self._atol * max(1.0, float(np.abs(want).max(initial=0)))

    def gradient(self, circuit: Circuit, numbers: tuple[Real, Real], factors: Real, of: int, **options: Any) -> Tensor:
        """Of the sum of values times factors, with respect to inputs (0) or weights (1)."""
        return self._gradient_on(self.backend, circuit, numbers, factors, of, **options)

    @staticmethod
    def _gradient_on(
        backend: Backend, circuit: Circuit, numbers: tuple[Real, Real], factors: Real, of: int, **options: Any
    ) -> Tensor:
        pair = [torch.from_numpy(given).requires_grad_(k == of) for k, given in enumerate(numbers)]
        values = compile_differentiable(backend, circuit, **options)(pair[0], pair[1])
        return torch.autograd.grad((values * torch.from_numpy(factors)).sum(), pair[of])[0]

    def input_slopes(self, case: Case) -> Iterator[tuple[float, float]]:
        """Gradients of exact values with respect to features."""
        yield from self._slopes(case, 0)

    def weight_slopes(self, case: Case) -> Iterator[tuple[float, float]]:
        """Gradients of exact values with respect to weights."""
        yield from self._slopes(case, 1)

    def batches(self) -> tuple[float, float]:
        """Each patch and filter gives the same alone and among others in any order; no patches give no values."""

        def attempt(case: Case) -> tuple[float, float]:
            # Features 0 and 1 and weights 0 make outcomes certain, so that shots can be compared too.
            circuit = kernel("strongly_entangling", 3, 1)
            x, w = case.numbers(7, 3)
            options: dict[str, Any] = {}
            try:
                together = self.run(circuit, x, w)
            except Unsupported:
                if self._reference is not None:
                    raise
                x, w, options = np.random.default_rng(0).choice([0.0, 1.0], (7, 3)), w * 0, {"shots": 16}
                together = self.run(circuit, x, w, **options)
                if (together.abs() < 1).any():
                    raise Unsupported(
                        "outcomes that should be certain are not: give reference=, a backend that simulates the device"
                    ) from None
            worst = max(
                _off(self.run(circuit, x[k : k + 1], w, **options), together[k : k + 1].numpy()) for k in range(len(x))
            )
            for f in range(len(w)):
                alone = self.run(circuit, x, w[f : f + 1], **options)
                worst = max(worst, _off(alone, together[:, f : f + 1].numpy()))
            worst = max(worst, _off(self.run(circuit, x[::-1].copy(), w, **options).flip(0), together.numpy()))
            empty = self.run(circuit, x[:0], w, **options)
            if empty.shape != (0, len(w), 3):
                raise AssertionError(f"no patches give shape {tuple(empty.shape)} instead of (0, {len(w)}, 3)")
            return worst, self._atol

        result: tuple[float, float] = self.usual(attempt)
        return result

    # --- shots --------------------------------------------------------------------------------------------------------

    def shots(self, noise: NoiseModel | None = None) -> tuple[float, float]:
        """Values are means of signs, within the binomial bound, and scatter as such means do."""

        def attempt(case: Case, rows: int = 20, shots: int = SHOTS) -> tuple[float, float]:
            x, w = case.numbers(rows, 1)
            got = self.run(case.circuit, x, w, shots=shots, noise=noise).numpy()
            want = self.exact(case.circuit, x, w, noise)
            ups = (1 + got) / 2 * shots
            if np.abs(ups - ups.round()).max() > 1e-6:
                raise AssertionError(f"values are no means of {shots} signs: one is {got.flat[0]:.9g}")
            variance = np.clip(1 - want**2, 0, None) / shots
            # Rounding of the exact value decides where it is certain.
            scores = np.abs(got - want) / np.sqrt(variance + 1e-9)
            for k, observable in enumerate(case.circuit.observables):
                _check_spread(observable, scores[..., k][variance[..., k] > 0.1 / shots], shots)
            return float(scores.max()), SIGMAS

        result: tuple[float, float] = self.usual(attempt)
        with suppress(Unsupported):
            # Few, since who approximates gates that are not Clifford takes a tenth of a second for each.
            result = max(result, attempt(BEHIND_T, rows=1, shots=60))
        return result

    def joint_shots(self) -> tuple[float, float]:
        """Observables that one measurement serves are read off the same bits; equal patches draw bits of their own."""
        x, w = torch.full((10, 3), 0.5, dtype=torch.float64), torch.zeros(2, 0, dtype=torch.float64)

        def draw(shots: int) -> Tensor:
            compiled = compile_differentiable(self.backend, COINS, shots=shots, seed=self._seed)
            with torch.no_grad():
                return torch.cat([compiled(x, w).flatten(0, 1) for _ in range(2)])

        a, b, c, *products = draw(1).unbind(1)
        for name, product, measured in zip(COINS.observables[3:], (a * b, b * c, a * b * c), products, strict=True):
            wrong = int(((product - measured).abs() > 1e-6).sum())
            if wrong:
                raise AssertionError(
                    f"{name} of single shots differs from the product of its bits in {wrong} of {len(product)}: "
                    "observables that one measurement serves are measured apart"
                )
        values = draw(SHOTS)[:, :3]
        different = len(np.unique(values.numpy(), axis=0))
        # Two draws are equal by chance once in 4e4, so that two pairs of 780 are in one seed of 5,000, three in 1e6.
        if different < len(values) - 2:
            raise AssertionError(
                f"{len(values)} draws of equal patches, filters and calls give {different} different values: some "
                "repeat the shots of others"
            )
        return 0.0, 0.0

    def sampled_slopes(self) -> tuple[float, float]:
        """Gradients under shots scatter around the exact ones no more than parameter shifts do."""

        def attempt(case: Case) -> tuple[float, float]:
            circuit, numbers = case.circuit, case.numbers(2, 1)
            factors = np.linspace(0.5, 1.5, 2 * len(circuit.observables)).reshape(2, 1, -1)
            worst = 0.0
            for of, source in enumerate(("input", "weight")):
                got = self.gradient(circuit, numbers, factors, of, shots=SHOTS, seed=self._seed).numpy()

                want = self.exact_gradient(case, numbers, factors, of)
                # A Pauli rotation's slope is half the difference of two measured values, each of variance 1/shots at
                # most; a weight's sums over patches.
                scale = np.zeros(numbers[of].shape[1])
                for angle in (angle for gate in circuit.gates for angle in gate.angles if angle.source == source):
                    scale[angle.index] += angle.scale**2 / 2
                each = np.abs(factors).sum(2) ** 2 / SHOTS
                variance = (each if of == 0 else each.sum(0)[:, None]) * scale
                worst = max(worst, float((np.abs(got - want) / np.sqrt(variance)).max()))
            return worst, SIGMAS

        result: tuple[float, float] = self.usual(attempt)
        return result

    def seeds(self) -> tuple[float, float]:
        """The k-th call repeats under the same seed; calls, and seeds, differ."""

        def attempt(case: Case) -> tuple[float, float]:
            pair = [torch.from_numpy(given) for given in case.numbers(6, 2)]
            calls = []
            for seed in (3, 3, 4):
                compiled = compile_differentiable(self.backend, case.circuit, shots=SHOTS, seed=seed)
                with torch.no_grad():
                    calls.append([compiled(pair[0], pair[1]) for _ in range(2)])
            for k in range(2):
                if not torch.equal(calls[0][k], calls[1][k]):
                    raise AssertionError(f"call {k + 1} does not repeat under the same seed")
            if torch.equal(*calls[0]):
                raise AssertionError("two calls of one compiled circuit draw the same shots")
            if torch.equal(calls[0][0], calls[2][0]):
                raise AssertionError("seeds 3 and 4 draw the same shots")
            return 0.0, 0.0

        result: tuple[float, float] = self.usual(attempt)
        return result

    # --- noise, layers, bad input -------------------------------------------------------------------------------------

    def noise(self) -> tuple[float, float]:
        """Noisy exact values are those of density matrices."""

        def attempt(case: Case) -> tuple[float, float]:
            x, w = case.numbers(3, 2)
            got = self.run(case.circuit, x, w, noise=NOISE)
            return _off(got, dense_values(case.circuit, x, w, NOISE)), self._atol

        result: tuple[float, float] = self.usual(attempt)
        return result

    def noisy_shots(self) -> tuple[float, float]:
        """Noisy shots follow the binomial law of the density matrix's values."""
        return self.shots(NOISE)

    def stacking(self) -> Iterator[tuple[str, float, float]]:
        """A layer on a layer: values, and gradients of images and both layers' weights."""
        first = kernel("strongly_entangling", 2, 1)
        second = kernel("basic_entangler", 2, 1, readout=["ZI", "XX"])
        # Clifford outcomes are -1, 0 and 1, which are Clifford angles again.
        ways = ((False, None), (True, None), (False, 10 * SHOTS), (True, 10 * SHOTS))
        numbers, got, slopes, shots = self._first_stack(first, second, ways)
        factors = np.linspace(0.5, 1.5, got.numel()).reshape(got.shape)

        def values(images: Real, w1: Real, w2: Real) -> Real:
            # (B, 1, 1, 3): the two patches of (1, 2) pixels, each made two channels, which the second layer takes.
            patches = np.stack([images[:, 0, 0, :2], images[:, 0, 0, 1:]], axis=1).reshape(-1, 2)
            channels = self.exact(first, patches, w1)[:, 0]
            made = self.exact(second, channels, w2)[:, 0]
            return made.reshape(len(images), 2, 2).transpose(0, 2, 1)[:, :, None]

        want = values(*numbers)
        if shots is not None:
            # An error of the first layer's values turns the second one's angles by pi times as much.
            bound = SIGMAS * (1 + 2 * pi) / np.sqrt(shots)
            yield "values under shots", _off(got, want), bound
            for name, slope in zip(("images", "first weights", "second weights"), slopes, strict=True):
                if not (torch.isfinite(slope).all() and slope.abs().max() > 0):
                    raise AssertionError(f"no gradient reaches the {name}: it is {slope.flatten()[:3].tolist()}")
            return
        yield "values", _off(got, want), self._atol
        for of, (name, slope) in enumerate(zip(("images", "first weights", "second weights"), slopes, strict=True)):

            def loss(moved: Real, of: int = of) -> Real:
                given = [moved if k == of else number for k, number in enumerate(numbers)]
                return np.asarray((values(given[0], given[1], given[2]) * factors).sum())

            right = differences(loss, numbers[of])
            yield f"gradient of {name}", _off(slope, right), self._atol * max(1.0, float(np.abs(right).max()))

    def _first_stack(
        self, first: Circuit, second: Circuit, ways: tuple[tuple[bool, int | None], ...]
    ) -> tuple[tuple[Real, Real, Real], Tensor, tuple[Tensor, ...], int | None]:
        refusal: Unsupported | None = None
        for clifford, shots in ways:
            try:
                return *self._stack(first, second, clifford, shots), shots
            except Unsupported as reason:
                refusal = reason
        assert refusal is not None
        raise refusal

    def _stack(
        self, first: Circuit, second: Circuit, clifford: bool, shots: int | None
    ) -> tuple[tuple[Real, Real, Real], Tensor, tuple[Tensor, ...]]:
        rng = np.random.default_rng(0)

        def draw(shape: tuple[int, ...], unit: float) -> Real:
            found = rng.choice(HALVES[:3], shape) if clifford else rng.uniform(0, 1, shape)
            return np.asarray(unit * found)

        images = draw((2, 1, 1, 3), 1.0)
        w1, w2 = draw((1, first.n_weights), pi), draw((1, second.n_weights), pi)
        options: dict[str, Any] = {"backend": self.backend, "shots": shots, "dtype": torch.float64}
        options["seed"] = None if shots is None else self._seed
        layers = (
            QuantumConv2d(1, 2, (1, 2), kernel=first, **options),
            QuantumConv2d(2, 2, 1, kernel=second, **options),
        )
        with torch.no_grad():
            for layer, weight in zip(layers, (w1, w2), strict=True):
                layer.weight.copy_(torch.from_numpy(weight))
        x = torch.from_numpy(images).requires_grad_()
        got = layers[1](layers[0](x))
        factors = torch.linspace(0.5, 1.5, got.numel(), dtype=torch.float64).reshape(got.shape)
        slopes = torch.autograd.grad((got * factors).sum(), (x, layers[0].weight, layers[1].weight))
        return (images, w1, w2), got.detach(), slopes

    def bad_input(self) -> tuple[float, float]:
        """Shots that are no number of at least 1 and tensors that do not fit raise ValueErrors."""
        case = USUAL[1]
        numbers: tuple[Any, ...] = (0, -1, 2.5)
        for shots in numbers:
            _must_refuse(f"shots={shots}", partial(self.backend.compile, case.circuit, shots=shots))

        def attempt(usual: Case) -> Any:
            try:
                return self.backend.compile(usual.circuit)
            except Unsupported:
                return self.backend.compile(usual.circuit, shots=4)

        compiled = self.usual(attempt)
        x, w = (torch.from_numpy(given) for given in case.numbers(2, 1))
        _must_refuse("one feature too few", lambda: compiled(x[:, 1:], w))
        _must_refuse("one weight too few", lambda: compiled(x, w[:, 1:]))
        _must_refuse("half precision", lambda: compiled(x.half(), w.half()))
        _must_refuse("two dtypes", lambda: compiled(x.float(), w))
        return 0.0, 0.0


def _off(got: Tensor, want: Real, dtype: torch.dtype = torch.float64) -> float:
    """Largest difference; NaN where one is."""
    if got.dtype != dtype:
        raise AssertionError(f"result is {got.dtype} instead of {dtype}")
    if tuple(got.shape) != want.shape:
        raise AssertionError(f"result has shape {tuple(got.shape)} instead of {want.shape}")
    return float(np.abs(got.detach().double().numpy() - want).max(initial=0))


def _check_spread(observable: str, scores: Real, shots: int) -> None:
    """Whether errors in units of their standard deviation, independent of each other, scatter as normal ones do."""
    if len(scores) == 0:
        return
    low, high = (float(chdtri(len(scores), above)) for above in (1 - TAIL, TAIL))
    squares = float((scores**2).sum())
    if not low <= squares <= high:
        raise AssertionError(
            f"values of {observable} scatter by {np.sqrt(squares / len(scores)):.3g} times the binomial law, "
            f"{len(scores)} rows of {shots} shots"
        )


def _must_refuse(what: str, call: Callable[[], object]) -> None:
    try:
        call()
    except ValueError:
        return
    raise AssertionError(f"{what} is taken without a ValueError")


BY_CASE: dict[str, Callable[[Suite, Case], Iterator[tuple[float, float]]]] = {
    "values": Suite.values,
    "input gradient": Suite.input_slopes,
    "weight gradient": Suite.weight_slopes,
}
ONCE: dict[str, Callable[[Suite], tuple[float, float]]] = {
    "batches": Suite.batches,
    "shots": Suite.shots,
    "joint shots": Suite.joint_shots,
    "seeds": Suite.seeds,
    "gradients under shots": Suite.sampled_slopes,
    "noise": Suite.noise,
    "noise under shots": Suite.noisy_shots,
    "stacking": lambda suite: worst(suite.stacking()),
    "bad input": Suite.bad_input,
}


def worst(found: Iterator[tuple[str, float, float]]) -> tuple[float, float]:
    """Of several comparisons the one that is furthest from its bound."""
    compared = list(found)
    for name, deviation, bound in compared:
        if not deviation <= bound:
            raise AssertionError(f"{name}: off by {deviation:.3g}, more than {bound:.3g}")
    return max(((d, b) for _, d, b in compared), key=lambda pair: pair[0] / pair[1])
