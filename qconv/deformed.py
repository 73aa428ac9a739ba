"""Quantum-deformed layers: inputs and weights are qubits, turned by trainable gates before agreements are counted.

An input qubit carries the bit of mean h, in the pure state with coherence X = sqrt(1 - h^2) between 0 and 1, or in the
mixture without. Let S be the operator of its bit, with values -1 and +1, and X the flip. A gate Q on an input and a
weight qubit turns their agreement S (x) S into Q^+ (S (x) S) Q. Traced over the weight, it is an observable of the
input qubit alone, c0 + c1 X + c2 S, and any with eigenvalues in [-1, 1] can be had. So a synapse's gate and weight are
three real numbers: eigenvalues tanh(d + w) and tanh(d - w), and an angle a of its axis. The agreement is again a bit,
of mean m = c0 + c1 X + c2 h, and independent of the other synapses': a neuron's law is Poisson-binomial, with moments
sum m and N - sum m^2. Squares of m are polynomials of h and X, so both moments are ordinary convolutions of maps.

"neighbors" entangles the inputs in pairs first, by a gate of SO(4) for each output and pair. The two agreements of a
pair are then correlated, pairs stay independent; see deformed_pairs.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qconv.deformed_neurons import DeformedNeurons
from qconv.patches import Pair
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear


class QuantumDeformedConv2d(DeformedNeurons, ProbabilisticBinaryConv2d):
    """A probabilistic binary convolution whose inputs and weights are qubits, deformed by trainable gates.

    Args:
        in_channels, out_channels, kernel_size, stride, dilation, groups, bias, padding_mode: As
            ProbabilisticBinaryConv2d.
        padding: Likewise; zeros are qubits of h = 0, for coherent inputs in the state (|0> + |1>) / sqrt(2).
        deformation: "none": ProbabilisticBinaryConv2d. "input": an angle for each tap turns the input's qubit, for all
            outputs alike. "traceless": an angle for each synapse. "pair": any gate on the qubits of each input and
            weight. "neighbors": besides, a gate on the inputs of each two neighboring taps (columns 0-1, 2-3, ... of
            the kernel, then rows of a last odd column), for each output and channel.
        inputs: "coherent": superpositions of 0 and 1. "mixed": mixtures.
        law, output, norm, gamma, generator, device, dtype: As ProbabilisticBinaryConv2d. Every law knows the
            covariances of neighbors.

    Attributes:
        weight: w of each synapse, (out_channels, in_channels / groups, height, width).
        angle: a of each synapse (of each tap, for "input"), radians; None for "none".
        offset: d of each synapse; None but for "pair" and "neighbors".
        gate: (out_channels, in_channels / groups, pairs, 4): the swings (x_1, y_1) in J and (y_2, z_2) in K of the
            gates of neighbors, by quaternions (1, x, y, z) / norm; 0 is no gate. The other two of the six angles of
            SO(4) are those of RY on each qubit, `angle`.

    Training: gates start near none, with standard deviation 0.1; rates as for ProbabilisticBinaryConv2d.

    Source: Bondesan & Welling, Quantum Deformed Neural Networks (arXiv:2010.11189). The three numbers a synapse and the
        sums over feature maps are derived above.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        deformation: str = "pair",
        inputs: str = "coherent",
        law: str = "clt",
        output: str = "activation",
        norm: bool = True,
        gamma: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"law": law, "output": output, "norm": norm, "gamma": gamma, "generator": generator}
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            device=device,
            dtype=dtype,
            **options,
        )
        self._deform(deformation, inputs)

    def _flat(self, tensor: Tensor) -> Tensor:
        return tensor.flatten(2)

    def _kernel(self) -> Pair:
        return self.kernel_size

    def contract_pairs(self, features: Sequence[Tensor], coefficients: Tensor) -> Tensor:
        """See DeformedNeurons: products of neighboring pixels as maps, for dominoes across and down."""
        (height, width), (down, across) = self.kernel_size, self.dilation
        maps = torch.stack([torch.unflatten(f, 1, (self.groups, -1)) for f in features], dim=2)
        rows = (maps.shape[-2] - self._reach(0)) // self.stride[0] + 1
        columns = (maps.shape[-1] - self._reach(1)) // self.stride[1] + 1
        flat = height * (width // 2)
        results = []
        for kernel, shift, start, part in (
            ((height, width // 2), (0, across), 0, coefficients[:, :, :flat]),
            ((height // 2, width % 2), (down, 0), (width - 1) * across, coefficients[:, :, flat:]),
        ):
            if 0 in kernel:
                continue
            dilation = (2 * down if shift[0] else down, 2 * across if shift[1] else across)
            # Just the pixels that this kernel reads: with a stride, not all between the first and the last.
            step = [gcd(st, d if k > 1 else st) for st, d, k in zip(self.stride, dilation, kernel, strict=True)]
            tall = (rows - 1) * self.stride[0] + dilation[0] * (kernel[0] - 1) + 1
            wide = (columns - 1) * self.stride[1] + dilation[1] * (kernel[1] - 1) + 1
            here, there = (
                maps[..., r : r + tall : step[0], c : c + wide : step[1]]
                for r, c in ((0, start), (shift[0], start + shift[1]))
            )
            products = (here[:, :, :, None] * there[:, :, None]).flatten(1, 4)
            weight = part.reshape(*part.shape[:2], *kernel, *part.shape[-2:]).movedim((-2, -1), (1, 2)).flatten(1, 3)
            stride = (self.stride[0] // step[0], self.stride[1] // step[1])
            apart = (dilation[0] // step[0] or 1, dilation[1] // step[1] or 1)
            results.append(F.conv2d(products, weight, None, stride, 0, apart, self.groups))
        return results[0] if len(results) == 1 else results[0] + results[1]


class QuantumDeformedLinear(DeformedNeurons, ProbabilisticBinaryLinear):
    """A probabilistic binary dense layer whose inputs and weights are qubits, deformed by trainable gates.

    Args:
        in_features, out_features, bias: As ProbabilisticBinaryLinear.
        deformation, inputs: As QuantumDeformedConv2d; neighbors are inputs 0-1, 2-3, ...
        law, output, norm, gamma, generator, device, dtype: As ProbabilisticBinaryLinear.

    Attributes:
        weight: w of each synapse, (out_features, in_features); angle, offset and gate as in QuantumDeformedConv2d.

    Training: as ProbabilisticBinaryLinear.

    Source: Bondesan & Welling, Quantum Deformed Neural Networks (arXiv:2010.11189).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        deformation: str = "pair",
        inputs: str = "coherent",
        law: str = "clt",
        output: str = "activation",
        norm: bool = True,
        gamma: float = 1.0,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        options: dict[str, Any] = {"law": law, "output": output, "norm": norm, "gamma": gamma, "generator": generator}
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype, **options)
        self._deform(deformation, inputs)

    def _flat(self, tensor: Tensor) -> Tensor:
        return tensor

    def _kernel(self) -> Pair:
        return 1, self.in_features

    def contract_pairs(self, features: Sequence[Tensor], coefficients: Tensor) -> Tensor:
        """See DeformedNeurons."""
        maps = torch.stack([*features], dim=1)
        used = 2 * len(self.first)
        products = (maps[:, :, None, 0:used:2] * maps[:, None, :, 1:used:2]).flatten(1)
        return F.linear(products, coefficients.movedim(1, -1).flatten(1))
