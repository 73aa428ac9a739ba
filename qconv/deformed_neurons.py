"""What quantum-deformed layers share: the parameters of their gates, the moments that these give, and the circuit.

See deformed.py for what these neurons are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from math import pi
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from circuits.circuit import Circuit
from circuits.naming import unknown
from qconv.binary_laws import operations, transverse
from qconv.binary_neurons import BinaryNeurons, Terms, monomial_operations, monomials
from qconv.deformed_circuit import count_threshold, neuron_angles, neuron_circuit
from qconv.deformed_pairs import INPUTS, LINEAR, READOUT, SQUARE, SQUARING, columns, tiling
from qconv.patches import Pair

DEFORMATIONS = ("none", "input", "traceless", "pair", "neighbors")


class DeformedNeurons(BinaryNeurons):
    """What deformed layers share: the parameters of the gates, and the moments that they give."""

    first: Tensor
    second: Tensor
    rest: Tensor
    angle: nn.Parameter | None
    offset: nn.Parameter | None
    gate: nn.Parameter | None

    def _deform(self, deformation: str, inputs: str) -> None:
        """Add the parameters of the gates, all drawn from N(0, 0.1)."""
        if deformation not in DEFORMATIONS:
            raise unknown("deformation", deformation, DEFORMATIONS)
        if inputs not in INPUTS:
            raise unknown("inputs", inputs, INPUTS)
        self.deformation, self.inputs = deformation, inputs
        shapes = {}
        if deformation != "none":
            shapes["angle"] = (1, *self.weight.shape[1:]) if deformation == "input" else tuple(self.weight.shape)
        if deformation in ("pair", "neighbors"):
            shapes["offset"] = tuple(self.weight.shape)
        if deformation == "neighbors":
            taps = self._flat(self.weight).shape
            self._index()
            shapes["gate"] = (*taps[:-1], len(self.first), 4)
        for name in ("angle", "offset", "gate"):
            made = nn.Parameter(self.weight.new_empty(shapes[name])) if name in shapes else None
            self.register_parameter(name, made)
            if made is not None:
                nn.init.normal_(made, 0, 0.1)

    def _index(self) -> None:
        """Which taps are neighbors, as buffers that follow from the kernel and are no part of the state."""
        for name, index in zip(("first", "second", "rest"), tiling(*self._kernel()), strict=True):
            self.register_buffer(name, torch.as_tensor(index, device=self.weight.device), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Moved to an empty tensor (to_empty) they would hold anything.
        if "first" in self._buffers:
            self._index()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        # With assign=True parameters may come to another device than the layer was built on.
        if "first" in self._buffers:
            self._index()

    def _flat(self, tensor: Tensor) -> Tensor:
        """Weight-like, with all taps of a kernel on the last axis."""
        raise NotImplementedError

    def _kernel(self) -> Pair:
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator: N(0, 1/2), and N(0, 0.1) for the gates."""
        super().reset_parameters()
        # None yet while the layer is being built.
        for name in ("angle", "offset", "gate"):
            if getattr(self, name, None) is not None:
                nn.init.normal_(getattr(self, name), 0, 0.1)

    def check_hardenable(self) -> None:
        """See BinaryWeights; a deformed neuron is no network of bits."""
        if self.deformation != "none":
            raise ValueError(
                f"deformation is {self.deformation!r}: only deformation 'none' has binary weights to draw, since the "
                "other gates are not permutations of bits"
            )

    def eigenvalues(self) -> tuple[Tensor, Tensor]:
        """Of each synapse's observable: tanh(d + w) and tanh(d - w), of weight's shape."""
        if self.offset is None:
            theta = self.theta()
            return theta, -theta
        return torch.tanh(self.offset + self.weight), torch.tanh(self.offset - self.weight)

    def _center_and_radius(self) -> tuple[Tensor, Tensor]:
        high, low = self.eigenvalues()
        return (high + low) / 2, (high - low) / 2

    def synapse_coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """(c0, c1, c2) of each synapse's observable c0 + c1 X + c2 S, without the gates on neighbors."""
        center, radius = self._center_and_radius()
        angle = torch.zeros_like(self.weight) if self.angle is None else self.angle
        return center, radius * torch.sin(angle), radius * torch.cos(angle)

    def terms(self) -> Terms:
        """See BinaryNeurons."""
        if self.deformation == "none":
            return super().terms()
        c0, c1, c2 = self.synapse_coefficients()
        squares = c0**2
        mean, variance = {"h": c2}, {"hh": -(c2**2)}
        if self.inputs == "coherent":
            mean["X"] = c1
            squares = squares + c1**2
            variance = {"hh": c1**2 - c2**2, "hX": -2 * c1 * c2}
        constant = None
        if self.offset is not None:
            variance |= {"h": -2 * c0 * c2}
            if self.inputs == "coherent":
                variance |= {"X": -2 * c0 * c1}
            constant = c0.flatten(1).sum(1)
        return Terms(mean, variance, constant, self.fan_in - squares.flatten(1).sum(1))

    def pair_coefficients(self) -> tuple[Tensor, Tensor]:
        """Of each pair of synapses, mean of the sum and of the product of its two agreements.

        Returns:
            Both (..., pairs, 3, 3): coefficients on (1, h, X) of the first input times (1, h, X) of the second.
        """
        assert self.angle is not None
        assert self.gate is not None
        center, radius, angle = map(self._flat, (*self._center_and_radius(), self.angle))
        c, r, a = (x.index_select(-1, self.first) for x in (center, radius, angle))
        cc, rr, aa = (x.index_select(-1, self.second) for x in (center, radius, angle))
        x, y, yy, zz = self.gate.unbind(-1)
        # A gate's swing after RY on either qubit, which turns about the third axis of J and the first of K.
        cos, sin, ccos, csin = torch.cos(a / 2), torch.sin(a / 2), torch.cos(aa / 2), torch.sin(aa / 2)
        left = columns(cos, x * cos + y * sin, y * cos - x * sin, sin, 1 + x * x + y * y)
        right = columns(ccos, -csin, yy * ccos - zz * csin, zz * ccos + yy * csin, 1 + yy * yy + zz * zz)
        # What S1, SS and -1S become.
        one, both, other = (u[..., :, None] * v[..., None, :] for u, v in zip(left, right, strict=True))
        r, rr, c, cc = (t[..., None, None] for t in (r, rr, c, cc))
        table = torch.as_tensor(READOUT, dtype=a.dtype, device=a.device)
        found = []
        for matrix, constant in (
            (r * one - rr * other, c + cc),
            (cc * r * one + r * rr * both - c * rr * other, c * cc),
        ):
            on_monomials = (matrix.flatten(-2) @ table).reshape(matrix.shape)
            found.append(on_monomials + F.pad(constant, (0, 2, 0, 2)))
        return found[0], found[1]

    def _pair_terms(self, with_variance: bool) -> tuple[Tensor, Tensor | None]:
        """Coefficients (..., pairs, m, m) of the pairs' moments, on (1, monomials) of either input."""
        total, product = self.pair_coefficients()
        n = 1 + len(LINEAR[self.inputs])
        total, product = total[..., :n, :n], product[..., :n, :n]
        if not with_variance:
            return total, None
        n_squares = 1 + len(SQUARE[self.inputs])
        table = torch.as_tensor(SQUARING[self.inputs], dtype=total.dtype, device=total.device)
        flat = total.flatten(-2)
        square = ((flat[..., :, None] * flat[..., None, :]).flatten(-2) @ table).reshape(
            *total.shape[:-2], n_squares, n_squares
        )
        missing = n_squares - n
        # The second moment of a sum of two bits is 2 + 2 E[product].
        second = F.pad(2 * product, (0, missing, 0, missing)) + F.pad(
            total.new_full((1, 1), 2.0), (0, n + missing - 1) * 2
        )
        return total, second - square

    def sums(self, h: Tensor, with_variance: bool) -> tuple[Tensor, Tensor | None]:
        """See BinaryNeurons."""
        if self.deformation != "neighbors":
            return super().sums(h, with_variance)
        single = self.terms()
        of_mean, of_variance = self._pair_terms(with_variance)
        names = (SQUARE if with_variance else LINEAR)[self.inputs]
        found = monomials(h, names)
        mean = self._sum_over(
            found, LINEAR[self.inputs], of_mean, single.mean, self._flat(self._center_and_radius()[0])
        )
        if of_variance is None:
            return mean, None
        c0, c1, _ = map(self._flat, self.synapse_coefficients())
        alone = 1 - c0**2 - (c1**2 if self.inputs == "coherent" else 0)
        return mean, self._sum_over(found, names, of_variance, single.variance, alone)

    def _sum_over(
        self, found: dict[str, Tensor], names: Sequence[str], pairs: Tensor, single: dict[str, Tensor], alone: Tensor
    ) -> Tensor:
        """Sum over all synapses: those in pairs by (..., pairs, m, m), the others by their own terms."""
        order = torch.argsort(torch.cat([self.first, self.second, self.rest]))

        def of_taps(k: int, rest: Tensor) -> Tensor:
            parts = [pairs[..., k, 0], pairs[..., 0, k], rest.index_select(-1, self.rest)]
            return torch.cat(parts, -1).index_select(-1, order).reshape(self.weight.shape)

        coefficients = [of_taps(k + 1, self._flat(single[name])) for k, name in enumerate(names)]
        constant = pairs[..., 0, 0].flatten(1).sum(1) + alone.index_select(-1, self.rest).flatten(1).sum(1)
        features = [found[name] for name in names]
        result = self.contract(features, coefficients, constant)
        return result + self.contract_pairs(features, pairs[..., 1:, 1:]) if len(self.first) else result

    def contract_pairs(self, features: Sequence[Tensor], coefficients: Tensor) -> Tensor:
        """Sum over pairs of synapses and products of a feature each: coefficients (..., pairs, m, m)."""
        raise NotImplementedError

    def synapses(self, patches: Tensor, rows: slice) -> tuple[Tensor, Tensor | None]:
        """See BinaryNeurons."""
        if self.deformation == "none":
            return super().synapses(patches, rows)
        x = transverse(patches) if self.inputs == "coherent" else torch.zeros_like(patches)
        c0, c1, c2 = (c[rows].flatten(1) for c in self.synapse_coefficients())
        means = c0 + c1 * x[:, None] + c2 * patches[:, None]
        if self.deformation != "neighbors":
            return means, None
        shape = self._flat(self.weight).shape[1:]
        known = torch.unflatten(torch.stack([torch.ones_like(x), patches, x], -1), 1, shape)
        one, other = (
            known.index_select(-2, self.first).flatten(1, -2),
            known.index_select(-2, self.second).flatten(1, -2),
        )
        # A product of matrices for each pair: einsum over both features would tie exported programs to one batch size.
        features = (one[..., :, None] * other[..., None, :]).flatten(-2).transpose(0, 1)
        total, product = (
            torch.bmm(features, c[rows].flatten(1, -3).flatten(2).permute(1, 2, 0)).permute(1, 2, 0)
            for c in self.pair_coefficients()
        )
        laws = torch.stack([(1 - total + product) / 4, (1 - product) / 2, (1 + total + product) / 4], -1)
        alone = torch.unflatten(means, 2, shape).index_select(-1, self.rest)
        return alone.flatten(2), laws

    def _sum_operations(self, with_variance: bool, units: int, read: int) -> tuple[int, Counter[str]]:
        if self.deformation != "neighbors":
            return super()._sum_operations(with_variance, units, read)
        levels = [LINEAR[self.inputs], *([SQUARE[self.inputs]] if with_variance else [])]
        assert self.gate is not None
        pairs = self.gate[0].numel() // 4
        macs = sum(self.fan_in * len(names) + pairs * len(names) ** 2 for names in levels)
        # Products of neighbors across and, for the last column of an odd kernel, down: a map each, at most.
        height, width = self._kernel()
        directions = (width > 1) + (width % 2 == 1 and height > 1)
        maps = directions * sum(len(names) ** 2 for names in levels)
        return macs, operations(read, monomial_operations(levels[-1]) + Counter(mul=maps))

    def circuit(self, output: int = 0) -> Circuit:
        """The circuit of one output in eval mode: its observable is the exact 2q - 1, whatever the layer's law.

        Run it with `circuit_inputs` and `circuit_weights`. It has 2 N wires for N synapses (3 N for mixed inputs), and
        some log2 N for the count; see neuron_circuit.

        Args:
            output: Which row of weights.

        Raises:
            ValueError: For an output that is not there; for a layer that gives no 2q - 1: a hard one, which gives
                signs, or one with output "moments" or "mean", which gives the sum itself.
        """
        self._check_output(output)
        with torch.no_grad():
            scale, shift = self._threshold_line(output)
        n = self.fan_in
        threshold, falling = count_threshold(n, scale, shift)
        mixed, deformed = self.inputs == "mixed", self.deformation != "none"
        return neuron_circuit(n, self._pairs_of_inputs(), threshold, falling, deformed, mixed)

    def _threshold_line(self, output: int) -> tuple[float, float]:
        if self.norm is None:
            return 1.0, 0.0 if self.bias is None else float(self.bias[output])
        norm = self.norm
        scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
        return float(scale[output]), float((norm.bias - norm.running_mean * scale)[output])

    def _check_output(self, output: int) -> None:
        if self.hard:
            raise ValueError(
                "hard is True: the layer gives signs, but a circuit probabilities, where a weight of 0 is a fair coin; "
                "take the circuit of the layer as it was before binarize"
            )
        if self.output in ("moments", "mean"):
            raise ValueError(
                f"the layer's output is {self.output!r}, of the sum of agreements, but a circuit answers with 2q - 1, "
                "the mean of the bit that tells the sum's sign: build the layer with output='activation', which loads "
                "the same state_dict"
            )
        if not 0 <= output < len(self.weight):
            raise ValueError(f"output is {output}: the layer has outputs 0 to {len(self.weight) - 1}")

    def _pairs_of_inputs(self) -> tuple[tuple[int, int], ...]:
        if self.deformation != "neighbors":
            return ()
        taps = self._kernel()[0] * self._kernel()[1]
        offsets = range(0, self.fan_in, taps)
        pairs = list(zip(self.first.tolist(), self.second.tolist(), strict=True))
        return tuple((o + i, o + j) for o in offsets for i, j in pairs)

    def circuit_inputs(self, h: Tensor) -> Tensor:
        """Means of input bits, (P, N), as inputs of the circuit: x with h = -cos(pi x)."""
        return torch.arccos(-h) / pi

    def circuit_weights(self, output: int = 0) -> Tensor:
        """Angles of the circuit of one output, in radians; see neuron_circuit. Errors as `circuit`."""
        self._check_output(output)
        with torch.no_grad():
            theta, *eigenvalues = (t[output].flatten() for t in (self.theta(), *self.eigenvalues()))
            angle = None if self.angle is None else self.angle[0 if len(self.angle) == 1 else output].flatten()
            gate = None if self.gate is None else self.gate[output].reshape(-1, 4)
            return neuron_angles(theta, eigenvalues[0], eigenvalues[1], angle, gate)

    def extra_repr(self) -> str:
        """The arguments that define the layer."""
        return f"{super().extra_repr()}, deformation={self.deformation!r}, inputs={self.inputs!r}"
