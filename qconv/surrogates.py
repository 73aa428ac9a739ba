"""Classical surrogates: a kernel run once on a finite grid of inputs, by any backend, and then deployed without one.

A circuit that reads its inputs by rotations is a trigonometric polynomial of them. As many values as it has
coefficients, on an even grid, fix it: a discrete Fourier transform gives the coefficients, and from then on no circuit
runs. Statistical errors of shots go through the same linear map.

Source: Schuld, Sweke & Meyer, Phys. Rev. A 103, 032430 (2021) for the frequencies; Schreiber, Eisert & Meyer
(arXiv:2206.11740) for the surrogates.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm, pi, prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from circuits.circuit import Circuit
from circuits.gates import AMPLITUDE
from circuits.noise import NoiseModel
from qconv.backends.loading import as_backend
from qconv.backends.protocol import Backend, Compiled, Unsupported, measurement_settings
from qconv.fourier_conv import MAX_COEFFICIENTS, FourierConv2d, Spectrum, polynomial
from qconv.patches import Pair, pad

Real = NDArray[np.float64]
MAX_DENOMINATOR = 1000
# Grid points times amplitudes sent to a backend in one call: 64 MB of complex128.
AMPLITUDES_A_CALL = 2**22


def spectrum_of(circuit: Circuit) -> Spectrum:
    """The waves of each input that a circuit can make: an upper bound that its gates alone decide.

    Every angle that reads input j with scale s, in a gate whose generator has the spectral gaps g, adds a frequency 0
    or +-|s| g. They are whole multiples of their greatest common divisor w_j, up to L_j w_j, the sum of the largest.

    Args:
        circuit: With at least one input.

    Returns:
        L_j and w_j for each input; a grid that fixes the polynomial has prod(spectrum.sizes) points.

    Raises:
        Unsupported: For an amplitude encoding, which divides by a norm and is no polynomial, and for computed features.
        ValueError: For a circuit without inputs, or an input whose frequencies have no common divisor.

    Source: Schuld, Sweke & Meyer, Phys. Rev. A 103, 032430 (2021), equations 6 to 10.
    """
    if circuit.n_inputs == 0:
        raise ValueError("circuit reads 0 inputs: a surrogate needs at least 1, such as Angle('input', 0)")
    if circuit.features:
        raise Unsupported(
            f"circuit has {len(circuit.features)} angles that are computed from features (products, thresholds ...), "
            "which no trigonometric polynomial of the features is: encode by rotations, such as encoding='angle', or "
            "keep the layer as it is"
        )
    gaps: list[list[tuple[float, ...]]] = [[] for _ in range(circuit.n_inputs)]
    for gate in circuit.gates:
        if gate.name == AMPLITUDE:
            raise Unsupported(
                f"circuit encodes {len(gate.angles)} amplitudes, divided by their norm, which is no trigonometric "
                "polynomial and has no finite grid: encode by rotations, such as encoding='angle', or keep the "
                "'statevector' backend"
            )
        for angle, frequencies in zip(gate.angles, gate.spec.frequencies, strict=True):
            if angle.source == "input" and angle.scale:
                gaps[angle.index].append(tuple(abs(angle.scale) * gap for gap in frequencies))
    degrees, bases = [], []
    for index, entries in enumerate(gaps):
        base = _common_divisor(sorted({gap for entry in entries for gap in entry}), index)
        bases.append(base)
        degrees.append(round(sum(max(entry) for entry in entries) / base))
    return Spectrum(tuple(degrees), tuple(bases))


def _common_divisor(frequencies: Sequence[float], index: int) -> float:
    if not frequencies:
        return pi  # an input that nothing reads: any frequency does
    smallest = frequencies[0]
    ratios = []
    for frequency in frequencies:
        ratio = Fraction(frequency / smallest).limit_denominator(MAX_DENOMINATOR)
        if abs(float(ratio) * smallest - frequency) > 1e-12 * frequency:
            raise ValueError(
                f"input {index} is read with the frequencies {smallest!r} and {frequency!r} (radians a unit), whose "
                f"ratio is no fraction with a denominator up to {MAX_DENOMINATOR}, so no finite grid holds them: use "
                "scales that are whole multiples of one number"
            )
        ratios.append(ratio)
    return smallest * gcd(*(r.numerator for r in ratios)) / lcm(*(r.denominator for r in ratios))


def _along(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Apply one matrix to each of the last axes: (..., m_1, .., m_n) -> (..., k_1, .., k_n)."""
    first = values.ndim - len(matrices)
    for axis, matrix in enumerate(matrices):
        values = (values.movedim(first + axis, -1) @ matrix.T).movedim(-1, first + axis)
    return values


