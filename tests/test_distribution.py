"""Chunks of patches on executors, and training over processes, give what one process gives."""

import copy
import importlib
import pickle
import sys
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from circuits import Channel, NoiseModel, ReadoutError, kernel
from qconv import QuantumConv2d, Unsupported, load_backend, simulate
from qconv.backends.jobs import GradientFailed, JobFailed
from qconv.backends.matrix_products import Truncation, truncation_of
from qconv.distribution import distribute
from qconv.mitigation import ReadoutInversion, ZeroNoise
from qconv.testing import backend_conformance, check_layer

CIRCUIT = kernel("strongly_entangling", 3, 1, readout=["ZII", "XIY"])
AMPLITUDE = kernel("basic_entangler", 2, 1, encoding="amplitude", features=3)
NOISE = NoiseModel((("CNOT", Channel("depolarizing", 0.1)),))


def draw(circuit, patches=7, filters=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(patches, circuit.n_inputs, generator=generator, dtype=torch.float64)
    w = torch.randn(filters, circuit.n_weights, generator=generator, dtype=torch.float64)
    return x.to(dtype), w.to(dtype)


def everything(backend, circuit, x, w, **options):
    """Values and gradients of a sum of unequal parts."""
    x, w = x.clone().requires_grad_(), w.clone().requires_grad_()
    values = simulate(circuit, x, w, backend=backend, **options)
    factors = torch.linspace(0.5, 1.5, values.numel(), dtype=values.dtype).reshape(values.shape)
    (values * factors).sum().backward()
    return values.detach(), x.grad, w.grad


@pytest.fixture(scope="module")
def threads():
    with ThreadPoolExecutor(2) as executor:
        yield executor


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["statevector", "fourier", "pennylane"])
@pytest.mark.parametrize("circuit", [CIRCUIT, AMPLITUDE], ids=["angles", "amplitudes"])
def test_chunks_have_the_values_and_gradients_of_the_whole(threads, circuit, name, dtype):
    x, w = draw(circuit, dtype=dtype)
    whole = everything(name, circuit, x, w)
    for patches in (1, 3, 100):
        parts = everything(distribute(name, threads, patches), circuit, x, w)
        for part, right in zip(parts, whole, strict=True):
            assert part.dtype == dtype
            torch.testing.assert_close(part, right, atol=1e-12 if dtype == torch.float64 else 3e-6, rtol=0)


def test_other_processes_compute_the_same():
    x, w = draw(CIRCUIT)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        backend = distribute("statevector", pool, 3)
        for options in ({}, {"noise": NOISE}, {"shots": 50, "seed": 3}):
            sent = everything(backend, CIRCUIT, x, w, **options)
            with ThreadPoolExecutor(1) as here:
                stayed = everything(distribute("statevector", here, 3), CIRCUIT, x, w, **options)
            for a, b in zip(sent, stayed, strict=True):
                assert torch.equal(a, b)


