"""Bound circuits of Qiskit run as one job each: on AerSimulator, on any BackendV2, or through a SamplerV2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from qiskit import QuantumCircuit

from qconv.backends.jobs import Missing, Unfinished
from qconv.backends.protocol import Real


@dataclass(frozen=True)
class Program:
    """Transpiled circuits whose parameters are still free, and what is read off each.

    Args:
        circuits: One for each measurement setting; for exact values one may serve several.
        parameters: The K parameters, in the order of a row of angles.
        members: For each circuit the indices of the observables it gives.
        masks: For each circuit and member the bits whose signs multiply to the observable; bit w is wire w.
        observables: How many there are.
    """

    circuits: tuple[QuantumCircuit, ...]
    parameters: tuple[Any, ...]
    members: tuple[tuple[int, ...], ...]
    masks: tuple[tuple[int, ...], ...]
    observables: int

    def binds(self, rows: Real) -> tuple[list[QuantumCircuit], list[dict[Any, list[float]]]]:
        """Circuits with Aer's parameter_binds; the results are ordered (circuit, row)."""
        circuits: list[QuantumCircuit] = []
        binds: list[dict[Any, list[float]]] = []
        for circuit in self.circuits:
            # What has no parameters is run once a row too, so that every row has shots of its own.
            own = {p: rows[:, k].tolist() for k, p in enumerate(self.parameters) if p in circuit.parameters}
            repeats = 1 if own else len(rows)
            circuits += [circuit] * repeats
            binds += [own] * repeats
        return circuits, binds

    def bound(self, rows: Real) -> list[QuantumCircuit]:
        """A circuit of its own for each (circuit, row)."""
        return [
            circuit.assign_parameters(dict(zip(self.parameters, row, strict=True)), strict=False)
            for circuit in self.circuits
            for row in rows.tolist()
        ]


@dataclass(frozen=True)
class AerRun:
    """One job on AerSimulator, parameters bound inside of it; see jobs.Run.

    Args:
        program: The circuits.
        simulator: The simulator.
        shots: A circuit; None for the expectation values that the circuits save as "o0", "o1" ...
    """

    program: Program
    simulator: Any
    shots: int | None

    def __call__(self, rows: Real, seed: int) -> Real:
        """See jobs.Run."""
        program = self.program
        circuits, binds = program.binds(rows)
        options: dict[str, Any] = {"seed_simulator": seed, "runtime_parameter_bind_enable": True}
        if any(binds):
            options["parameter_binds"] = binds
        if self.shots is not None:
            options["shots"] = self.shots
        result = self.simulator.run(circuits, **options).result()
        values = np.full((len(rows), program.observables), np.nan)
        missing = np.ones(len(rows), dtype=np.bool_)
        if len(result.results) == len(rows) * len(program.circuits):
            missing[:] = False
            for k, (members, masks) in enumerate(zip(program.members, program.masks, strict=True)):
                for row in range(len(rows)):
                    found = result.results[k * len(rows) + row]
                    if not found.success:
                        missing[row] = True
                    elif self.shots is None:
                        values[row, list(members)] = [getattr(found.data, f"o{member}") for member in members]
                    else:
                        outcomes = {int(key, 16): n for key, n in found.data.counts.items()}
                        values[row, list(members)] = means(outcomes, masks)
        if not result.success or missing.any():
            raise Unfinished(f"Aer says: {' '.join(str(result.status).split())[:300]}", values, missing)
        return values


@dataclass(frozen=True)
class DeviceRun:
    """One job on a BackendV2, or several where it takes fewer circuits a job; see jobs.Run.

    Args:
        program: The circuits.
        device: The BackendV2.
        shots: A circuit.
    """

    program: Program
    device: Any
    shots: int

    def __call__(self, rows: Real, seed: int) -> Real:
        """See jobs.Run."""
        circuits = self.program.bound(rows)
        options: dict[str, Any] = {"shots": self.shots}
        if hasattr(self.device.options, "seed_simulator"):
            options["seed_simulator"] = seed
        a_job = self.device.max_circuits or len(circuits)
        parts = [circuits[start : start + a_job] for start in range(0, len(circuits), a_job)]
        # All are handed in before the first is waited for: a device has a queue.
        jobs = [self.device.run(part, **options) for part in parts]
        counts: list[dict[int, int] | None] = []
        reason = ""
        for job, part in zip(jobs, parts, strict=True):
            end = len(counts) + len(part)
            try:
                result = job.result()
                for k in range(len(part)):
                    done = result.results[k].success
                    counts.append({int(key, 2): n for key, n in result.get_counts(k).items()} if done else None)
                    reason = reason if done else str(result.results[k].status)
            except Exception as error:
                reason = str(error)
                counts += [None] * (end - len(counts))
        values, missing = _from_counts(self.program, counts, len(rows))
        if missing.any():
            raise Unfinished(f"device {self.device.name} says: {' '.join(reason.split())[:300]}", values, missing)
        return values


@dataclass(frozen=True)
class SamplerRun:
    """One job of a SamplerV2: a PUB for each measurement setting, with all rows as its parameter values; see jobs.Run.

    The sampler draws from its own generator.
    """

    program: Program
    sampler: Any
    shots: int

    def __call__(self, rows: Real, seed: int) -> Real:
        """See jobs.Run."""
        program = self.program
        place = {parameter: k for k, parameter in enumerate(program.parameters)}
        pubs = [(circuit, rows[:, [place[p] for p in circuit.parameters]]) for circuit in program.circuits]
        results = self.sampler.run(pubs, shots=self.shots).result()
        values = np.empty((len(rows), program.observables))
        for result, members, masks in zip(results, program.members, program.masks, strict=True):
            # (R, shots, bytes), the last byte with the lowest bits.
            packed = np.asarray(result.data.meas.array)
            for member, mask in zip(members, masks, strict=True):
                wanted = np.frombuffer(mask.to_bytes(packed.shape[-1], "big"), dtype=np.uint8)
                odd = np.bitwise_count(packed & wanted).sum(axis=-1, dtype=np.int64) & 1
                values[:, member] = 1 - 2 * odd.mean(axis=-1)
        return values


def _from_counts(program: Program, counts: list[dict[int, int] | None], rows: int) -> tuple[Real, Missing]:
    values, missing = np.full((rows, program.observables), np.nan), np.zeros(rows, dtype=np.bool_)
    for k, (members, masks) in enumerate(zip(program.members, program.masks, strict=True)):
        for row in range(rows):
            found = counts[k * rows + row]
            if found is None:
                missing[row] = True
            else:
                values[row, list(members)] = means(found, masks)
    return values, missing


def means(outcomes: dict[int, int], masks: tuple[int, ...]) -> list[float]:
    """Means of products of measured signs, for bitstrings as numbers and how often each was found."""
    total = sum(outcomes.values())
    return [
        sum(n * (1 - 2 * ((outcome & mask).bit_count() & 1)) for outcome, n in outcomes.items()) / total
        for mask in masks
    ]
