"""Qiskit as a backend: AerSimulator with every method, any device of Qiskit's, or a SamplerV2."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
import torch
from qiskit.primitives import BaseSamplerV2
from qiskit.providers import BackendV2
from qiskit_aer import AerError, AerSimulator
from torch import Tensor

from circuits.circuit import Circuit
from circuits.interop import preparation_angles
from circuits.naming import unknown
from circuits.noise import NoiseModel
from qconv.backends.angles import angles_of, evaluate_angles, features_of, normalized, with_free_angles
from qconv.backends.clifford import clifford_angles
from qconv.backends.jobs import JobFailed, Run, run_in_jobs
from qconv.backends.protocol import (
    Real,
    Unsupported,
    check_call,
    check_options,
    circuit_size,
    device_counts,
    measurement_settings,
    split_invalid,
)
from qconv.backends.qiskit_checks import (
    STABILIZER,
    check_arguments,
    check_errors,
    check_memory,
    check_method,
    check_options_of_aer,
    check_sampler,
    check_sampling,
    memory,
    pairs_of,
    state_bytes,
)
from qconv.backends.qiskit_folds import folded_program
from qconv.backends.qiskit_programs import (
    exact_program,
    forgotten_map,
    measured_places,
    measured_program,
    noisy_gates,
    prepared_angles,
    readout_of,
    saved_program,
    sizes,
    standard_gates,
    target_of,
)
from qconv.backends.qiskit_runs import AerRun, DeviceRun, Program, SamplerRun
from qconv.backends.statevector import simulation_counts

# What the objects of one job may take in this process, in bytes; the simulator's state comes on top.
JOB_BYTES = 2**28
# Bytes of one circuit's parameters and results (measured: 12 to 13 kB), of each outcome in its counts, and of each
# value that Aer saves (measured: 0.8 kB).
_CIRCUIT_BYTES, _OUTCOME_BYTES, _VALUE_BYTES = 2**14, 64, 2**10
# Options of Aer's matrix product states that truncate them.
_TRUNCATING = ("matrix_product_state_max_bond_dimension", "matrix_product_state_truncation_threshold")
# Circuits a job on a simulator: the job's own latency is small beside them, and an executor has something to share.
CIRCUITS_A_JOB = 2**11

_KEPT = 16  # programs
# Options of Aer's methods that are not its own defaults; see check_sampling.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "extended_stabilizer": {"extended_stabilizer_sampling_method": "norm_estimation"}
}


class QiskitCompiled:
    """A circuit transpiled once; the patches of a call are as few jobs as memory and the device allow.

    Args:
        circuit: The kernel.
        program: Its transpiled circuits.
        run: Runs a job of them.
        method: Of AerSimulator; None for other devices.
        rows_a_job: (patch, filter) pairs a job.
        executor: Where jobs run; None for here, one after another.
        shots: See Backend.
        noisy: Whether a simulator has noise.
        transpiled: Whether the circuits are those of a device, other than the kernel as it is written.
        seed: See Backend.

    Attributes:
        sizes: See Sized.
        approximation: See approximation_of.
    """

    differentiable = False
    approximation = ""

    def __init__(
        self,
        circuit: Circuit,
        program: Program,
        run: Run,
        *,
        method: str | None,
        rows_a_job: int,
        executor: Executor | None,
        shots: int | None,
        noisy: bool,
        transpiled: bool,
        seed: int | None,
    ) -> None:
        self.circuit = circuit
        self._program, self._run, self._rows_a_job, self._executor = program, run, rows_a_job, executor
        self._method, self._shots, self._noisy = method, shots, noisy
        self._angles, self._features = angles_of(circuit), features_of(circuit)
        self._settings = len(measurement_settings(circuit.observables))
        self.sizes = sizes(program) if transpiled else (circuit_size(circuit),) * self._settings
        # Each call draws seeds of its own, so that the shots of successive calls are independent; without a seed from
        # torch's generator, which exact values leave alone.
        self._rng = None if seed is None and shots is not None else np.random.default_rng(seed)

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled.

        Raises:
            JobFailed: If a job does not finish; no further one is begun then, and it holds the values
                of those that finished.
        """
        check_call(self.circuit, inputs, weights)
        with torch.no_grad():
            wide, wide_weights = inputs.double().cpu(), weights.double().cpu()
            rows = evaluate_angles(self._angles, wide, wide_weights).numpy()
            if self._features:
                features = evaluate_angles(self._features, wide, wide_weights)
                amplitudes = normalized(features, 2**self.circuit.n_wires).numpy()
                rows = np.concatenate([preparation_angles(amplitudes), rows], axis=1)
        if len(rows) == 0:
            return weights.new_zeros(len(inputs), len(weights), len(self.circuit.observables))
        rows, invalid = split_invalid(rows)
        if self._method in STABILIZER:
            rows = clifford_angles(self.circuit, rows, prepared_angles(self.circuit), self._method)
        try:
            values = torch.from_numpy(self._values(rows))
        except JobFailed as failure:
            raise failure.of(len(inputs), len(weights)) from failure.__cause__
        values[torch.from_numpy(invalid)] = torch.nan
        return values.to(weights).reshape(len(inputs), len(weights), -1)

    def _values(self, rows: Real) -> Real:
        """Expectation values (R, n_obs) for rows of bound angles (R, K)."""
        # Exact values without parameters are the same in every row.
        repeats = 1 if rows.shape[1] or self._shots is not None else len(rows)
        values = run_in_jobs(
            self._run,
            rows[: len(rows) // repeats],
            len(self.circuit.observables),
            self._rng,
            self._rows_a_job,
            self._executor,
        )
        return np.repeat(values, repeats, axis=0)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: every patch gate by gate; a device, and a stabilizer's bits, do no arithmetic of ours.

        What a matrix product state takes depends on its bonds: as many operations as a state vector are assumed.
        """
        runs = patches * filters
        total = device_counts(self.circuit, self._settings, runs, self._shots, self.sizes)
        if self._method is None or self._method in STABILIZER:
            return total
        mixed = self._noisy and self._method == "density_matrix"
        # Other methods sample a channel's operators: a run of the circuit for every shot.
        trajectories = self._shots if self._noisy and not mixed and self._shots else 1
        return total + simulation_counts(self.circuit, runs * trajectories, mixed)


class QiskitBackend:
    """Qiskit's AerSimulator, a device of Qiskit's, or a SamplerV2.

    Circuits are transpiled once, with their parameters free. Each call binds its patches to them in as few jobs as a
    bound of JOB_BYTES (256 MB of parameters and results) and the device's max_circuits allow, at most CIRCUITS_A_JOB
    (2048) a job on a simulator of this machine.

    Args:
        method: Aer's simulation method. By default "statevector"; where there is noise "density_matrix", or
            "statevector" (sampled channels, with shots) where that does not fit into memory. "stabilizer" and
            "extended_stabilizer" take Clifford angles only. The latter also T, Tdg, CCX and CCZ, and shots only: with
            them some 0.1 s a shot, within Aer's extended_stabilizer_approximation_error (of a circuit with one T, a
            percent of the shots gave outcomes that it does not have).
        device: Any BackendV2 or SamplerV2 in place of our own AerSimulator; or Aer's own option, "CPU" or "GPU".
        noise_model: A qiskit_aer NoiseModel; or a BackendV2, of which Aer then simulates noise, basis gates and
            coupling map, as far as it knows them (of FakeManilaV2 it takes the mean of both readout errors). `noise`
            of a layer means our own NoiseModel instead, and does not go with this one.
        coupling_map: Pairs of qubits that gates on two act on, as (control, target); None for all.
        basis_gates: Qiskit's names of the gates to transpile to; None for those of the method and noise model.
        optimization_level: Of qiskit.transpile; by default 1 where there is a device or a coupling map, else 0.
        executor: A concurrent.futures executor (threads, processes, Dask's client.get_executor()) that runs the jobs
            of a call at the same time. Values do not depend on it. It must not be the one that the caller runs on.
        circuits_a_job: Fewer circuits a job than stated above, so that an executor has more jobs to share. Each job
            draws shots from a seed of its own, so another number gives other shots under the same seed.
        options: AerSimulator's own, such as matrix_product_state_max_bond_dimension=16 or max_memory_mb=1000.

    Raises:
        ValueError: For methods, options or devices that do not exist or do not fit each other.
    """

    name = "qiskit"

    def __init__(
        self,
        method: str | None = None,
        *,
        device: Any = None,
        noise_model: Any = None,
        coupling_map: Sequence[Sequence[int]] | None = None,
        basis_gates: Sequence[str] | None = None,
        optimization_level: int | None = None,
        executor: Executor | None = None,
        circuits_a_job: int | None = None,
        **options: Any,
    ) -> None:
        check_arguments(method, device, noise_model, executor, circuits_a_job)
        if isinstance(device, str):
            options["device"], device = device, None
        if device is not None and (method or options or noise_model or coupling_map or basis_gates):
            given = {"method": method, "noise_model": noise_model, "coupling_map": coupling_map} | options
            names = ", ".join(key for key, value in given.items() if value is not None) or "basis_gates"
            raise ValueError(
                f"device is a {type(device).__name__} but {names} was given too: the device has its own, so give one "
                "or the other"
            )
        if isinstance(noise_model, BackendV2) and (coupling_map or basis_gates):
            raise ValueError(
                f"noise_model is the device {noise_model.name!r}, which has a coupling map and basis gates, but others "
                "were given too: give one or the other"
            )
        self.method, self.device, self.noise_model = method, device, noise_model
        self.coupling_map = forgotten_map(target_of(device))
        if coupling_map is not None:
            self.coupling_map = pairs_of(coupling_map)
        self.basis_gates = None if basis_gates is None else list(basis_gates)
        # Whether circuits are made of other gates than the kernel's, a device's or a simulator's with noise of its own.
        self._rewrites = any(x is not None for x in (device, noise_model, self.coupling_map, basis_gates))
        self._scale = 1
        self._layout: list[int] | None = None
        self.optimization_level, self.options = optimization_level, options
        self.executor, self.circuits_a_job = executor, circuits_a_job
        self._programs: dict[Any, Program] = {}
        # Made once now, so that an unknown option is said here.
        check_options_of_aer(options, basis_gates)
        if device is None:
            self._simulator(method or "automatic")

    def __deepcopy__(self, memo: dict[int, Any]) -> QiskitBackend:
        # Nothing of it changes; executors and devices cannot be copied.
        return self

    def __getstate__(self) -> dict[str, Any]:
        # An executor belongs to its process.
        return {**self.__dict__, "executor": None, "_programs": {}}

    def folded(self, scale: int) -> QiskitBackend | None:
        """This backend with the gates of its transpiled circuits folded; see qconv.mitigation.Folding."""
        if not self._rewrites:
            return None
        return self._with(_scale=scale)

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> QiskitCompiled:
        """See Backend."""
        check_options(shots, noise, seed)
        if noise is not None and self._rewrites:
            raise Unsupported(
                "noise was asked, which follows the kernel's own gates, but a device, noise_model, coupling_map or "
                "basis_gates replaces those gates: give noise, or a noise_model of qiskit_aer"
            )
        runner, method = self._runner(circuit.n_wires, shots, noise)
        name = getattr(runner, "name", None) or type(runner).__name__
        if isinstance(runner, AerSimulator):
            noisy = noise is not None or runner.options.noise_model is not None
            check_method(circuit, method, shots, noisy, noise)
            check_sampling(circuit, method, runner.options)
            check_memory(circuit.n_wires, method, runner)
        else:
            noisy = False
            if shots is None:
                raise Unsupported(f"{name} gives counts but shots=None (exact values) was asked: give shots")
            if isinstance(runner, BaseSamplerV2):
                check_sampler(runner, seed)
        if not isinstance(self.noise_model, BackendV2):
            check_errors(circuit, target_of(runner))
        limit = self._qubits(runner)
        if limit is not None and circuit.n_wires > limit:
            raise Unsupported(
                f"{name} has {limit} qubits but the kernel has {circuit.n_wires} wires: use fewer (in a layer: a "
                "smaller kernel_size or more groups), or a larger device"
            )
        program = self._program(circuit, shots is None, noise, method, runner, name)
        run: Run
        if isinstance(runner, AerSimulator):
            run = AerRun(program, runner, shots)
        else:
            assert shots is not None
            run = (SamplerRun if isinstance(runner, BaseSamplerV2) else DeviceRun)(program, runner, shots)
        compiled = QiskitCompiled(
            circuit,
            program,
            run,
            method=method if isinstance(runner, AerSimulator) else None,
            rows_a_job=self._rows_a_job(runner, program, circuit.n_wires, shots),
            executor=self.executor,
            shots=shots,
            noisy=noisy,
            transpiled=self._rewrites,
            seed=seed,
        )
        if method == "matrix_product_state":
            cuts = {name: self.options[name] for name in _TRUNCATING if self.options.get(name) is not None}
            compiled.approximation = ", ".join(f"{name} {value}" for name, value in cuts.items())
        return compiled

    def measured_qubits(self, circuit: Circuit, shots: int | None) -> list[list[int]] | None:
        """The qubits that a circuit's wires are measured on, for each measurement setting; see mitigation.Placing."""
        device = None if self.device is None else target_of(self.device)  # of a sampler the device behind it, if any
        if not (isinstance(device, BackendV2) or self.coupling_map or isinstance(self.noise_model, BackendV2)):
            return None
        # Shots, of which there is a measurement to look at.
        program = self.compile(circuit, shots=shots or 1)._program
        return [measured_places(each) for each in program.circuits]

    def placed(self, qubits: Sequence[int]) -> QiskitBackend:
        """This backend with wires on these qubits; see mitigation.Placing."""
        return self._with(_layout=list(qubits), _programs={})

    def on(self, executor: Executor) -> QiskitBackend:
        """This backend with jobs on an executor, and the same programs."""
        return self._with(executor=executor)

    def _with(self, **changes: Any) -> QiskitBackend:
        result = object.__new__(QiskitBackend)
        # The same executor and programs, which a copy would lose.
        result.__dict__ = {**self.__dict__, **changes}
        return result

    def _runner(self, wires: int, shots: int | None, noise: NoiseModel | None) -> tuple[Any, str]:
        """What runs the circuits, and Aer's method where that is a simulator."""
        if self.device is not None:
            return self.device, getattr(getattr(self.device, "options", None), "method", None) or "automatic"
        method = self.method
        if method is None and noise is None and self.noise_model is None:
            method = "statevector"
        elif method is None:
            method = "density_matrix"
            fits = state_bytes(wires, method, self.options) <= memory(self.options)
            if shots is not None and not fits:
                method = "statevector"
        return self._simulator(method), method

    def _simulator(self, method: str) -> Any:
        options = {"method": method, **_DEFAULTS.get(method, {}), **self.options}
        try:
            if isinstance(self.noise_model, BackendV2):
                return AerSimulator.from_backend(self.noise_model, **options)
            if self.noise_model is not None:
                options["noise_model"] = self.noise_model
            return AerSimulator(**options)
        except AerError as error:
            known = dict(AerSimulator().options.items())
            for name in self.options:
                if name not in known:
                    raise unknown("option of AerSimulator", name, known) from error
            raise ValueError(f"AerSimulator does not take the options {options}: {error.message}") from error

    def _qubits(self, runner: Any) -> int | None:
        if self.coupling_map is not None:
            return 1 + max(qubit for pair in self.coupling_map for qubit in pair)
        if isinstance(self.noise_model, BackendV2):
            return int(self.noise_model.num_qubits)
        # A simulator's own number comes from its memory, which was checked.
        if isinstance(runner, AerSimulator) and runner.coupling_map is None:
            return None
        found = getattr(target_of(runner), "num_qubits", None)
        return None if found is None else int(found)

    def _program(
        self, circuit: Circuit, exact: bool, noise: NoiseModel | None, method: str, runner: Any, name: str
    ) -> Program:
        # All angles are parameters: circuits that differ in what feeds them are one, as for parameter shifts.
        circuit = with_free_angles(circuit)
        target, options = self._transpilation(runner, method)
        key = (circuit, noise, method)
        if exact and not self._rewrites:
            return self._kept((*key, True), lambda: exact_program(circuit, noise, target, name, options))
        program = self._kept((*key, False), lambda: measured_program(circuit, noise, target, name, options))
        if self._scale == 1 and not exact:
            return program

        def made() -> Program:
            done = program
            if self._scale > 1:
                native = options.get("basis_gates") or (None if target is None else target.operation_names)
                done = folded_program(program, self._scale, native, noisy_gates(target_of(runner)))
            return saved_program(done, circuit, readout_of(runner.options.noise_model)) if exact else done

        return self._kept((*key, exact, self._scale), made)

    def _kept(self, key: Any, make: Callable[[], Program]) -> Program:
        if key not in self._programs:
            self._programs[key] = make()
            for oldest in list(self._programs)[:-_KEPT]:
                self._programs.pop(oldest, None)
        return self._programs[key]

    def _transpilation(self, runner: Any, method: str) -> tuple[Any, dict[str, Any]]:
        """Target and options of qiskit.transpile."""
        target, options = self._translation(runner, method)
        return target, options if self._layout is None else {**options, "initial_layout": self._layout}

    def _translation(self, runner: Any, method: str) -> tuple[Any, dict[str, Any]]:
        routed = self.device is not None or self.coupling_map is not None or isinstance(self.noise_model, BackendV2)
        level = int(routed) if self.optimization_level is None else self.optimization_level
        own = isinstance(runner, AerSimulator) and runner.coupling_map is None
        if self.coupling_map is None and self.basis_gates is None and not (own and method in STABILIZER):
            target = target_of(runner)
            return target, {} if target is None else {"optimization_level": level}
        # AerSimulator takes a coupling map and forgets it: only transpile() minds it, and without the simulator. As a
        # target of 10,000 qubits, a stabilizer simulator takes seconds.
        gates = self.basis_gates or standard_gates(target_of(runner).configuration().basis_gates)
        return None, {"optimization_level": level, "coupling_map": self.coupling_map, "basis_gates": gates}

    def _rows_a_job(self, runner: Any, program: Program, wires: int, shots: int | None) -> int:
        bytes_a_circuit = _CIRCUIT_BYTES + _OUTCOME_BYTES * min(shots or 0, 2 ** min(wires, 60))
        if shots is None:
            bytes_a_circuit += _VALUE_BYTES * -(-program.observables // len(program.circuits))
        if isinstance(runner, BaseSamplerV2):
            bytes_a_circuit = _CIRCUIT_BYTES + (shots or 0) * (wires // 8 + 1)
        circuits = max(1, JOB_BYTES // bytes_a_circuit)
        if isinstance(runner, AerSimulator):
            circuits = min(circuits, CIRCUITS_A_JOB)
        most = [self.circuits_a_job, getattr(runner, "max_circuits", None)]
        circuits = min([circuits, *(n for n in most if n)])
        return max(1, int(circuits) // len(program.circuits))
