"""Matrix product states and tree tensor networks as circuits: what is an isometry is rows of a unitary.

From a layer: `isometric_circuit(layer_network(layer))`, which takes a TensorNetworkConv2d(structure="mps" or "tree",
feature_map="cos_sin") with bond_dim up to 4 (`layer.truncate(4)` shortens longer ones). A bond of D fills the qubits of
the next power of two, so 3 costs as many as 4: choose 2 or 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from math import pi
from typing import NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from circuits.circuit import Angle, Circuit, Gate
from circuits.naming import unknown
from qconv.tensor_layers import TensorNetworkConv2d
from qconv.tensors.structures import Tree
from qconv.tensors.trains import check_train

Matrix = NDArray[np.complex128]
MAX_QUBITS = 4  # of one tensor's unitary: a tree of bond 4
MAX_MEASURED = 12  # wires, for 2^12 - 1 strings of Z
READOUTS = ("postselect", "discard")


class TreeNetwork(NamedTuple):
    """A tree tensor network without loops: f_o(x) linear in each of the local vectors (cos(pi x/2), sin(pi x/2)).

    Args:
        tensors: Each (parent, child_1, ..., child_m), real or complex; children come before parents. The last is the
            root, whose first axis says which output.
        children: What enters each tensor's further axes: 0 to n - 1 are the features, n + k is tensor k.
    """

    tensors: tuple[Tensor, ...]
    children: tuple[tuple[int, ...], ...]

    @property
    def features(self) -> int:
        """Number of features n: every id but the root's is a child once."""
        return sum(map(len, self.children)) - len(self.tensors) + 1


def train_network(
    cores: Sequence[Tensor], output: int | None = None, features: Sequence[int] | None = None
) -> TreeNetwork:
    """A tensor train (matrix product state) as a tree: a chain from each end to the core of the outputs.

    Args:
        cores: A train of cores (r, 2, r'), one a feature.
        output: Which of the cores, (r, outputs, r'), has no feature but says which output; None for one output and no
            such core.
        features: The features in the order of their cores; None for 0, 1, ...
    """
    train = check_train(cores)
    n = len(train) - (output is not None)
    order = list(range(n) if features is None else features)
    if n == 0 or sorted(order) != list(range(n)) or not 0 <= (output or 0) < len(train):
        raise ValueError(
            f"train has {len(train)} cores, output is {output} and features are {features}: beside the core of the "
            "outputs each core reads one feature, 0, 1, ... in any order"
        )
    middle = output or 0
    nodes: list[tuple[Tensor, tuple[int, ...]]] = []
    ends: list[int] = []  # of the chains that have begun
    for core, feature in zip(train[:middle], order, strict=False):
        core = core.permute(2, 0, 1)
        nodes.append((core, (ends.pop(), feature)) if ends else (core[:, 0], (feature,)))
        ends.append(n + len(nodes) - 1)
    left = ends[:]
    sites = train if output is None else train[middle + 1 :]
    for core, feature in zip(sites[::-1], order[middle:][::-1], strict=True):
        nodes.append((core, (feature, ends.pop())) if len(ends) > len(left) else (core[:, :, 0], (feature,)))
        ends.append(n + len(nodes) - 1)
    if output is not None:
        root = train[middle].permute(1, 0, 2)
        root = root if left else root[:, 0]
        nodes.append((root if sites else root[..., 0], tuple(ends)))
    return TreeNetwork(tuple(tensor for tensor, _ in nodes), tuple(children for _, children in nodes))


