"""A trained quantum kernel as a tensor train: its coefficients over products of waves, one leg an input."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, product
from math import prod, sqrt

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.circuit import Circuit
from circuits.noise import NoiseModel
from qconv.backends.fourier import WireFeatures
from qconv.backends.pauli_ops import PauliOp, split_encoding
from qconv.backends.protocol import Unsupported
from qconv.fourier_conv import MAX_COEFFICIENTS, FourierConv2d, Spectrum
from qconv.layers import QuantumConv2d
from qconv.surrogates import spectrum_of, surrogate
from qconv.tensors.trains import Train, add, contract, from_dense, ranks, truncate

MAX_RANK = 512  # of a kernel's train


@dataclass(frozen=True)
class KernelTrain:
    """A kernel's coefficients as a tensor train: y_o(x) = sum over digits d of c[o, d_1 .. d_n] prod_j f_{d_j}(x_j).

    Args:
        cores: The first (1, outputs, r) says which output, and one (r, 2 L_j + 1, r') follows for each number x_j of a
            patch, over its waves 1, sin w x, cos w x, ..., sin L w x, cos L w x. float64.
        spectrum: The L_j and w_j.
        error: Frobenius distance of the coefficients from those of the kernel; after several truncations at most that.
    """

    cores: tuple[Tensor, ...]
    spectrum: Spectrum
    error: float = 0.0

    @property
    def ranks(self) -> tuple[int, ...]:
        """Bond dimensions; the first is that between the outputs and the first number of a patch."""
        return ranks(self.cores)

    @property
    def bound(self) -> float:
        """How far the outputs may be from the kernel's, at any patch: error * prod_j sqrt(1 + L_j).

        The deviation of all outputs is D f, where D is the change of the coefficients as a matrix (outputs, waves) and
        f the product of the inputs' waves. |D f| <= |D|_F |f|, and |f|^2 = prod_j (1 + sum_k sin^2 + cos^2) = prod_j
        (1 + L_j) at every patch. So the bound holds for the Euclidean norm over the outputs, and for each of them. Over
        a whole period of every input the waves are orthogonal, of mean square 1 or 1/2: the root mean square deviation
        there is at most `error` itself.
        """
        return self.error * sqrt(prod(1 + degree for degree in self.spectrum.degrees))

    def truncate(self, bond_dim: int | None = None, *, tolerance: float = 0.0) -> KernelTrain:
        """The train with smaller ranks; its `error` and `bound` say what that did. See `trains.truncate`."""
        cores, error = truncate(self.cores, bond_dim, tolerance=tolerance)
        return KernelTrain(tuple(cores), self.spectrum, self.error + error)

    def __call__(self, patches: Tensor) -> Tensor:
        """Evaluate: patches (P, n), float32 or float64 -> (P, outputs) of that dtype."""
        if patches.ndim != 2 or patches.shape[1] != len(self.cores) - 1:
            raise ValueError(
                f"kernel takes {len(self.cores) - 1} numbers but patches have shape {tuple(patches.shape)}: give "
                f"(patches, {len(self.cores) - 1})"
            )
        return contract([core.to(patches) for core in self.cores], [w.t() for w in self.spectrum.waves(patches)])


def kernel_to_tensor_train(
    kernel: QuantumConv2d | FourierConv2d | Circuit, weights: Tensor | None = None, *, noise: NoiseModel | None = None
) -> KernelTrain:
    """A trained kernel as a tensor train of exact ranks, to rounding; `.truncate(...)` shortens it.

    Up to 2^16 coefficients an output, all of them are computed (`surrogate`) and decomposed. Beyond, each observable is
    pulled back through the circuit as a train over Pauli strings, so that the coefficients are never made: this takes
    circuits in which every input enters one wire of its own, before anything trainable or entangling.

    Args:
        kernel: A layer, or a circuit with observables. Of a layer, quantized coefficients as they run and exact values
            (shots are not drawn), without the bias.
        weights: (n_weights,) or (F, n_weights) of a circuit; None for a layer, which has its own.
        noise: Channels after a circuit's gates; None for a layer, which has its own.

    Returns:
        Outputs ordered as the layer's channels, or (filter, observable). With groups, each channel has the patch of its
        own group as input.

    Raises:
        Unsupported: For an amplitude encoding, or a large kernel of another kind than above or with a rank over 512.
        ValueError: For something else than a kernel, or weights that are missing or do not fit.
    """
    if not isinstance(kernel, FourierConv2d | QuantumConv2d | Circuit):
        raise ValueError(
            f"kernel is a {type(kernel).__name__}: give a QuantumConv2d, a FourierConv2d, or a Circuit with weights"
        )
    if isinstance(kernel, FourierConv2d):
        _refuse_weights(kernel, weights, noise)
        with torch.no_grad():
            table = kernel.quantized_weight().double().cpu()
        return _from_table(table, kernel.spectrum)
    if isinstance(kernel, QuantumConv2d):
        _refuse_weights(kernel, weights, noise)
        if kernel.readout.kind != "values" or kernel.channels == "separate":
            raise Unsupported(
                f"the layer has channels {kernel.channels!r} and readout {kernel.readout.kind!r}, which make "
                "its outputs of several values of its circuit: convert layer.circuit with layer.weight"
            )
        train = kernel_to_tensor_train(kernel.circuit, kernel.weight, noise=kernel.noise)
        per_group = len(train.cores[0][0]) // kernel.groups
        kept = [g * per_group + k for g in range(kernel.groups) for k in range(kernel.out_channels // kernel.groups)]
        cores, _ = truncate([train.cores[0][:, kept], *train.cores[1:]])
        return KernelTrain(tuple(cores), train.spectrum)
    if weights is None:
        raise ValueError(f"weights are None but the circuit has {kernel.n_weights}: give them")
    if not isinstance(weights, Tensor):
        raise ValueError(f"weights are a {type(weights).__name__}: give a torch.Tensor, such as torch.tensor(weights)")
    spectrum, filters = spectrum_of(kernel), weights.detach().double().cpu()
    if prod(spectrum.sizes) <= MAX_COEFFICIENTS:
        found = surrogate(kernel, filters, noise=noise)
        return _from_table(found.coefficients.flatten(0, 1), spectrum)
    if filters.ndim not in (1, 2) or filters.shape[-1] != kernel.n_weights:
        raise ValueError(f"circuit takes {kernel.n_weights} weights but weights have shape {tuple(weights.shape)}")
    rows = (filters if filters.ndim == 2 else filters[None]).numpy()
    return KernelTrain(tuple(_PullBack(kernel, noise, spectrum).rows(rows)), spectrum)


def _refuse_weights(layer: FourierConv2d | QuantumConv2d, weights: Tensor | None, noise: NoiseModel | None) -> None:
    if weights is not None or noise is not None:
        raise ValueError(f"weights or noise were given beside a {type(layer).__name__}, which has its own: leave both")


def _from_table(table: Tensor, spectrum: Spectrum) -> KernelTrain:
    return KernelTrain(tuple(from_dense(table.reshape(-1, *spectrum.sizes))), spectrum)


class _PullBack:
    """Observables in the Heisenberg picture as trains over the Pauli digits of the wires, in order of their inputs."""

    def __init__(self, circuit: Circuit, noise: NoiseModel | None, spectrum: Spectrum) -> None:
        encoders, self.block = split_encoding(circuit, noise)
        self.circuit, self.spectrum = circuit, spectrum
        reads = [sorted({a.index for op in ops if (a := op.angle) and a.source == "input"}) for ops in encoders]
        # Read with scale 0 is not read.
        reads = [[j for j in own if spectrum.degrees[j]] for own in reads]
        every = list(chain.from_iterable(reads))
        if any(len(own) > 1 for own in reads) or len(set(every)) < len(every):
            raise Unsupported(
                f"wires read the inputs {reads}, and {prod(spectrum.sizes)} coefficients an output are over "
                f"{MAX_COEFFICIENTS}: a train of a kernel so large needs one wire for each input"
            )
        self.wire_of = {own[0]: wire for wire, own in enumerate(reads) if own}
        idle = [wire for wire, own in enumerate(reads) if not own]
        self.order = [self.wire_of[j] for j in sorted(self.wire_of)] + idle
        self.idle = [torch.from_numpy(_bloch(encoders[wire], np.zeros(1))) for wire in idle]
        self.waves = {
            j: torch.from_numpy(spectrum.transforms()[j] @ _bloch(encoders[wire], spectrum.points()[j]))
            for j, wire in self.wire_of.items()
        }

    def rows(self, weights: NDArray[np.float64]) -> Train:
        """All filters and observables, the output leg first."""
        size = len(weights) * len(self.circuit.observables)
        trains = []
        for k, (filter_, observable) in enumerate(product(weights, self.circuit.observables)):
            one = torch.zeros(1, size, 1, dtype=torch.float64)
            one[0, k] = 1
            trains.append([one, *self._waves(self._digits(observable, filter_))])
        while len(trains) > 1:
            pairs = [trains[k : k + 2] for k in range(0, len(trains), 2)]
            trains = [truncate(add(pair))[0] for pair in pairs]
        return truncate(trains[0])[0]

    def _digits(self, observable: str, weights: NDArray[np.float64]) -> Train:
        place = {wire: k for k, wire in enumerate(self.order)}
        train = [torch.eye(4, dtype=torch.float64)["IXYZ".index(observable[w])].reshape(1, 4, 1) for w in self.order]
        touched = {wire for wire, letter in enumerate(observable) if letter != "I"}
        for op in reversed(self.block):
            # Unitaries and channels leave the identity as it is.
            if not touched & set(op.wires):
                continue
            touched |= set(op.wires)
            matrix = torch.from_numpy(_transfer(op, weights))
            if len(op.wires) == 1:
                k = place[op.wires[0]]
                train[k] = torch.einsum("rix,ij->rjx", train[k], matrix)
                continue
            train, _ = truncate(_on_two(train, place[op.wires[0]], place[op.wires[1]], matrix))
            if max(ranks(train)) > MAX_RANK:
                raise Unsupported(
                    f"the train of observable {observable} has rank {max(ranks(train))} but at most {MAX_RANK} is "
                    "kept: use fewer layers or fewer wires"
                )
        return train

    def _waves(self, digits: Train) -> Train:
        """From Pauli digits of wires to waves of inputs."""
        result: Train = []
        k = 0
        for j in range(len(self.spectrum.degrees)):
            if j not in self.wire_of:  # an input that nothing reads
                rank = result[-1].shape[2] if result else 1
                result.append(torch.eye(rank, dtype=torch.float64)[:, None])
                continue
            result.append(torch.einsum("rix,wi->rwx", digits[k], self.waves[j]))
            k += 1
        for core, bloch in zip(digits[k:], self.idle, strict=True):
            result[-1] = torch.einsum("rwx,xiy,i->rwy", result[-1], core, bloch[0])
        return result


def _bloch(ops: list[PauliOp], points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bloch vectors (m, 4) of an encoded wire at m values of its input."""
    angles = [op.angle.scale * points + op.angle.offset if op.angle else 0 * points for op in ops]
    return WireFeatures.bloch(ops, np.stack([*angles, 0 * points], axis=1)[:, : len(ops)])


def _transfer(op: PauliOp, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    even, cosine, sine = op.parts
    if op.angle is None:
        return even
    angle = op.angle.offset + (op.angle.scale * weights[op.angle.index] if op.angle.source == "weight" else 0.0)
    result: NDArray[np.float64] = even + cosine * np.cos(angle) + sine * np.sin(angle)
    return result


def _on_two(train: Train, a: int, b: int, matrix: Tensor) -> Train:
    """A train times a matrix (16, 16) on the digits of two cores: rows are the old digits, columns the new ones."""
    grid = matrix.reshape(4, 4, 4, 4)  # old a, old b, new a, new b
    if a > b:
        a, b, grid = b, a, grid.permute(1, 0, 3, 2)
    u, s, vh = torch.linalg.svd(grid.permute(0, 2, 1, 3).reshape(16, 16))
    n = int((s > 1e-15 * s[0]).sum())
    left, right = (u[:, :n] * s[:n]).reshape(4, 4, n), vh[:n].reshape(n, 4, 4)
    result = list(train)
    result[a] = torch.einsum("rix,ijs->rjxs", train[a], left).flatten(2)
    for k in range(a + 1, b):
        result[k] = torch.einsum("rix,st->rsixt", train[k], torch.eye(n).double()).flatten(3).flatten(0, 1)
    result[b] = torch.einsum("rix,sij->rsjx", train[b], right).flatten(0, 1)
    return result
