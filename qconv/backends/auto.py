"""Backend "auto": every exact way to evaluate a circuit, and for each call the one predicted to be fastest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from circuits.circuit import Circuit
from circuits.noise import NoiseModel
from qconv.backends.angles import features_of
from qconv.backends.costs import Call, Priced, multiplications, seconds
from qconv.backends.density import MAX_WIRES as MAX_NOISY_WIRES
from qconv.backends.fourier import MAX_WIRES, TRAIN_FROM, FourierCompiled
from qconv.backends.protocol import Backend, Compiled, Unsupported, check_options
from qconv.backends.quadratic import QuadraticCompiled
from qconv.backends.statevector import StatevectorBackend, simulation_counts
from qconv.backends.tensor_train import TrainCompiled

# What predictions are made for before anything was computed.
TYPICAL = Call(patches=8192)
# What is contracted without being asked for: few gates, and few multiplications a patch.
NETWORK_GATES = 1000
NETWORK_MULTIPLICATIONS = 2**24
# Circuits with shots, without noise and with: seconds that each takes at least, and multiplications a second. Fitted on
# one core and rounded, for the patches of an image of 28 x 28 pixels at stride 2.
_PATCHES = 196
_DRAWN_HERE = ((3e-5, 4e9), (5e-5, 1.8e9))
_ON_AER = ((3e-4, 5e9), (1e-3, 3e9))


@lru_cache(maxsize=64)
def exact_ways(circuit: Circuit, noise: NoiseModel | None) -> tuple[dict[str, Priced], Unsupported | None]:
    """Every exact way by name, that of backend "fourier" first, and why there is no more."""
    ways: dict[str, Priced] = {}
    refusal: Unsupported | None = None

    def attempt(name: str, way: Callable[[], Priced]) -> None:
        nonlocal refusal
        try:
            ways[name] = way()
        except Unsupported as reason:
            refusal = reason

    if features_of(circuit):
        attempt("fourier (quadratic form)", lambda: QuadraticCompiled(circuit, noise))
    else:
        if circuit.n_wires >= TRAIN_FROM:
            attempt("fourier (tensor train)", lambda: TrainCompiled(circuit, noise))
        # All 4^n strings of ten wires are much to look at where a train has them too.
        if circuit.n_wires < MAX_WIRES + (not ways):
            attempt("fourier (all coefficients)", lambda: FourierCompiled(circuit, noise))
    if noise is None:
        attempt("statevector", lambda: StatevectorBackend.pure(circuit))
        if not ways:
            network = _network(circuit)
            ways |= {} if network is None else {"tensor_network": network}
    return ways, refusal


def _network(circuit: Circuit) -> Priced | None:
    """A contraction that is found at once and cheap to run; others have to be asked for by name."""
    if len(circuit.gates) > NETWORK_GATES or len(circuit.observables) > NETWORK_GATES:
        return None
    # Read where nothing else runs.
    from qconv.backends.tensor_network import NetworkCompiled

    try:
        found = NetworkCompiled(circuit, search=False)
    except Unsupported:
        return None
    return found if found.counts(1, 1)["mac:fp32*fp32"] <= NETWORK_MULTIPLICATIONS else None


def _sampling(circuit: Circuit, shots: int, noise: NoiseModel | None) -> tuple[Backend, str]:
    """The backend that is predicted to be the fastest with shots, and why."""
    noisy = noise is not None
    try:
        here = StatevectorBackend().compile(circuit, shots=shots, noise=noise).counts(_PATCHES, 1)
    except Unsupported as refusal:
        why = f"since {refusal}"
    else:
        fixed, rate = _DRAWN_HERE[noisy]
        own = fixed + multiplications(here) / _PATCHES / rate
        fixed, rate = _ON_AER[noisy]
        aer = fixed + multiplications(simulation_counts(circuit, 1, noisy)) / rate
        times = f"predicted {1e3 * own:.3g} ms a circuit, on qiskit's AerSimulator {1e3 * aer:.3g} ms"
        if own <= aer:
            return StatevectorBackend(), f"statevector: {shots} shots drawn from exact probabilities; {times}"
        why = f"statevector: {times}"
    from qconv.backends.qiskit import QiskitBackend

    return QiskitBackend(), f"qiskit: {shots} shots are counts of AerSimulator; {why}"


class AutoCompiled:
    """A circuit in every exact way; each call takes the one predicted to be fastest.

    Args:
        circuit: The circuit.
        ways: By name; at least one.
    """

    differentiable = True

    def __init__(self, circuit: Circuit, ways: dict[str, Priced]) -> None:
        self.circuit, self.ways = circuit, ways
        self._chosen: dict[Call, str] = {}
        # torch.compile and export, whose sizes are symbols, take this one.
        self._usual = self.ranking(TYPICAL)[0][0]

    def ranking(self, call: Call) -> list[tuple[str, float]]:
        """Names of the ways and predicted seconds, fastest first."""
        return sorted(((name, seconds(way, call)) for name, way in self.ways.items()), key=lambda pair: pair[1])

    def pick(self, patches: int, filters: int, training: bool, device: str, images: bool) -> Priced:
        """The way for a call; see Call."""
        if len(self.ways) == 1 or torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return self.ways[self._usual]
        # Calls of about the same size are one question.
        return self.ways[self._choice(Call(patches, filters, training, device, images))]

    def _choice(self, call: Call) -> str:
        # The largest call of about this size stands for all of them, whichever comes first.
        rounded = call._replace(patches=(1 << call.patches.bit_length()) - 1)
        if rounded not in self._chosen:
            self._chosen[rounded] = self.ranking(rounded)[0][0]
        return self._chosen[rounded]

    def reason(self, call: Call) -> str:
        """Which way a call takes and why, in words."""
        times, name = dict(self.ranking(call)), self._choice(call)
        time = times.pop(name)
        compared = ", ".join(f"{other} {1e3 * slower:.3g} ms" for other, slower in times.items())
        mode = "training" if call.training else "inference"
        return f"{name}: predicted {1e3 * time:.3g} ms for {mode} on {call.patches:,} patches ({call.device})" + (
            f"; {compared}" if compared else "; no other way is considered"
        )

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        training = torch.is_grad_enabled() and (inputs.requires_grad or weights.requires_grad)
        way = self.pick(inputs.shape[0], weights.shape[0], training, weights.device.type, False)
        return way(inputs, weights)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled: what inference on images runs."""
        return self.pick(patches, filters, False, "cpu", True).counts(patches, filters)


