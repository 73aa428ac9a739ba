"""What a layer says that it costs is what runs, also behind backends that wrap others."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from circuits import Channel, NoiseModel, ReadoutError, kernel
from qconv import QuantumConv2d, load_backend
from qconv.distribution import distribute
from qconv.gradients import differentiate
from qconv.mitigation import ReadoutInversion, ZeroNoise

KERNEL = kernel("basic_entangler", 2, 1, readout=["ZI", "XX"])
NOISE = NoiseModel((("CNOT", Channel("depolarizing", 0.05)),), readout=ReadoutError(0.02, 0.05))
IMAGES = (2, 1, 3, 4)


class Tallying:
    """State vectors that count how often circuits are measured, and with how many gates on two wires."""

    name = "tallying"
    runs, gates_2q = 0, 0  # of the class: what is pickled counts here too

    def compile(self, circuit, *, shots=None, noise=None, seed=None):
        compiled = load_backend("statevector").compile(circuit, shots=shots, noise=noise, seed=seed)
        own = compiled.counts(1, 1)

        class Counted:
            differentiable = False
            counts = staticmethod(compiled.counts)

            def __call__(self, inputs, weights):
                times = len(inputs) * len(weights)
                Tallying.runs += times * own["device:circuits"]
                Tallying.gates_2q += times * own["device:gates_2q"]
                return compiled(inputs.detach(), weights.detach())

        return Counted()


@pytest.fixture(scope="module")
def pool():
    with ThreadPoolExecutor(1) as executor:
        yield executor


WRAPPED = {
    "plain": (lambda pool: Tallying(), "parameter-shift"),
    "zero noise": (lambda pool: ZeroNoise(Tallying()), "parameter-shift"),
    # Gates with angles: folded circuits have more to shift.
    "zero noise of all gates": (lambda pool: ZeroNoise(Tallying(), (1, 3), gates=("RX", "CNOT")), "parameter-shift"),
    "zero noise, spsa inside": (lambda pool: ZeroNoise(differentiate(Tallying(), "spsa")), "spsa"),
    "zero noise, spsa around": (lambda pool: differentiate(ZeroNoise(Tallying()), "spsa", samples=3), "spsa"),
    "inverted": (lambda pool: ReadoutInversion(Tallying()), "parameter-shift"),
    "inverted and zero noise": (lambda pool: ReadoutInversion(ZeroNoise(Tallying())), "parameter-shift"),
    "distributed": (lambda pool: distribute(differentiate(Tallying(), "spsa"), pool, 100), "spsa"),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_cost_of_wrapped_backends_is_what_runs(case, pool):
    wrap, method = WRAPPED[case]
    layer = QuantumConv2d(1, 4, (1, 2), kernel=KERNEL, backend=wrap(pool), shots=7, noise=NOISE, seed=0)
    cost, counts = layer.cost(IMAGES), layer.counts(IMAGES[1:])
    assert cost.method == method

    def run(training, inputs):
        Tallying.runs = Tallying.gates_2q = 0
        with torch.set_grad_enabled(training):
            values = layer(torch.rand(IMAGES, requires_grad=inputs))
        if training:
            values.square().sum().backward()
        return Tallying.runs, Tallying.gates_2q

    assert run(False, False) == (cost.circuits, cost.gates_2q)
    assert (cost.circuits, cost.total_shots) == (2 * counts["device:circuits"], 2 * counts["device:shots"])
    assert (cost.gates_1q, cost.gates_2q) == (2 * counts["device:gates_1q"], 2 * counts["device:gates_2q"])
    for inputs, said in ((False, cost.weight_step), (True, cost.step)):
        assert said == run(True, inputs)[0]


def test_gradients_of_the_simulator_cost_no_circuits():
    layer = QuantumConv2d(
        1, 4, (1, 2), kernel=KERNEL, backend=load_backend("statevector", gradient="exact"), shots=7, seed=0
    )
    cost = layer.cost(IMAGES)
    assert cost.method == "exact"
    assert cost.circuits == cost.weight_step == cost.step == 2 * layer.counts(IMAGES[1:])["device:circuits"]