def test_dask_is_an_executor():
    dask = pytest.importorskip("distributed")
    x, w = draw(CIRCUIT)
    with dask.Client(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as client:
        executor = client.get_executor()
        whole = everything("statevector", CIRCUIT, x, w)
        for part, right in zip(everything(distribute("statevector", executor, 3), CIRCUIT, x, w), whole, strict=True):
            torch.testing.assert_close(part, right, atol=1e-12, rtol=0)
        jobs = load_backend("qiskit", executor=executor, circuits_a_job=4)
        alone = load_backend("qiskit", circuits_a_job=4)
        options = {"shots": 100, "seed": 1}
        assert torch.equal(
            simulate(CIRCUIT, x, w, backend=jobs, **options), simulate(CIRCUIT, x, w, backend=alone, **options)
        )


def test_a_distributed_backend_conforms(threads):
    backend_conformance(distribute("statevector", threads, 3)).raise_for_faults()


def test_a_distributed_layer_is_a_layer(threads):
    torch.manual_seed(0)
    layer = QuantumConv2d(2, 3, (1, 2), backend=distribute("fourier", threads, 10))
    check_layer(layer, 2)
    plain = QuantumConv2d(2, 3, (1, 2))
    plain.load_state_dict(layer.state_dict())
    images = torch.rand(2, 2, 3, 4)
    torch.testing.assert_close(layer(images), plain(images), atol=1e-6, rtol=0)
    assert layer.counts((2, 3, 4))["device:circuits"] == plain.counts((2, 3, 4))["device:circuits"]
    assert layer.backend == "fourier (distributed)"


def test_shots_do_not_depend_on_the_executor_and_chunks_draw_their_own(threads):
    x, w = draw(CIRCUIT, 1, 1)
    x = x.expand(20, -1)
    compiled = [distribute("statevector", threads, 2).compile(CIRCUIT, shots=30, seed=seed) for seed in (1, 1, 2)]
    first, again, other = ([one(x, w) for _ in range(2)] for one in compiled)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert len(first[0].unique(dim=0)) > 8


def test_only_gradients_that_are_wanted_are_made(threads):
    x, w = draw(CIRCUIT)
    backend = distribute("statevector", threads, 3)
    for wanted in ((True, False), (False, True)):
        a, b = x.clone().requires_grad_(wanted[0]), w.clone().requires_grad_(wanted[1])
        simulate(CIRCUIT, a, b, backend=backend).sum().backward()
        assert (a.grad is not None, b.grad is not None) == wanted
    assert not simulate(CIRCUIT, x, w, backend=backend).requires_grad


def test_no_patches(threads):
    x, w = draw(CIRCUIT, 0)
    values, gx, gw = everything(distribute("statevector", threads), CIRCUIT, x, w)
    assert values.shape == (0, 2, 2)
    assert gx.shape == x.shape
    assert torch.equal(gw, torch.zeros_like(w))


class Falling(ThreadPoolExecutor):
    """Loses some of the calls that it is given, by their numbers."""

    calls, loses = 0, (2,)

    def submit(self, *call, **options):
        self.calls += 1
        if self.calls not in self.loses:
            return super().submit(*call, **options)
        lost = Future()
        lost.set_exception(RuntimeError("worker died"))
        return lost


def test_values_of_chunks_that_finished_are_kept():
    x, w = draw(CIRCUIT)
    with Falling(1) as executor:
        backend = distribute("statevector", executor, 3)
        with pytest.raises(JobFailed, match=r"patches 3 to \d of 7 have no values.*worker died") as failed:
            backend.compile(CIRCUIT)(x, w)
    right = simulate(CIRCUIT, x, w, backend="statevector").numpy()
    kept = failed.value
    assert kept.values.shape == right.shape
    assert kept.missing.shape == (7, 2)
    assert not kept.missing[:3].any()
    assert kept.missing[3:6].all()
    assert abs(kept.values - right)[~kept.missing].max() < 1e-12


class Refusing:
    """State vectors, but none of the second filter for patches whose first feature is 0."""

    name = "refusing"

    def compile(self, circuit, *, shots=None, noise=None, seed=None):
        compiled = load_backend("statevector").compile(circuit)

        class Compiled:
            differentiable = True

            def __call__(self, inputs, weights):
                values = compiled(inputs, weights).numpy()
                missing = (inputs[:, :1] == 0).numpy() & np.array([False, True])
                if missing.any():
                    raise JobFailed("queue closed", np.where(missing[..., None], np.nan, values), missing)
                return torch.from_numpy(values)

        return Compiled()


@pytest.mark.parametrize("wrap", [lambda backend: backend, ReadoutInversion], ids=["plain", "inverted"])
def test_values_of_a_chunk_that_failed_in_part_are_kept(wrap):
    x, w = draw(CIRCUIT)
    x[4, 0] = 0
    noise = NoiseModel(readout=ReadoutError(0.1, 0.1)) if wrap is ReadoutInversion else None
    with ThreadPoolExecutor(1) as executor:
        backend = distribute(wrap(Refusing()), executor, 3)
        with pytest.raises(JobFailed, match=r"patches .* have no values.*queue closed") as failed:
            backend.compile(CIRCUIT, noise=noise)(x, w)
    kept = failed.value
    if wrap is ReadoutInversion:  # what its backend measured is not its value
        assert kept.missing[3:6].all()
        return
    assert np.argwhere(kept.missing[:6]).tolist() == [[4, 1]]
    # Numbers that are no numbers are not missing; chunks of chunks keep the same.
    w[1] = torch.nan
    with ThreadPoolExecutor(1) as executor, ThreadPoolExecutor(1) as outer:
        for backend in (distribute(Refusing(), executor, 3), distribute(distribute(Refusing(), executor, 2), outer, 4)):
            with pytest.raises(JobFailed) as failed:
                backend.compile(CIRCUIT)(x, w)
            assert np.argwhere(failed.value.missing[:6]).tolist() == [[4, 1]]
    w = draw(CIRCUIT)[1]
    right = simulate(CIRCUIT, x, w, backend="statevector").numpy()
    assert abs(kept.values - right)[~kept.missing].max() < 1e-12


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_gradients_of_chunks_that_finished_are_kept(wanted):
    x, w = draw(CIRCUIT)

    def loss(rows, **options):
        given = [t.clone().requires_grad_(want) for t, want in zip((rows, w), wanted, strict=True)]
        return given, simulate(CIRCUIT, *given, **options).square().sum()

    with Falling(1) as executor:
        executor.loses = 5, 6  # of the three of the backward pass
        _, value = loss(x, backend=distribute("statevector", executor, 3))
        with pytest.raises(GradientFailed, match=r"patches 3 to 6 of 7 have no gradients.*worker died") as failed:
            value.backward()
    kept = failed.value
    (rows, weights), value = loss(x[:3], backend="statevector")
    value.backward()
    assert kept.missing[:, 0].tolist() == [False] * 3 + [True] * 4
    assert kept.values.shape == (7, 1, CIRCUIT.n_inputs if wanted[0] else 0)
    if wanted[0]:
        assert abs(kept.values[:3, 0] - rows.grad.numpy()).max() < 1e-12
        assert np.isnan(kept.values[3:]).all()
    if wanted[1]:
        assert abs(kept.weights - weights.grad.numpy()).max() < 1e-12
    assert (kept.weights is not None) == wanted[1]
    assert str(pickle.loads(pickle.dumps(kept))) == str(kept)
    assert np.array_equal(pickle.loads(pickle.dumps(kept)).values, kept.values, equal_nan=True)


@pytest.mark.parametrize("way", ["processes", "threads", "zero noise", "inverted"])
def test_truncation_errors_come_through(threads, way):
    truncating = load_backend("tensor_network", max_bond=1)
    x, w = draw(CIRCUIT)
    right = truncating.compile(CIRCUIT)
    right(x, w)
    assert right.truncation_error.value_error > 0.1
    if way in ("processes", "threads"):
        other = ProcessPoolExecutor(1, mp_context=get_context("spawn")) if way == "processes" else nullcontext(threads)
        with other as pool:
            compiled = distribute(truncating, pool, 3).compile(CIRCUIT)
            assert compiled.truncation_error is None
            values = compiled(x, w.requires_grad_())
            assert compiled.truncation_error == right.truncation_error
            # Shifted circuits are evaluations too.
            compiled.truncation_error = None
            values.sum().backward()
            assert compiled.truncation_error.angle > 0
            assert distribute("statevector", pool, 3).compile(CIRCUIT).truncation_error is None
    elif way == "inverted":
        compiled = ReadoutInversion(truncating, ReadoutError(0.1, 0.1)).compile(CIRCUIT)
        compiled(x, w)
        assert truncation_of(compiled) == right.truncation_error
    else:
        # Folded circuits are cut more often.
        compiled = ZeroNoise(truncating, (1, 3)).compile(CIRCUIT)
        compiled(x, w)
        assert truncation_of(compiled).angle > right.truncation_error.angle
        layer = QuantumConv2d(1, 2, (1, 3), kernel=CIRCUIT, backend=ZeroNoise(truncating, (1, 3)))
        layer(torch.rand(1, 1, 3, 3))
        assert layer.truncation_error.max_bond == 1


def test_backends_that_cut_nothing_have_no_truncation_error(threads):
    compiled = distribute("statevector", threads, 3).compile(CIRCUIT)
    compiled(*draw(CIRCUIT))
    assert compiled.truncation_error is None
    exact = distribute("tensor_network", threads, 3).compile(CIRCUIT)
    exact(*draw(CIRCUIT))
    assert exact.truncation_error == Truncation()


def test_draws_without_a_seed_follow_torchs(threads):
    x, w = draw(CIRCUIT)
    found = []
    for seed in (1, 1, 2):
        compiled = distribute("statevector", threads, 3).compile(CIRCUIT, shots=30)
        torch.manual_seed(seed)
        found.append(compiled(x, w))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    # Exact values draw nothing.
    torch.manual_seed(0)
    state = torch.get_rng_state()
    distribute("statevector", threads, 3).compile(CIRCUIT)(x, w)
    assert torch.equal(state, torch.get_rng_state())


def test_copies_share_the_executor_and_files_do_without(threads):
    backend = distribute("statevector", threads, 3)
    assert copy.deepcopy(backend) is backend
    layer = QuantumConv2d(1, 2, (1, 2), backend=backend)
    stored = pickle.loads(pickle.dumps(layer))
    assert stored._backend.executor is None
    images = torch.rand(2, 1, 3, 4, requires_grad=True)
    values = stored(images)
    torch.testing.assert_close(values, layer(images), atol=1e-12, rtol=0)
    values.sum().backward()
    assert images.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("attempt", "says"),
    [
        (lambda pool: distribute("statevector", None), "executor is a NoneType: give a concurrent.futures Executor"),
        (lambda pool: distribute("statevector", pool, 0), "patches is 0: give a whole number of at least 1"),
        (lambda pool: distribute("statevectr", pool), "did you mean 'statevector'"),
        (lambda pool: distribute("statevector", pool).compile(CIRCUIT, shots=0), "shots is 0"),
        (
            lambda pool: torch.func.grad(
                lambda x: simulate(CIRCUIT, x, draw(CIRCUIT)[1], backend=distribute("statevector", pool)).sum()
            )(draw(CIRCUIT)[0]),
            "do not run inside torch.func transforms",
        ),
    ],
)
def test_errors_say_what_works(threads, attempt, says):
    with pytest.raises(ValueError, match=says):
        attempt(threads)


def test_a_refusal_comes_before_any_chunk(threads):
    twice = CIRCUIT + CIRCUIT.shift_weights(CIRCUIT.n_weights)
    with pytest.raises(Unsupported, match="product encoding"):
        distribute("fourier", threads).compile(twice)


@pytest.mark.skipif(
    not (distributed.is_available() and distributed.is_gloo_available()), reason="this torch was built without gloo"
)
def test_two_processes_have_the_gradients_of_one(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
    example = importlib.import_module("08_two_processes")
    try:
        found = example.run(6, torch.float64)
        alone = example.gradients(example.build(torch.float64), *example.batch(6, torch.float64))
    finally:
        del sys.modules["08_two_processes"]
    assert len(found) == 2
    for process in found:
        for shared, own in zip(process["gradients"], alone, strict=True):
            assert own.abs().max() > 1e-3
            torch.testing.assert_close(shared, own, atol=1e-6, rtol=0)
        assert process["losses"][-1] < process["losses"][0]
