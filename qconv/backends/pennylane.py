"""Any PennyLane device as a backend, with its own differentiation or qconv's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import pennylane as qml
import torch
from pennylane.devices import Device, ExecutionConfig
from torch import Tensor

from circuits.circuit import Circuit
from circuits.interop import apply_in_pennylane, pennylane_observable
from circuits.naming import unknown
from circuits.noise import NoiseModel
from qconv.backends.angles import angles_of, evaluate_angles, features_of, normalized
from qconv.backends.chains import chain_counts
from qconv.backends.differentiation import METHODS, Differentiation
from qconv.backends.memory import machine_memory
from qconv.backends.pennylane_clifford import apply_clifford, turn_from_z, turn_to_z
from qconv.backends.protocol import (
    Unsupported,
    check_call,
    check_options,
    device_counts,
    measurement_settings,
)
from qconv.backends.statevector import simulation_counts

# Devices written in torch-compatible arithmetic: they take batches and autograd flows through them.
_TORCH_DEVICES = ("default.qubit", "default.mixed")
_OWN = ("backprop", "adjoint")  # what a device differentiates itself
DIFF_METHODS = (*_OWN, *METHODS, "best")

# Gates through which PennyLane (to 0.45) loses the gradient of a batch on default.mixed: it copies their phases.
_CUT_IN_MIXED = ("P", "U3")

# What PennyLane raises where a device cannot do what was asked.
_REFUSALS = (
    qml.exceptions.DeviceError,
    qml.exceptions.WireError,
    qml.exceptions.DecompositionUndefinedError,
    qml.exceptions.QuantumFunctionError,
    NotImplementedError,
)

# Packages that PennyLane does not bring along, and says so only once a device runs.
_NEEDED = {"default.clifford": "stim", "default.tensor": "quimb"}

CALL_BYTES = 2**28  # states and samples that a call holds at a time
TAPES_A_CALL = 1024  # of devices that take one row at a time


class _InDouble(Device):  # type: ignore[misc]
    """A device whose answers are numbers of numpy: PennyLane hands Python's own on to torch in single precision."""

    def __init__(self, device: Device) -> None:
        super().__init__(wires=device.wires)
        self._device = device

    @property
    def name(self) -> str:
        return str(self._device.name)

    def setup_execution_config(self, config: Any = None, circuit: Any = None) -> Any:
        return self._device.setup_execution_config(config, circuit)

    def preprocess_transforms(self, execution_config: Any = None) -> Any:
        return self._device.preprocess_transforms(execution_config)

    def supports_derivatives(self, execution_config: Any = None, circuit: Any = None) -> bool:
        return bool(self._device.supports_derivatives(execution_config, circuit))

    def supports_vjp(self, execution_config: Any = None, circuit: Any = None) -> bool:
        return bool(self._device.supports_vjp(execution_config, circuit))

    def execute(self, circuits: Any, execution_config: Any = None) -> Any:
        return _doubles(self._device.execute(circuits, execution_config))

    def compute_derivatives(self, circuits: Any, execution_config: Any = None) -> Any:
        return _doubles(self._device.compute_derivatives(circuits, execution_config))

    def execute_and_compute_derivatives(self, circuits: Any, execution_config: Any = None) -> Any:
        return _doubles(self._device.execute_and_compute_derivatives(circuits, execution_config))

    def compute_vjp(self, circuits: Any, cotangents: Any, execution_config: Any = None) -> Any:
        return _doubles(self._device.compute_vjp(circuits, cotangents, execution_config))

    def execute_and_compute_vjp(self, circuits: Any, cotangents: Any, execution_config: Any = None) -> Any:
        return _doubles(self._device.execute_and_compute_vjp(circuits, cotangents, execution_config))


