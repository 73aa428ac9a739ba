from functools import reduce
from itertools import product

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import nn

from qconv.binarization import binarize
from qconv.binary_laws import agreement_law
from qconv.deformed import QuantumDeformedConv2d, QuantumDeformedLinear
from qconv.deformed_pairs import tiling
from qconv.energy import count
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear
from qconv.testing import check_layer

# A bit's operator, value +1 for |1>, and the real matrices of two.
S, X, ONE = np.diag([-1.0, 1.0]), np.array([[0.0, 1.0], [1.0, 0.0]]), np.eye(2)
EPS = S @ X
DEFORMATIONS = ("none", "input", "traceless", "pair", "neighbors")


def drawn(layer, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(scale * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return layer


def means(*shape, dtype=torch.float64, seed=0):
    return (2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1).to(dtype)


def density(h, coherent):
    """Of one qubit whose bit has mean h."""
    amplitudes = np.sqrt([(1 - h) / 2, (1 + h) / 2])
    return np.outer(amplitudes, amplitudes) if coherent else np.diag(amplitudes**2)


def kron(*matrices):
    return reduce(np.kron, matrices)


def on_two(matrix, i, j, n):
    """A matrix on qubits i and j of n."""
    grid = np.kron(matrix, np.eye(2 ** (n - 2))).reshape((2,) * (2 * n))
    order = [i, j, *(k for k in range(n) if k not in (i, j))]
    place = np.argsort(order)
    return grid.transpose([*place, *(n + place)]).reshape(2**n, 2**n)


def law_of(rho, observables, gates):
    """Law of the number of +1 outcomes of one-qubit observables with values in [-1, 1] after gates on two inputs."""
    n = len(observables)
    unitary = reduce(lambda u, gate: on_two(gate[0], gate[1], gate[2], n) @ u, gates, np.eye(2**n))
    rho = unitary @ rho @ unitary.T
    law = np.zeros(n + 1)
    for outcome in product((-1, 1), repeat=n):
        effect = kron(*((ONE + s * o) / 2 for s, o in zip(outcome, observables, strict=True)))
        law[outcome.count(1)] += np.trace(rho @ effect)
    return law


def observables_of(layer, row):
    """c0 + c1 X + c2 S of each synapse from eigenvalues and the angle of the axis."""
    w, d, a = (
        np.broadcast_to(0.0 if p is None else p.detach().numpy(), layer.weight.shape)[row].ravel()
        for p in (layer.weight, getattr(layer, "offset", None), None)
    )
    if layer.angle is not None:
        a = np.broadcast_to(layer.angle.detach().numpy(), layer.weight.shape)[row].ravel()
    found = []
    for wi, di, ai in zip(w, d, a, strict=True):
        axis = np.cos(ai) * S + np.sin(ai) * X
        found.append(np.tanh(wi + di) * (ONE + axis) / 2 + np.tanh(di - wi) * (ONE - axis) / 2)
    return found


def gates_of(layer, row):
    """exp of the generators (S e, X e) and (e X, e S) by the rotation vectors of the quaternions."""
    if layer.gate is None:
        return []
    taps = layer._flat(layer.weight).shape[-1]
    first, second, _ = tiling(*layer._kernel())
    blocks = layer.gate[row].detach().numpy().reshape(-1, len(first), 4)
    found = []
    for channel, block in enumerate(blocks):
        for k, (x, y, yy, zz) in enumerate(block):
            generators = 0
            for p, q, one, other in (
                (x, y, np.kron(S, EPS), np.kron(X, EPS)),
                (yy, zz, np.kron(EPS, X), np.kron(EPS, S)),
            ):
                size = np.hypot(p, q)
                generators = generators - np.arctan(size) / size * (p * one + q * other)
            found.append((expm(generators), channel * taps + first[k], channel * taps + second[k]))
    return found


def brute_law(layer, row, h):
    rho = kron(*(density(x, layer.inputs == "coherent") for x in h))
    return law_of(rho, observables_of(layer, row), gates_of(layer, row))


@pytest.mark.parametrize("inputs", ["coherent", "mixed"])
@pytest.mark.parametrize("deformation", DEFORMATIONS)
def test_law_is_that_of_density_matrices(deformation, inputs):
    layer = drawn(QuantumDeformedLinear(5, 2, deformation=deformation, inputs=inputs, norm=False, dtype=torch.float64))
    h = means(3, 5)
    law = agreement_law(*layer.synapses(h, slice(None))).detach()
    layer.output = "moments"
    found = layer(h)
    layer.output, layer.law = "activation", "exact"
    activation = layer(h).detach()
    a = 2 * np.arange(6) - 5
    for p, row in product(range(3), range(2)):
        want = brute_law(layer, row, h[p].numpy())
        np.testing.assert_allclose(law[p, row], want, atol=1e-12)
        mean = want @ a
        np.testing.assert_allclose(found.mean[p, row].item(), mean, atol=1e-12)
        np.testing.assert_allclose(found.variance[p, row].item(), want @ a**2 - mean**2, atol=1e-12)
        np.testing.assert_allclose(activation[p, row], 2 * want[a >= 0].sum() - 1, atol=1e-12)


@pytest.mark.parametrize(("channels", "kernel"), [(1, (3, 2)), (1, (2, 3)), (2, (1, 3)), (2, (3, 1)), (1, (1, 5))])
@pytest.mark.parametrize("inputs", ["coherent", "mixed"])
def test_law_of_neighbors_in_a_kernel(channels, kernel, inputs):
    layer = drawn(
        QuantumDeformedConv2d(
            channels,
            2,
            kernel,
            deformation="neighbors",
            inputs=inputs,
            norm=False,
            output="moments",
            dtype=torch.float64,
        )
    )
    h = means(1, channels, *kernel)
    found = layer(h)
    a = 2 * np.arange(layer.fan_in + 1) - layer.fan_in
    for row in range(2):
        want = brute_law(layer, row, h.flatten().numpy())
        np.testing.assert_allclose(found.mean[0, row].item(), want @ a, atol=1e-12)
        np.testing.assert_allclose(found.variance[0, row].item(), want @ a**2 - (want @ a) ** 2, atol=1e-12)


@pytest.mark.parametrize("inputs", ["coherent", "mixed"])
@pytest.mark.parametrize("gate", ["Haar", "local", "identity"])
def test_any_gate_on_a_pair_is_three_numbers(gate, inputs):
    """Six qubits: inputs, weights in pure states, a gate each. The layer's w, d, a come from the traced observable."""
    n, rng = 3, np.random.default_rng(1)
    h, theta = rng.uniform(-1, 1, n), rng.uniform(-1, 1, n)
    unitaries = []
    for _ in range(n):

        def haar(size):
            q, r = np.linalg.qr(rng.normal(size=(size, size)) + 1j * rng.normal(size=(size, size)))
            return q * (np.diag(r) / abs(np.diag(r)))

        unitaries.append({"Haar": haar(4), "local": np.kron(haar(2), haar(2)), "identity": np.eye(4)}[gate])
    # Qubits ordered (input 1, weight 1, input 2, ...).
    rho = kron(
        *(m for x, t in zip(h, theta, strict=True) for m in (density(x, inputs == "coherent"), density(t, True)))
    )
    unitary = kron(*unitaries)
    probabilities = np.diag(unitary @ rho @ unitary.conj().T).real
    law = np.zeros(n + 1)
    for state, p in zip(product((0, 1), repeat=2 * n), probabilities, strict=True):
        law[sum(state[2 * k] == state[2 * k + 1] for k in range(n))] += p

    layer = QuantumDeformedLinear(n, 1, deformation="pair", inputs=inputs, norm=False, dtype=torch.float64)
    for k, (q, t) in enumerate(zip(unitaries, theta, strict=True)):
        turned = q.conj().T @ np.kron(S, S) @ q
        traced = np.einsum("awbv,vw->ab", turned.reshape(2, 2, 2, 2), density(t, True)).real
        c0, c1, c2 = np.trace(traced) / 2, np.trace(traced @ X) / 2, np.trace(traced @ S) / 2
        radius, angle = np.hypot(c1, c2), np.arctan2(c1, c2)
        high, low = np.arctanh(c0 + radius), np.arctanh(c0 - radius)
        with torch.no_grad():
            layer.weight[0, k], layer.offset[0, k], layer.angle[0, k] = (high - low) / 2, (high + low) / 2, angle
    found = agreement_law(*layer.synapses(torch.as_tensor(h)[None], slice(None)))[0, 0]
    np.testing.assert_allclose(found.detach(), law, atol=1e-12)
    if gate == "identity":
        plain = ProbabilisticBinaryLinear(n, 1, norm=False, law="exact", dtype=torch.float64)
        with torch.no_grad():
            plain.weight.copy_(torch.as_tensor(np.arctanh(theta))[None])
        np.testing.assert_allclose(plain(torch.as_tensor(h)).item(), 2 * law[2:].sum() - 1, atol=1e-12)


@pytest.mark.parametrize("output", ["activation", "moments", "mean"])
@pytest.mark.parametrize("law", ["clt", "exact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_deformation_is_the_probabilistic_binary_layer_bit_for_bit(dtype, law, output):
    for plain, deformed, shape in (
        (ProbabilisticBinaryConv2d, QuantumDeformedConv2d, (4, 2, 5, 5)),
        (ProbabilisticBinaryLinear, QuantumDeformedLinear, (4, 5)),
    ):
        arguments = (2, 3, 2) if len(shape) == 4 else (5, 3)
        layers = []
        for build, options in ((plain, {}), (deformed, {"deformation": "none"})):
            torch.manual_seed(3)
            layers.append(build(*arguments, law=law, output=output, dtype=dtype, **options))
        h = means(*shape, dtype=dtype)
        assert layers[0].state_dict().keys() == layers[1].state_dict().keys()
        for training in (True, False):
            outputs = [layer.train(training)(h) for layer in layers]
            for a, b in zip(*outputs, strict=True) if output == "moments" else [outputs]:
                assert torch.equal(a, b)
        loss = [sum(t.sum() for t in layer(h)) if output == "moments" else layer(h).sum() for layer in layers]
        gradients = [torch.autograd.grad(x, layer.weight)[0] for x, layer in zip(loss, layers, strict=True)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("deformation", ["input", "traceless", "pair", "neighbors"])
def test_gates_of_zero_are_no_deformation(deformation):
    layer = drawn(
        QuantumDeformedConv2d(2, 3, 3, deformation=deformation, norm=False, output="moments", dtype=torch.float64)
    )
    plain = ProbabilisticBinaryConv2d(2, 3, 3, norm=False, output="moments", dtype=torch.float64)
    plain.load_state_dict({"weight": layer.weight})
    with torch.no_grad():
        for name in ("angle", "offset", "gate"):
            if getattr(layer, name) is not None:
                getattr(layer, name).zero_()
    h = means(2, 2, 6, 5)
    torch.testing.assert_close(layer(h), plain(h), atol=1e-13, rtol=0)


def test_a_gate_of_zero_makes_neighbors_pairs():
    neighbors = drawn(QuantumDeformedLinear(5, 3, deformation="neighbors", norm=False, dtype=torch.float64))
    pair = QuantumDeformedLinear(5, 3, deformation="pair", norm=False, dtype=torch.float64)
    with torch.no_grad():
        neighbors.gate.zero_()
    state = neighbors.state_dict()
    del state["gate"]
    pair.load_state_dict(state)
    torch.testing.assert_close(neighbors(means(4, 5)), pair(means(4, 5)), atol=1e-13, rtol=0)


CASES = {
    "plain": {"kernel_size": 3},
    "even kernel, stride": {"kernel_size": (2, 4), "stride": 2},
    "odd height": {"kernel_size": (3, 2), "stride": (1, 3), "padding": 1},
    "odd width, dilation": {"kernel_size": (4, 3), "dilation": (1, 2), "stride": (3, 2), "padding": (1, 2)},
    "dilation and stride share a factor": {"kernel_size": (3, 4), "dilation": (2, 1), "stride": (4, 2), "padding": 3},
    "one column": {"kernel_size": (5, 1), "stride": (2, 1)},
    "one tap": {"kernel_size": 1},
    "same": {"kernel_size": (2, 3), "padding": "same"},
    "groups, bias": {"kernel_size": 2, "in_channels": 4, "groups": 2, "bias": True},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": (1, 0), "padding_mode": "circular"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", ["coherent", "mixed"])
@pytest.mark.parametrize("deformation", DEFORMATIONS)
@pytest.mark.parametrize("case", CASES)
def test_convolution_is_the_neuron_on_every_patch(case, deformation, inputs, dtype):
    """Moments by convolutions of maps, against the exact law of each patch that torch cuts; sizes are nn.Conv2d's."""
    arguments = {"in_channels": 2, "out_channels": 4, **CASES[case]}
    layer = drawn(QuantumDeformedConv2d(**arguments, deformation=deformation, inputs=inputs, norm=False, dtype=dtype))
    reference = nn.Conv2d(**{"bias": False, **arguments}, dtype=dtype)
    h = means(2, arguments["in_channels"], 7, 8, dtype=dtype)
    layer.output = "moments"
    found = layer(h)
    assert found.mean.shape == found.variance.shape == reference(h).shape
    (top, bottom), (left, right) = layer.geometry.margins()
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    padded = nn.functional.pad(h, (left, right, top, bottom), mode=mode)
    means_, variances = [], []
    for g, part in enumerate(padded.chunk(layer.groups, 1)):
        patches = nn.functional.unfold(part, layer.kernel_size, layer.dilation, 0, layer.stride)
        rows = slice(g * 4 // layer.groups, (g + 1) * 4 // layer.groups)
        law = agreement_law(*layer.synapses(patches.mT.flatten(0, 1), rows))
        a = 2 * torch.arange(layer.fan_in + 1, dtype=dtype) - layer.fan_in
        mean = (law * a).sum(-1)
        means_.append(mean.unflatten(0, (2, -1)).mT)
        variances.append(((law * (a - mean[..., None]) ** 2).sum(-1)).unflatten(0, (2, -1)).mT)
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12}[dtype]
    shift = 0 if layer.bias is None else layer.bias[:, None]
    torch.testing.assert_close(found.mean.flatten(2), torch.cat(means_, 1) + shift, atol=tolerance, rtol=0)
    torch.testing.assert_close(found.variance.flatten(2), torch.cat(variances, 1), atol=tolerance, rtol=0)
    layer.law, layer.output = "exact", "mean"
    torch.testing.assert_close(layer(h), found.mean, atol=0, rtol=0)


@pytest.mark.parametrize("deformation", DEFORMATIONS)
@pytest.mark.parametrize("law", ["clt", "exact"])
def test_gradients(deformation, law):
    layer = drawn(QuantumDeformedConv2d(1, 2, (2, 3), deformation=deformation, law=law, dtype=torch.float64), scale=0.5)
    names = [name for name, _ in layer.named_parameters() if law == "clt" or not name.startswith("norm")]
    values = [dict(layer.named_parameters())[name].detach().clone().requires_grad_() for name in names]
    if law == "exact":
        layer.eval()

    def run(h, *parameters):
        return torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), h)

    h = (0.9 * means(2, 1, 3, 4)).requires_grad_()
    assert torch.autograd.gradcheck(run, (h, *values), atol=1e-7)


def test_gradients_are_finite_where_bits_are_certain():
    layer = drawn(QuantumDeformedLinear(4, 2, deformation="neighbors", norm=False))
    h = torch.tensor([[1.0, -1.0, 0.5, 1.0]], requires_grad=True)
    layer(h).sum().backward()
    assert torch.isfinite(h.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())


def test_coherence_matters_only_off_the_diagonal():
    h = means(3, 4)
    for deformation, same in (("none", True), ("traceless", False), ("pair", False), ("neighbors", False)):
        coherent = drawn(QuantumDeformedLinear(4, 2, deformation=deformation, norm=False, dtype=torch.float64))
        mixed = QuantumDeformedLinear(4, 2, deformation=deformation, norm=False, inputs="mixed", dtype=torch.float64)
        mixed.load_state_dict(coherent.state_dict())
        difference = (coherent(h) - mixed(h)).abs().max().item()
        assert difference == 0 if same else difference > 0.01
        with torch.no_grad():
            for layer in (coherent, mixed):
                if layer.angle is not None:
                    layer.angle.zero_()
                if layer.gate is not None:
                    layer.gate.zero_()
        torch.testing.assert_close(coherent(h), mixed(h), atol=1e-12, rtol=0)


@pytest.mark.parametrize("deformation", DEFORMATIONS)
def test_layer_conformance(deformation):
    layer = QuantumDeformedConv2d(2, 3, (2, 3), stride=(1, 2), deformation=deformation).eval()
    check_layer(layer, 2, stride=(1, 2))


def test_counts():
    for deformation, inputs, mean, both in (
        ("none", "coherent", 1, 2),
        ("input", "coherent", 2, 4),
        ("traceless", "coherent", 2, 4),
        ("pair", "coherent", 2, 6),
        ("pair", "mixed", 1, 3),
        ("traceless", "mixed", 1, 2),
    ):
        layer = QuantumDeformedConv2d(3, 4, 3, deformation=deformation, inputs=inputs)
        units = 4 * 6 * 6
        assert layer.counts((3, 8, 8))["mac:fp32*fp32"] == units * 27 * both
        layer.output = "mean"
        assert layer.counts((3, 8, 8))["mac:fp32*fp32"] == units * 27 * mean
    layer = QuantumDeformedConv2d(3, 4, 3, deformation="neighbors")
    # 4 pairs a channel: 2 + 4 numbers a synapse, 4 + 16 a pair.
    assert layer.counts((3, 8, 8))["mac:fp32*fp32"] == units * (27 * 6 + 12 * 20)
    # Of 3 * 8 * 8 pixels: a root (7), (1 - h)(1 + h) (2), h^2, h X, and 20 products across and down; then the norm's
    # and the activation's of 4 * 6 * 6 outputs, 2 and 30.
    assert layer.counts((3, 8, 8))["mul:fp32"] == 192 * (7 + 2 + 2 + 40) + units * 32
    model = nn.Sequential(layer, nn.Flatten(), QuantumDeformedLinear(144, 10, output="mean"))
    assert count(model, (3, 8, 8)).params == sum(p.numel() for p in model.parameters())


def test_tiling_takes_every_tap_once():
    for height, width in product(range(1, 6), repeat=2):
        first, second, rest = tiling(height, width)
        assert sorted([*first, *second, *rest]) == list(range(height * width))
        assert len(rest) == height * width % 2
        for i, j in zip(first, second, strict=True):
            assert (j - i == 1 and i // width == j // width) or j - i == width


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: QuantumDeformedConv2d(1, 2, 3, deformation="pairs"), "'pair'"),
        (lambda: QuantumDeformedLinear(3, 2, inputs="mixd"), "'mixed'"),
        (lambda: binarize(QuantumDeformedLinear(3, 2)), "deformation is 'pair'"),
        (lambda: QuantumDeformedLinear(3, 2).circuit(2), "output is 2: the layer has outputs 0 to 1"),
        (lambda: QuantumDeformedLinear(3, 2)(torch.ones(2, 4)), "3 input features but the input has shape (2, 4)"),
    ],
)
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)