class AutoBackend:
    """Picks a backend by circuit, shots and noise, and where several are exact, by what each call would cost."""

    name = "auto"

    def forced(self, circuit: Circuit, shots: int | None, noise: NoiseModel | None) -> tuple[Backend, str] | None:
        """The only backend that can run this, and why; None where there are exact ways to choose from."""
        check_options(shots, noise, None)
        if shots is not None:
            return _sampling(circuit, shots, noise)
        ways, refusal = exact_ways(circuit, noise)
        if ways:
            return None
        if noise is None and refusal is not None:
            hint = "; of the named kernels, 'strongly_entangling' of depth 1 or 2 runs on many wires as a tensor train"
            raise Unsupported(f"{refusal}{'' if features_of(circuit) else hint}")
        if noise is not None and circuit.n_wires <= MAX_NOISY_WIRES:
            return StatevectorBackend(), f"statevector: density matrices for noise, since {refusal}"
        from qconv.backends.pennylane import PennylaneBackend

        return PennylaneBackend(device="default.mixed"), f"pennylane default.mixed: noise, and {refusal}"

    def compile(
        self, circuit: Circuit, *, shots: int | None = None, noise: NoiseModel | None = None, seed: int | None = None
    ) -> Compiled:
        """See Backend."""
        check_options(shots, noise, seed)
        ways = exact_ways(circuit, noise)[0] if shots is None else {}
        if ways:
            return AutoCompiled(circuit, ways)
        found = self.forced(circuit, shots, noise)
        assert found is not None
        return found[0].compile(circuit, shots=shots, noise=noise, seed=seed)