def _doubles(result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return tuple(_doubles(part) for part in result)
    return np.float64(result) if isinstance(result, float) else result


class PennylaneCompiled:
    """A circuit as PennyLane QNodes; patches and filters are one batch.

    Args:
        circuit: The kernel.
        target: The device.
        method: "backprop" or "adjoint" by the device; None for values without gradients.
        shots: See Backend.compile.
        noise: See Backend.compile.

    Attributes:
        differentiation: How gradients are made of values where the device makes none.
        approximation: See approximation_of.
    """

    differentiation = Differentiation()

    def __init__(
        self, circuit: Circuit, target: Device, method: str | None, shots: int | None, noise: NoiseModel | None
    ) -> None:
        self.circuit = circuit
        self.differentiable = method is not None
        self._angles, self._features = angles_of(circuit), features_of(circuit)
        self._method, self._shots, self._mixed = method, shots, target.name == "default.mixed"
        # Its gates are known only with their angles, so rows are not a batch of one tape.
        self._clifford = target.name == "default.clifford"
        self._tensor = target.name == "default.tensor"
        self._max_bond: int | None = getattr(target, "_max_bond_dim", None)
        cutoff: float | None = getattr(target, "_cutoff", None)
        cuts = [f"bonds of at most {self._max_bond}"] if self._tensor and self._max_bond else []
        cuts += [f"cutoff {cutoff:g}"] if self._tensor and cutoff else []
        self.approximation = ", ".join(cuts)
        size = 2 ** (circuit.n_wires * (2 if self._mixed else 1))
        if target.name in _TORCH_DEVICES:
            self._rows = max(1, CALL_BYTES // (16 * size + 8 * (shots or 0) * circuit.n_wires))
        else:
            self._rows = TAPES_A_CALL
        settings = measurement_settings(circuit.observables)
        if noise is None or noise.readout is None:
            settings = [("I" * circuit.n_wires, tuple(range(len(circuit.observables))))]
        self._members = [members for _, members in settings]
        self._nodes = [self._node(target, self._function(circuit, *setting, noise)) for setting in settings]
        if target.name not in _TORCH_DEVICES:
            self._check_gates(target)

    def _function(
        self, circuit: Circuit, basis: str, members: tuple[int, ...], noise: NoiseModel | None
    ) -> Callable[[Any, Any], list[Any]]:
        n_angles = len(angles_of(circuit))
        observables = [circuit.observables[k] for k in members]

        def kernel(angles: Any, state: Any) -> list[Any]:
            values = [angles[..., k] for k in range(n_angles)]
            if self._clifford:
                apply_clifford(circuit, [float(value) for value in values])
            else:
                apply_in_pennylane(circuit, values, state, noise)
            if noise is None or noise.readout is None:
                return [qml.expval(pennylane_observable(observable)) for observable in observables]
            # Bits are misread behind the change of basis.
            for wire, letter in enumerate(basis):
                error = noise.readout_of(wire)
                if letter == "I" or error is None:
                    continue
                turn_to_z(letter, wire)
                qml.QubitChannel(list(error.kraus()), wires=wire)
                turn_from_z(letter, wire)
            return [qml.expval(pennylane_observable(observable)) for observable in observables]

        return kernel

    def _node(self, target: Device, function: Callable[..., Any]) -> Any:
        if self._method == "backprop":
            node = qml.QNode(function, target, interface="torch", diff_method="backprop")
        elif self._method == "adjoint":
            node = qml.QNode(function, _InDouble(target), interface="torch", diff_method="adjoint")
        else:
            node = qml.QNode(function, target, diff_method=None)
        if target.wires is not None and list(target.wires)[: self.circuit.n_wires] != list(range(self.circuit.n_wires)):
            node = qml.map_wires(node, dict(enumerate(target.wires[: self.circuit.n_wires])))
        # Before PennyLane decomposes gates: its parts of controlled gates and Pauli rotations do not all take batches.
        # Adjoint differentiation is faster row by row, too.
        if target.name not in _TORCH_DEVICES or self._method == "adjoint":
            node = qml.transforms.broadcast_expand(node)
        return node if self._shots is None else qml.set_shots(node, shots=self._shots)

    def _check_gates(self, target: Device) -> None:
        """Raise Unsupported for what PennyLane cannot bring to the device, naming the first gate that it is."""
        refusal = self._refusal(self._nodes[0], self.circuit)
        if refusal is None:
            return
        settings = "", tuple(range(len(self.circuit.observables))), None
        for position, gate in enumerate(self.circuit.gates):
            alone = replace(self.circuit, gates=(gate,))
            reason = self._refusal(self._node(target, self._function(alone, *settings)), alone)
            if reason is not None:
                raise Unsupported(
                    f"PennyLane device {target.name!r} has no gate {gate.name}, which is gate {position} on wires "
                    f"{gate.wires}, and PennyLane does not decompose it into gates that the device has ({reason}): use "
                    "another kernel, or device 'default.qubit'"
                )
        raise Unsupported(f"PennyLane device {target.name!r} cannot run this circuit: {refusal}; try 'default.qubit'")

    def _refusal(self, node: Any, circuit: Circuit) -> str | None:
        usual = 0.0 if self._clifford else 0.3
        fixed = [angle.offset if angle.source == "const" else usual for angle in angles_of(circuit)]
        angles: Any = torch.tensor(fixed if self._clifford else [fixed], dtype=torch.float64)
        state: Any = torch.eye(1, 2**circuit.n_wires, dtype=torch.complex128) if features_of(circuit) else None
        if self._method is None:
            angles, state = angles.numpy(), None if state is None else state.numpy()
        try:
            qml.workflow.construct_batch(node, level="device")(angles, state)
        except _REFUSALS as error:
            return str(error).rstrip(".")
        return None

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_call(self.circuit, inputs, weights)
        # PennyLane computes in double precision; its answer is handed back in the caller's.
        wide, wide_weights = inputs.double(), weights.double()
        angles = evaluate_angles(self._angles, wide, wide_weights)
        state = None
        if self._features:
            features = evaluate_angles(self._features, wide, wide_weights)
            state = normalized(features, 2**self.circuit.n_wires).to(torch.complex128)
        rows = len(inputs) * len(weights)
        if rows == 0:
            return weights.new_zeros(len(inputs), len(weights), len(self.circuit.observables))
        # A circuit without angles is run once and answers with a single number.
        step = self._rows if self._angles or self._features else rows
        parts = [
            self._run(angles[start : start + step], None if state is None else state[start : start + step])
            for start in range(0, rows, step)
        ]
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values.to(weights).reshape(len(inputs), len(weights), -1)

    def _run(self, angles: Any, state: Any) -> Tensor:
        """Values (R, n_obs) of rows of angles, double."""
        if self._method == "backprop":
            return self._values(angles, state)
        if self._method == "adjoint" and state is not None and state.requires_grad:
            raise Unsupported(
                "adjoint differentiation knows the angles of gates, not the amplitudes of a prepared state, but the "
                "gradient of an amplitude encoding's features was asked: use diff_method 'backprop', 'parameter-shift' "
                "or 'best'"
            )
        # NaN and infinity would become a plausible outcome, or stop the whole batch: replaced, and put back below.
        angles, lost = _finite(angles.cpu(), torch.zeros_like(angles).cpu())
        if state is not None:
            state, lost_state = _finite(state.cpu(), torch.eye(1, state.shape[1], dtype=state.dtype))
            lost = lost + lost_state
        if self._method is None:
            angles, state = angles.detach().numpy(), None if state is None else state.detach().numpy()
        return self._values(angles, state) + lost[:, None]

    def _values(self, angles: Any, state: Any) -> Tensor:
        if self._clifford:
            return torch.as_tensor(np.asarray([self._nodes[0](row, None) for row in angles], dtype=float))
        values: list[Any] = [None] * len(self.circuit.observables)
        for node, members in zip(self._nodes, self._members, strict=True):
            for k, result in zip(members, node(angles, state), strict=True):
                value = torch.as_tensor(result if torch.is_tensor(result) else np.asarray(result))
                values[k] = value.expand(len(angles))
        return torch.stack(values, dim=-1)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: every patch gate by gate; stabilizers do no arithmetic.

        On default.tensor an upper bound, that of matrix product states with its largest bond, also where it contracts
        in another way. Devices that are not PennyLane's own are taken for state vectors.
        """
        settings = len(measurement_settings(self.circuit.observables))
        runs = patches * filters
        total = device_counts(self.circuit, settings, runs, self._shots)
        if self._clifford:
            return total
        if self._tensor:
            return total + chain_counts(self.circuit, runs, self._max_bond)
        return total + simulation_counts(self.circuit, runs, self._mixed)


def _finite(rows: Tensor, instead: Tensor) -> tuple[Tensor, Tensor]:
    """Rows with those that are not finite replaced, and for each row 0 or, where it was replaced, NaN."""
    finite = torch.isfinite(rows).all(1, keepdim=True)
    return torch.where(finite, rows, instead), torch.where(finite[:, 0], 0.0, torch.nan).double()


class PennylaneBackend:
    """Any PennyLane device.

    Args:
        device: Its name, such as "default.qubit", "lightning.qubit" or "default.mixed", or a device object.
        diff_method: How gradients are made. "backprop" and "adjoint": by the device, where it can.
            "parameter-shift", "spsa" and "finite-diff": evaluations on the device, put together by qconv.gradients,
            since PennyLane's own refuse gradients with respect to batches. "best": the first of backprop, adjoint and
            parameter-shift that works. None: backprop on "default.qubit" and "default.mixed" without shots (but for
            gates P and U3 on the latter), else parameter-shift.
        samples: Of "spsa"; see Differentiation.
        step: Of "spsa" and "finite-diff"; see Differentiation.
        options: The device's own options, if it is named.

    Raises:
        ValueError: For an unknown diff_method, or options that do not fit.
    """

    name = "pennylane"

    def __init__(
        self,
        device: str | Device = "default.qubit",
        *,
        diff_method: str | None = None,
        samples: int | None = None,
        step: float | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(device, (str, Device)):
            raise ValueError(f"device is a {type(device).__name__}: give the name of a PennyLane device, or a device")
        needed = _NEEDED.get(device) if isinstance(device, str) else None
        if needed is not None and find_spec(needed) is None:
            raise ValueError(f"PennyLane device {device!r} needs the package {needed}: pip install {needed}")
        if isinstance(device, Device) and options:
            raise ValueError(
                f"options {sorted(options)} were given beside a device object: give them to qml.device(...)"
            )
        if "shots" in options or (isinstance(device, Device) and device.shots):
            raise ValueError("the device was given shots of its own: give shots=... to the layer or to simulate")
        if diff_method is not None and diff_method not in DIFF_METHODS:
            raise unknown("diff_method", diff_method, DIFF_METHODS)
        self.device, self.options, self.diff_method = device, options, diff_method
        self._differentiation = Differentiation()
        if diff_method in METHODS:
            self._differentiation = Differentiation(diff_method, samples, step)
        elif samples is not None or step is not None:
            raise ValueError(
                f"samples is {samples!r} and step {step!r} for diff_method {diff_method!r}: only 'spsa' and "
                "'finite-diff' take them"
            )

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> PennylaneCompiled:
        """See Backend."""
        check_options(shots, noise, seed)
        name = self.device if isinstance(self.device, str) else self.device.name
        if noise is not None:
            if name != "default.mixed":
                raise Unsupported(
                    f"PennyLane device {name!r} was asked for noise: use "
                    "backend=load_backend('pennylane', device='default.mixed'), or backend 'fourier' or 'qiskit'"
                )
            noise.check_wires(circuit.n_wires)
        if shots is not None and name == "default.tensor":
            raise Unsupported(
                f"PennyLane device 'default.tensor' gives exact values but shots={shots} was asked: use device "
                "'default.qubit' or 'lightning.qubit' for shots"
            )
        _check_memory(name, circuit.n_wires)
        target = self._load(circuit.n_wires, shots, seed)
        compiled = PennylaneCompiled(circuit, target, self._method(target, circuit, shots), shots, noise)
        compiled.differentiation = self._differentiation
        return compiled

    def _load(self, n_wires: int, shots: int | None, seed: int | None) -> Device:
        if isinstance(self.device, Device):
            if shots is not None and seed is not None:
                raise ValueError(
                    f"seed is {seed} for shots of a device object, which draws from its own: give qml.device(..., "
                    "seed=...), or name the device"
                )
            if self.device.wires is not None and len(self.device.wires) < n_wires:
                raise ValueError(
                    f"circuit has {n_wires} wires but device {self.device.name!r} has {len(self.device.wires)}: make "
                    "it larger"
                )
            return self.device
        seeded = {"seed": seed} if shots is not None and seed is not None else {}
        options = {**seeded, **self.options}
        try:
            return qml.device(self.device, wires=n_wires, **options)
        except (qml.exceptions.DeviceError, TypeError, ImportError) as error:
            if seeded and "'seed'" in str(error):
                raise ValueError(
                    f"seed is {seed} but PennyLane device {self.device!r} takes none: leave it out, or use device "
                    "'default.qubit'"
                ) from error
            raise ValueError(
                f"PennyLane device {self.device!r} with options {options} does not load: {error}"
            ) from error

    def _method(self, target: Device, circuit: Circuit, shots: int | None) -> str | None:
        """What the device differentiates by, one of _OWN; None where it gives values alone."""
        own = [method for method in _OWN if shots is None and _differentiates(target, method)]
        cut = target.name == "default.mixed" and any(gate.name in _CUT_IN_MIXED for gate in circuit.gates)
        if cut and "backprop" in own:
            own.remove("backprop")
        if self.diff_method is None:
            return "backprop" if target.name in _TORCH_DEVICES and "backprop" in own else None
        if self.diff_method == "best":
            # Adjoint differentiation knows gates, not the amplitudes of a prepared state.
            own = [method for method in own if method == "backprop" or not features_of(circuit)]
            return own[0] if own else None
        if self.diff_method in _OWN and self.diff_method not in own:
            asked = "" if shots is None else f" with shots={shots}"
            asked += f" through gates {' or '.join(_CUT_IN_MIXED)}" if cut else ""
            raise Unsupported(
                f"PennyLane device {target.name!r} has no diff_method {self.diff_method!r}{asked}: choose from "
                f"{', '.join([*own, *METHODS, 'best'])}"
            )
        return self.diff_method if self.diff_method in _OWN else None


def _differentiates(target: Device, method: str) -> bool:
    return bool(target.supports_derivatives(ExecutionConfig(gradient_method=method)))


def _check_memory(name: str, n_wires: int) -> None:
    """Raise Unsupported where one state of a device is larger than this machine's memory."""
    if name not in (*_TORCH_DEVICES, "lightning.qubit"):
        return
    needed = 16 * 2 ** (n_wires * (2 if name == "default.mixed" else 1))
    present = machine_memory()
    if needed > present:
        raise Unsupported(
            f"a state of {n_wires} wires takes {needed:,} bytes on PennyLane device {name!r} but this machine has "
            f"{present:,.0f}: use fewer wires, or device 'default.tensor'"
        )