def layer_network(layer: TensorNetworkConv2d, group: int = 0) -> TreeNetwork:
    """The network of a TensorNetworkConv2d, its features in nn.Unfold's order.

    Args:
        layer: Structure "mps" or "tree", feature map "cos_sin", one number a site. The bias is left out, and so are the
            divisions of a layer with `normalize`: its outputs of a patch are the network's over one positive number.
        group: Whose network.

    Raises:
        ValueError: For another layer.
    """
    if not isinstance(layer, TensorNetworkConv2d):
        raise ValueError(
            f"layer is a {type(layer).__name__}: give a TensorNetworkConv2d (the circuit of a QuantumConv2d is its "
            "`circuit`)"
        )
    channels, (rows, columns) = layer.in_channels // layer.groups, layer.kernel_size
    known = layer.structure in ("mps", "tree") and layer.feature_map.name == "cos_sin"
    if not known or (channels > 1 and layer.site != "feature"):
        raise ValueError(
            f"layer has structure {layer.structure!r}, feature map {layer.feature_map.name!r} and {channels} channels "
            f"at a {layer.site}: a circuit takes 'mps' or 'tree', 'cos_sin', and one number a site (site='feature')"
        )
    grid = torch.arange(layer.features).reshape(channels, rows, columns)
    if layer.order == "snake":
        grid[:, 1::2] = grid[:, 1::2].flip(2)
    order: list[int] = grid.flatten().tolist()
    cores = [core.detach() for core in layer.cores(group)]
    if layer.structure == "mps":
        return train_network(cores, (len(order) + 1) // 2, order)
    nodes = cast(Tree, layer.network).nodes
    places = [*order, *range(len(order), len(order) + len(nodes))]
    return TreeNetwork(tuple(cores), tuple(tuple(places[c] for c in node if c is not None) for node in nodes))


@dataclass(frozen=True)
class IsometricCircuit:
    """A tree network as a circuit; made by `isometric_circuit`.

    Args:
        circuit: Encodes feature j as RY(pi x_j) on wire j, then runs the tensors' unitaries; a kernel for
            QuantumConv2d. Its observables are strings of Z, the identity left out.
        weights: (n_weights,) the values of the unitaries' angles, float64.
        scale: f_o(x)^2 = scale^2 * probability of output o, for readout "postselect".
        outputs: How many.
        read: Wires that name the output, most significant first.
        zeros: All other wires; "postselect" asks that they be found in 0.
    """

    circuit: Circuit
    weights: Tensor
    scale: float
    outputs: int
    read: tuple[int, ...]
    zeros: tuple[int, ...]

    def probabilities(self, values: Tensor) -> Tensor:
        """Probabilities of the outputs from expectation values: (..., n_obs) -> (..., outputs).

        The projector on bits b of wires w is the product of (1 + (-1)^b Z_w) / 2, a sum of strings of Z.
        """
        strings = self.circuit.observables
        measured = len(strings).bit_length()
        signs = [
            [(-1.0) ** sum(s[w] == "Z" and o >> k & 1 for k, w in enumerate(self.read[::-1])) for s in strings]
            for o in range(self.outputs)
        ]
        table = torch.tensor(signs, dtype=values.dtype, device=values.device)
        result: Tensor = (1 + values @ table.T) / 2**measured
        return result

    def preparation(self) -> Circuit:
        """The circuit without features, inverted, of a network with one output: it prepares the network's tensor.

        From |0...0> it makes sum conj(T[i_1 .. i_n]) |i_1 .. i_n> / scale, up to a global phase.
        """
        if self.outputs != 1:
            raise ValueError(f"network has {self.outputs} outputs: a state needs 1, so take one row of the root")
        gates = tuple(gate for gate in self.circuit.gates if not gate.depends_on("input"))
        return replace(self.circuit, gates=gates).inverse()


def isometric_circuit(network: TreeNetwork, readout: str = "postselect") -> IsometricCircuit:
    """A tree network (matrix product state, tree tensor network) as a circuit, with what it computes.

    A product of local vectors (cos(pi x/2), sin(pi x/2)) is the state that RY(pi x) makes of |0...0>. The network is
    brought into canonical form (QR decompositions from the leaves up): then each tensor but the root, as a matrix from
    its children to its parent, has orthonormal rows. These are rows of a unitary on the children's qubits: where some
    of them, the freed ones, are in |0>, the others hold the parent's vector. All that is not orthonormal is in the
    root. One output, or rows that are orthonormal up to one factor `scale`, are rows of a unitary again; another root C
    is the block C / scale of a unitary with one qubit more, scale being the largest singular value of C.

    Readout "postselect": the amplitude of all freed qubits in 0 and the output register in o is f_o(x) / scale, so
    the joint probability is p_o(x) = |f_o(x)|^2 / scale^2: exactly the network, but squared and without sign. Their sum
    over o is the probability that the post-selection succeeds, which shrinks exponentially with the number of features.
    Readout "discard": only the output register is measured, and freed qubits are traced out: p_o(x) = sum over the
    freed qubits' outcomes m of |A_{o,m}(x)|^2, of which "postselect" is the term m = 0. These add up to 1 over the
    register's states and need no post-selection, but they are those of the circuit: a classifier of its own, which
    depends on the other rows of the unitaries too. It needs 2 outputs or more, and a root whose rows are orthonormal up
    to a factor, which training does not keep: `isometric_root(network)` makes them so.

    Args:
        network: Bonds such that a tensor's children fill at most 4 qubits, a bond of D filling those of the next power
            of two: bonds up to 4 in a tree or a layer, in a train without a core of outputs up to 8. A root that is no
            isometry takes one qubit more beside its outputs': up to 8 outputs. Every feature is used once. A layer that
            divides by norms on the way computes the same up to a factor.
        readout: "postselect", up to 12 wires, or "discard", whose register may have as many.

    Returns:
        The circuit, of gates RY, U3 and CNOT, and its weights.

    Raises:
        ValueError: For something else than a TreeNetwork, one that is no such tree, 0, or too large; or for a "discard"
            that does not apply.

    Source: Huggins et al., Towards quantum machine learning with tensor networks (arXiv:1803.11537), for "discard" and
        the correspondence; Schön et al. (quant-ph/0501096) for matrix product states as circuits; Martyn et al.
        (arXiv:2105.02859), section II, for the block of a unitary.
    """
    if readout not in READOUTS:
        raise unknown("readout", readout, READOUTS)
    tensors = _canonical(network)
    n, builder = network.features, _Builder(network.features)
    wires: list[tuple[int, ...]] = [(k,) for k in range(n)]
    for tensor, children in zip(tensors[:-1], network.children, strict=False):
        wires.append(builder.isometry(tensor, [wires[child] for child in children]))
    root = tensors[-1]
    read, scale, exact = builder.root(root, [wires[child] for child in network.children[-1]])
    if readout == "discard" and not (exact and read):
        raise ValueError(
            f"the root has {len(root)} outputs and singular values {_singular(root)}: readout 'discard' needs 2 or "
            "more outputs, and rows that are orthonormal up to a factor; use 'postselect', or isometric_root(network)"
        )
    zeros = tuple(wire for wire in range(builder.size) if wire not in read)
    measured = sorted(read) if readout == "discard" else range(builder.size)
    if len(measured) > MAX_MEASURED:
        raise ValueError(
            f"post-selection measures {len(measured)} wires by 2^{len(measured)} - 1 strings of Z, at most "
            f"{MAX_MEASURED} wires are: use fewer features, or readout 'discard'"
        )
    letters = ["IZ" if wire in measured else "I" for wire in range(builder.size)]
    observables = ["".join(string) for string in product(*letters)]
    encoding = tuple(Gate("RY", (k,), (Angle("input", k, pi),)) for k in range(n))
    circuit = Circuit(builder.size, encoding + tuple(builder.gates), tuple(observables[1:]))
    weights = torch.tensor(builder.values, dtype=torch.float64)
    return IsometricCircuit(circuit, weights, scale, len(root), read, zeros)


def isometric_root(network: TreeNetwork) -> TreeNetwork:
    """The network in canonical form with the isometry nearest to its root in place of the root, for "discard".

    With the root C = U S V^T as a matrix (outputs, children), the new one is U V^T: outputs become (C C^T)^(-1/2) f(x),
    as if a last linear layer had whitened them. Train on, or measure, what is left of an accuracy.

    Raises:
        ValueError: For something else than a tree network of independent outputs, at most as many as the root's
            children have states.

    Source: Fan & Hoffman, Proc. Am. Math. Soc. 6, 111 (1955): the polar factor is the nearest isometry.
    """
    tensors = _canonical(network)
    root = tensors[-1].reshape(len(tensors[-1]), -1)
    values = np.linalg.svd(root, compute_uv=False)
    if len(root) > root.shape[1] or values[-1] < 1e-10 * values[0]:
        raise ValueError(
            f"the root takes {root.shape[1]} numbers to {len(root)} outputs with singular values {_singular(root)}: "
            "only independent rows, at most as many as there are numbers, can be made orthonormal; take fewer outputs"
        )
    u, _, vh = np.linalg.svd(root, full_matrices=False)
    tensors[-1] = (u @ vh).reshape(tensors[-1].shape)
    real = not any(tensor.imag.any() for tensor in tensors)
    arrays = [np.ascontiguousarray(tensor.real if real else tensor) for tensor in tensors]
    return TreeNetwork(tuple(torch.from_numpy(array) for array in arrays), network.children)


def _canonical(network: TreeNetwork) -> list[Matrix]:
    """The tensors as arrays, rows orthonormal in all but the root."""
    if not isinstance(network, TreeNetwork) or not all(isinstance(tensor, Tensor) for tensor in network.tensors):
        kinds = type(network).__name__
        if isinstance(network, TreeNetwork):
            kinds += " of " + ", ".join(sorted({type(tensor).__name__ for tensor in network.tensors}))
        raise ValueError(
            f"network is a {kinds}: give a TreeNetwork of torch tensors, such as layer_network(layer) of a "
            "TensorNetworkConv2d or train_network(cores)"
        )
    n, count = network.features, len(network.tensors)
    tensors = [t.detach().cpu().to(torch.complex128).resolve_conj().numpy() for t in network.tensors]
    if len(network.children) != count or sorted(chain(*network.children)) != list(range(n + count - 1)):
        raise ValueError(
            f"{count} tensors have the children {network.children}: every feature and every tensor but the last must "
            "be the child of one"
        )
    for k, (tensor, children) in enumerate(zip(tensors, network.children, strict=True)):
        sizes = tuple(2 if child < n else len(tensors[child - n]) if child - n < k else -1 for child in children)
        if tensor.shape[1:] != sizes or not children:
            raise ValueError(
                f"tensor {k} has shape {tensor.shape} but its children {children} have sizes {sizes} (2 for a feature, "
                "-1 for a tensor that comes later): its axes are (parent, child_1, ...)"
            )
        if not np.isfinite(tensor).all():
            raise ValueError(f"tensor {k} has entries that are not finite")
    for k in range(count - 1):
        q, r = np.linalg.qr(tensors[k].reshape(len(tensors[k]), -1).conj().T)
        tensors[k] = q.conj().T.reshape(-1, *tensors[k].shape[1:])
        parent = next(p for p, children in enumerate(network.children) if n + k in children)
        axis = 1 + network.children[parent].index(n + k)
        tensors[parent] = np.moveaxis(np.tensordot(tensors[parent], r.conj().T, (axis, 0)), -1, axis)
    if not tensors[-1].any():
        raise ValueError("the network is 0: a circuit prepares states of norm 1")
    return tensors


def _singular(root: Matrix) -> list[float]:
    values = np.linalg.svd(root.reshape(len(root), -1), compute_uv=False)
    return [float(value) for value in np.round(values, 6)]


def _qubits(size: int) -> int:
    return (size - 1).bit_length()


class _Builder:
    """Collects gates and the values of their angles."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.gates: list[Gate] = []
        self.values: list[float] = []

    def isometry(self, tensor: Matrix, registers: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """Take children's registers to the parent's: the first of their wires; the rest is freed."""
        wires = tuple(chain.from_iterable(registers))
        kept = _qubits(len(tensor))
        rows = _padded(tensor, registers)
        self._unitary(_completed(rows, len(wires) - kept), wires)
        return wires[:kept]

    def root(self, tensor: Matrix, registers: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], float, bool]:
        """The output register, the scale, and whether the root itself was an isometry up to scale."""
        rows = _padded(tensor, registers)
        wires, outputs = tuple(chain.from_iterable(registers)), _qubits(len(tensor))
        values = np.linalg.svd(rows, compute_uv=False)
        scale = float(values[0])
        if len(rows) <= rows.shape[1] and values[-1] > scale * (1 - 1e-10):
            self._unitary(_completed(rows / scale, len(wires) - outputs), wires)
            return wires[:outputs], scale, True
        if len(rows) < rows.shape[1]:
            # An isometry onto the space of the rows comes first: what is left to dilate is small.
            q, r = np.linalg.qr(rows.conj().T)
            wires, rows = self.isometry(q.conj().T, [wires]), r.conj().T
        fresh = 1 + max(0, outputs - len(wires))
        wires = (*range(self.size, self.size + fresh), *wires)
        self.size += fresh
        self._unitary(_dilated(rows / scale, 2 ** (len(wires) - 1)), wires)
        return wires[len(wires) - outputs :], scale, False

    def _unitary(self, matrix: Matrix, wires: tuple[int, ...]) -> None:
        """Write a unitary on wires, the first most significant, as gates U3 and CNOT, up to a global phase."""
        if not wires:
            return
        if len(wires) > MAX_QUBITS:
            raise ValueError(
                f"a tensor's unitary acts on {len(wires)} qubits but at most {MAX_QUBITS} are written as gates: "
                "truncate the bonds, to 4 in a layer or tree or 8 in a train without outputs, or take fewer outputs"
            )
        from qiskit import QuantumCircuit, transpile

        plain = QuantumCircuit(len(wires))
        # Qiskit's first qubit is the least significant one of a matrix.
        plain.unitary(matrix, list(range(len(wires)))[::-1])
        written = transpile(plain, basis_gates=["u", "cx"], optimization_level=1, seed_transpiler=0)
        for instruction in written.data:
            on = tuple(wires[written.find_bit(qubit).index] for qubit in instruction.qubits)
            parameters = [float(value) for value in instruction.operation.params]
            angles = tuple(Angle("weight", len(self.values) + k) for k in range(len(parameters)))
            self.gates.append(Gate({"u": "U3", "cx": "CNOT"}[instruction.operation.name], on, angles))
            self.values += parameters


def _padded(tensor: Matrix, registers: Sequence[tuple[int, ...]]) -> Matrix:
    """A tensor as a matrix from whole registers, zero where a register has more states than the bond."""
    result = np.zeros((len(tensor), *(2 ** len(register) for register in registers)), dtype=complex)
    result[tuple(slice(size) for size in tensor.shape)] = tensor
    return result.reshape(len(tensor), -1)


def _completed(rows: Matrix, freed: int) -> Matrix:
    """A unitary with orthonormal rows where the last `freed` qubits are 0; the other rows span the rest."""
    size = rows.shape[1]
    others = np.linalg.qr(rows.conj().T, mode="complete")[0].conj().T[len(rows) :]
    places = np.arange(len(rows)) << freed
    result = np.empty((size, size), dtype=complex)
    result[places] = rows
    result[np.setdiff1d(np.arange(size), places)] = others
    return result


def _dilated(block: Matrix, size: int) -> Matrix:
    """A unitary (2 size, 2 size) with a matrix of norm up to 1 as its first block: [[K, A], [B, -K^+]]."""
    k = np.zeros((size, size), dtype=complex)
    k[: block.shape[0], : block.shape[1]] = block
    w, s, vh = np.linalg.svd(k)
    rest = np.sqrt(np.clip(1 - s**2, 0, None))
    result: Matrix = np.block([[k, (w * rest) @ w.conj().T], [(vh.conj().T * rest) @ vh, -k.conj().T]])
    return result