def _errors(variances: Tensor, spectrum: Spectrum, patches: Tensor) -> Tensor:
    """Standard errors at patches (P, n) from variances (rows, points) of the grid's values: (P, rows).

    A prediction is sum_g D_g(x) v_g with D the product of the inputs' Dirichlet kernels, and the grid's values are
    independent, so its variance is sum_g D_g(x)^2 var(v_g): all covariances of the coefficients are in it.
    """
    with torch.no_grad():
        transforms = [torch.from_numpy(matrix).to(patches) for matrix in spectrum.transforms()]
        waves = spectrum.waves(patches)
        squares = [(matrix.T @ wave).square() for matrix, wave in zip(transforms, waves, strict=True)]
        return polynomial(variances.reshape(-1, *spectrum.sizes), squares).sqrt().t()


class Surrogate(nn.Module):
    """A kernel as the trigonometric polynomial that a grid of its values fixes; made by `surrogate`.

    Attributes:
        spectrum: Degree and base frequency of each input.
        coefficients: (F, n_obs, K) of the waves' products, K = prod(spectrum.sizes), the last input's wave fastest.
        variances: (F, n_obs, K) of the grid's values, the last input's point fastest; None from an exact backend.
        shots: Samples a circuit; None for exact values.
        executions: Circuits that the grid cost: points times filters times measurement settings, each run `shots`
            times.
    """

    coefficients: Tensor
    variances: Tensor | None

    def __init__(
        self, circuit: Circuit, spectrum: Spectrum, values: Tensor, shots: int | None, one: bool, dtype: torch.dtype
    ) -> None:
        """See `surrogate`; values are (F, n_obs, m_1, .., m_n) in float64."""
        super().__init__()
        self.circuit, self.spectrum, self.shots, self._one = circuit, spectrum, shots, one
        self._a_patch = len(values) * len(measurement_settings(circuit.observables))
        self.executions = self._a_patch * prod(spectrum.sizes)
        transforms = [torch.from_numpy(matrix).to(values) for matrix in spectrum.transforms()]
        self.register_buffer("coefficients", _along(values, transforms).flatten(2).to(dtype))
        variances = None
        if shots is not None:
            # Divided by shots - 1, the measured 1 - v^2 estimates the variance of v without bias. One shot alone says
            # nothing of its spread: then the largest variance stands.
            spread = (1 - values.square()).clamp(min=0) / (shots - 1) if shots > 1 else torch.ones_like(values)
            variances = spread.flatten(2).to(dtype)
        self.register_buffer("variances", variances)

    def forward(self, inputs: Tensor) -> Tensor:
        """Evaluate the polynomial, as `simulate` would the circuit.

        Args:
            inputs: (P, n_inputs), of the surrogate's dtype.

        Returns:
            (P, n_obs), or (P, F, n_obs) if the weights were (F, n_weights). With shots, values may leave [-1, 1] by
            their errors. Differentiable in inputs.
        """
        self._check(inputs)
        rows = self.coefficients.reshape(-1, *self.spectrum.sizes)
        return self._shaped(polynomial(rows, self.spectrum.waves(inputs)).t())

    def standard_error(self, inputs: Tensor) -> Tensor:
        """Standard errors of `forward`'s values that shots leave, all covariances included.

        Args:
            inputs: (P, n_inputs).

        Returns:
            As forward; 0 from an exact backend. Errors at different inputs are not independent: they come from the
            same grid.
        """
        self._check(inputs)
        if self.variances is None:
            return torch.zeros_like(self(inputs))
        return self._shaped(_errors(self.variances.flatten(0, 1), self.spectrum, inputs))

    @property
    def coefficient_errors(self) -> Tensor:
        """Standard errors of the coefficients, (F, n_obs, K); 0 from an exact backend."""
        if self.variances is None:
            return torch.zeros_like(self.coefficients)
        squares = [torch.from_numpy(matrix).to(self.variances).square() for matrix in self.spectrum.transforms()]
        grid = self.variances.reshape(*self.variances.shape[:2], *self.spectrum.sizes)
        return _along(grid, squares).flatten(2).sqrt()

    def direct_executions(self, input_shape: Sequence[int]) -> int:
        """Circuits that evaluating inputs of shape (P, n_inputs) on the backend itself costs."""
        if len(input_shape) != 2 or input_shape[1] != self.circuit.n_inputs:
            raise ValueError(
                f"input_shape is {tuple(input_shape)}: give (patches, {self.circuit.n_inputs}), or ask the layer that "
                ".conv2d(...) makes about images"
            )
        return input_shape[0] * self._a_patch

    def rows(self, per_filter: Tensor, out_channels: int, groups: int = 1) -> Tensor:
        """Rows of output channels from (F, n_obs, K), as QuantumConv2d orders them, surplus outputs dropped.

        Raises:
            ValueError: If the filters do not make so many channels in so many groups.
        """
        filters, observables = per_filter.shape[:2]
        needed = groups * -(-out_channels // (groups * observables))
        if filters != needed:
            raise ValueError(
                f"surrogate has {filters} filters of {observables} observables but {out_channels} output channels in "
                f"{groups} groups take {needed}: change out_channels or groups, or give weights of shape "
                f"({needed}, n_weights)"
            )
        return per_filter.reshape(groups, -1, per_filter.shape[2])[:, : out_channels // groups].flatten(0, 1)

    def conv2d(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: Tensor | None = None,
        padding_mode: str = "zeros",
    ) -> SurrogateConv2d:
        """The surrogate as the kernel of a convolution, frozen.

        Args:
            in_channels: As nn.Conv2d; a group's patch has as many numbers as the circuit inputs.
            out_channels: As nn.Conv2d; filters times observables, surplus ones dropped as in QuantumConv2d.
            kernel_size: As nn.Conv2d.
            stride: As nn.Conv2d.
            padding: As nn.Conv2d.
            dilation: As nn.Conv2d.
            groups: As nn.Conv2d.
            bias: (out_channels,), added to the outputs; None for none.
            padding_mode: As nn.Conv2d.

        Raises:
            ValueError: If patches or channels do not fit the circuit.
        """
        layer = SurrogateConv2d.frozen(
            self.rows(self.coefficients, out_channels, groups),
            self.spectrum,
            in_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
        )
        layer.variances = None if self.variances is None else self.rows(self.variances, out_channels, groups).clone()
        # Each group has patches and filters of its own.
        layer.executions, layer.a_patch, layer.shots = self.executions, self._a_patch, self.shots
        return layer

    def extra_repr(self) -> str:
        """What was measured."""
        return (
            f"inputs={self.circuit.n_inputs}, degrees={self.spectrum.degrees}, filters={len(self.coefficients)}, "
            f"observables={len(self.circuit.observables)}, shots={self.shots}, executions={self.executions}"
        )

    def _check(self, inputs: Tensor) -> None:
        if inputs.ndim != 2 or inputs.shape[1] != self.circuit.n_inputs:
            raise ValueError(
                f"circuit takes {self.circuit.n_inputs} inputs but inputs have shape {tuple(inputs.shape)}: give "
                f"(patches, {self.circuit.n_inputs})"
            )
        if inputs.dtype != self.coefficients.dtype:
            raise ValueError(
                f"inputs are {inputs.dtype} but the surrogate is {self.coefficients.dtype}: convert one with .to(dtype)"
            )

    def _shaped(self, values: Tensor) -> Tensor:
        filters, observables = self.coefficients.shape[:2]
        return values.reshape(-1, observables) if self._one else values.reshape(-1, filters, observables)


class SurrogateConv2d(FourierConv2d):
    """A FourierConv2d whose coefficients were measured, and which knows their errors; made by `Surrogate.conv2d`.

    Attributes:
        variances: (out_channels, K) of the grid's values; None from an exact backend.
        shots: Samples a circuit; None for exact values.
        executions: Circuits that the grid cost.
        a_patch: Circuits that one patch costs on the backend itself, all groups together.
    """

    variances: Tensor | None
    shots: int | None
    executions: int
    a_patch: int

    def __init__(self, *args: Any, **options: Any) -> None:
        """See FourierConv2d."""
        super().__init__(*args, **options)
        self.register_buffer("variances", None)

    def standard_error(self, images: Tensor) -> Tensor:
        """Standard errors of the outputs that shots leave; quantizing the coefficients adds its own.

        Args:
            images: (B, C, H, W) or (C, H, W).

        Returns:
            Shaped as the outputs; 0 from an exact backend.
        """
        if self.variances is None:
            return torch.zeros_like(self(images))
        variances = self.variances

        def errors(batch: Tensor) -> Tensor:
            return self._over_patches(
                pad(batch, self.geometry), variances, lambda patches, rows: _errors(rows, self.spectrum, patches)
            )

        return self._on_batch(images, errors)

    def direct_executions(self, input_shape: Sequence[int]) -> int:
        """Circuits that one image (C, H, W), or a batch (B, C, H, W), costs on the backend itself."""
        if len(input_shape) not in (3, 4) or input_shape[-3] != self.in_channels:
            raise ValueError(
                f"input_shape is {tuple(input_shape)}: give ({self.in_channels}, height, width) or a batch of them"
            )
        height, width = self.geometry.output_size(input_shape[-2], input_shape[-1])
        return prod(input_shape[:-3]) * height * width * self.a_patch


def surrogate(
    circuit: Circuit,
    weights: Tensor,
    backend: str | Backend = "auto",
    shots: int | None = None,
    *,
    noise: NoiseModel | None = None,
    seed: int | None = None,
) -> Surrogate:
    """Run a kernel on the finite grid of its inputs' frequencies, by any backend, and interpolate.

    Exact backends give the kernel itself, to rounding, re-uploading circuits included; shots and noise give what the
    device does, with standard errors. No gradients flow to the weights.

    Args:
        circuit: Reads its inputs by rotations.
        weights: (n_weights,), or (F, n_weights) for several filters at once; float32 or float64. The grid is run in
            float64 and the result stored in their dtype.
        backend: A backend's name, or a backend of your own.
        shots: Samples a circuit; None for exact values.
        noise: Channels after gates; None for none.
        seed: Makes shots repeatable.

    Returns:
        The polynomial: call it with inputs (P, n_inputs), or make it a layer with `.conv2d(...)`.

    Raises:
        Unsupported: For an amplitude encoding, or what the backend cannot run.
        ValueError: For scales without a common divisor, a grid of more than 2^16 points, or weights that do not fit;
            all before anything runs.

    Source: Schreiber, Eisert & Meyer, Classical surrogates for quantum learning models (arXiv:2206.11740).
    """
    if not circuit.observables:
        raise ValueError("circuit has 0 observables: add at least one with circuit.with_observables(('Z...',))")
    if not isinstance(weights, Tensor):
        raise ValueError(
            f"weights are a {type(weights).__name__}: give a torch.Tensor, such as torch.as_tensor(weights)"
        )
    if weights.ndim not in (1, 2) or weights.shape[-1] != circuit.n_weights:
        raise ValueError(
            f"circuit takes {circuit.n_weights} weights but weights have shape {tuple(weights.shape)}: give "
            f"({circuit.n_weights},) or (filters, {circuit.n_weights})"
        )
    if weights.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"weights are {weights.dtype}: give torch.float32 or torch.float64")
    spectrum = spectrum_of(circuit)
    points = prod(spectrum.sizes)
    if points > MAX_COEFFICIENTS:
        raise ValueError(
            f"circuit is a polynomial of {points} coefficients an observable (degrees {spectrum.degrees} of its "
            f"{circuit.n_inputs} inputs) but up to {MAX_COEFFICIENTS} are kept: use fewer inputs or fewer uploads"
        )
    runner = as_backend(backend)
    compiled = runner.compile(circuit, shots=shots, noise=noise, seed=seed)
    with torch.no_grad():
        filters = weights.detach().double()
        values = _sample(compiled, spectrum, filters[None] if weights.ndim == 1 else filters, circuit.n_wires)
        return Surrogate(circuit, spectrum, values, shots, weights.ndim == 1, weights.dtype)


def _sample(compiled: Compiled, spectrum: Spectrum, weights: Tensor, wires: int) -> Tensor:
    """Values on the grid: weights (F, n_weights) -> (F, n_obs, m_1, .., m_n)."""
    axes = [torch.from_numpy(points).to(weights) for points in spectrum.points()]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, -2)
    a_call = max(1, AMPLITUDES_A_CALL // (2**wires * len(weights)))
    values = torch.cat([compiled(part, weights) for part in torch.split(grid, a_call)])
    return values.movedim(0, -1).reshape(*values.shape[1:], *spectrum.sizes)
