"""The suite of backends: right ones pass, faults are found, refusals are told, and the page says what it finds."""

import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from strategies import circuits
from test_noise import CIRCUITS, NOISE, dense

from circuits import kernel
from qconv import Unsupported, load_backend
from qconv.dense import dense_values, differences
from qconv.testing import CHECKS, Conformance, Finding, backend_conformance

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are run from the root, and are not installed

from benchmarks import backends  # noqa: E402
from benchmarks.backends import LISTED, PAGE, conformance, notes, present, row  # noqa: E402


def numbers(circuit, patches=2, filters=2):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, (patches, circuit.n_inputs)), rng.normal(size=(filters, circuit.n_weights))


# --- what the suite compares with -------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(circuit=circuits())
def test_dense_values_are_the_oracles(circuit):
    x, w = numbers(circuit)
    want = [[oracle.run(circuit, p, f)[0] for f in w] for p in x]
    np.testing.assert_allclose(dense_values(circuit, x, w), want, atol=1e-12)


@pytest.mark.parametrize("case", CIRCUITS)
def test_dense_noise_is_the_oracles(case):
    x, w = (torch.from_numpy(part) for part in numbers(CIRCUITS[case], 1, 2))
    want = dense(CIRCUITS[case], x, w, NOISE)
    np.testing.assert_allclose(dense_values(CIRCUITS[case], x.numpy(), w.numpy(), NOISE), want, atol=1e-12)


def test_differences_are_slopes():
    at = np.array([[0.3, -1.2], [2.0, 0.1]])
    slopes = differences(lambda x: np.array([np.sin(2 * np.pi * x).sum(), x[0, 0] * x[1, 1]]), at)
    assert slopes.shape == (2, 2, 2)
    np.testing.assert_allclose(slopes[..., 0], 2 * np.pi * np.cos(2 * np.pi * at), atol=1e-9)
    np.testing.assert_allclose(slopes[..., 1], [[0.1, 0], [0, 0.3]], atol=1e-12)


# --- every backend and device -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LISTED)
def test_every_backend_conforms_and_the_page_says_what_it_does(name):
    page = PAGE.read_text()
    if not present(name):
        assert f"\n| {name} | " in page
        pytest.skip(f"{LISTED[name].needs} is not installed")
    found = conformance(name)
    found.raise_for_faults()
    assert row(name, found) in page
    assert notes(name, found) in page


def test_a_sampler_that_repeats_its_shots_is_found():
    primitives = pytest.importorskip("qiskit.primitives")

    def check(seed):
        sampler = primitives.StatevectorSampler(seed=seed)
        return backend_conformance(sampler, seed=None, checks=["joint shots"]).status("joint shots")

    assert check(np.random.default_rng(0)) == "passed"
    # With a number it draws the same in every circuit, so it is refused, or found.
    with suppress(ValueError):
        assert check(0) == "failed"


def test_costs_stay_on_the_page_until_they_are_measured_anew(monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    passed = tuple(Finding(check, "all", 0.0, 1.0) for check in CHECKS)
    monkeypatch.setattr(backends, "conformance", lambda name: Conformance(name, passed))
    monkeypatch.setattr(backends, "costs", lambda rounds: f"{backends.COSTS}\n\n{rounds} rounds\n")
    for typed, said in (([], "Not measured yet"), (["--timings", "--rounds", "3"], "3 rounds"), ([], "3 rounds")):
        monkeypatch.setattr(sys, "argv", ["backends", "--out", str(page), *typed])
        backends.main()
        text = page.read_text()
        assert text.count(backends.COSTS) == 1
        assert said in text.partition(backends.COSTS)[2]
    assert backends.COSTS in PAGE.read_text()


def test_the_page_has_all_backends_and_readers_are_led_to_it():
    rows = [line.split("|")[1].strip() for line in PAGE.read_text().split("##")[0].splitlines() if line.startswith("|")]
    assert rows[2:] == list(LISTED)
    assert "docs/backends.md" in (ROOT / "README.md").read_text()


# --- faults -----------------------------------------------------------------------------------------------------------


@dataclass
class Faulty:
    """State vectors, spoiled: `values` spoils what is computed, `options` how it is compiled."""

    values: Any = None
    options: Any = None
    name: str = "faulty"

    def compile(self, circuit, *, shots=None, noise=None, seed=None):
        given = {"shots": shots, "noise": noise, "seed": seed}
        compiled = load_backend("statevector").compile(circuit, **(self.options or dict)(given))
        spoil, calls = self.values, [0]

        class Spoiled:
            differentiable = True
            counts = compiled.counts

            def __call__(self, x, w):
                calls[0] += 1
                return compiled(x, w) if spoil is None else spoil(compiled, x, w, shots)

        return Spoiled()


def normals(compiled, x, w, shots):
    """Exact values with normal noise of the right size."""
    if shots is None:
        return compiled(x, w)
    exact = load_backend("statevector").compile(compiled.circuit)(x, w)
    return exact + torch.randn(exact.shape, dtype=exact.dtype) * ((1 - exact**2) / shots).sqrt()


def rounded(compiled, x, w, shots):
    """Exact values to the nearest mean: right to within a shot, and never scattered."""
    if shots is None:
        return compiled(x, w)
    exact = load_backend("statevector").compile(compiled.circuit)(x, w)
    return ((exact + 1) / 2 * shots).round() * 2 / shots - 1


def mixed(compiled, x, w, shots):
    """Chunks of five patches, the second one in reverse."""
    values = compiled(x, w)
    return torch.cat([values[:5], values[5:].flip(0)])


def half_precise(compiled, x, w, shots):
    return compiled(x.float(), w.float()).to(x.dtype)


def apart(compiled, x, w, shots):
    """Each observable from shots of its own."""
    circuit = compiled.circuit
    parts = [
        load_backend("statevector").compile(circuit.with_observables((o,)), shots=shots) for o in circuit.observables
    ]
    return torch.cat([part(x, w) for part in parts], dim=-1)


def repeated(compiled, x, w, shots):
    """Patches of a call in jobs of two, each of which draws from one seed."""
    if shots is None:
        return compiled(x, w)
    parts = [load_backend("statevector").compile(compiled.circuit, shots=shots, seed=5)(two, w) for two in x.split(2)]
    return torch.cat(parts) if parts else compiled(x, w)


FAULTS = {
    "observables measured apart": (Faulty(apart), "joint shots", "are measured apart"),
    "every job the same shots": (Faulty(repeated), "joint shots", "repeat the shots of others"),
    "observables in reverse": (Faulty(lambda f, x, w, s: f(x, w).flip(-1)), "values", "off by"),
    "filters in reverse": (Faulty(lambda f, x, w, s: f(x, w).flip(1)), "values", "off by"),
    "single precision": (Faulty(half_precise), "values", "off by"),
    "double where single was asked": (
        Faulty(lambda f, x, w, s: f(x.double(), w.double())),
        "values",
        "is torch.float64",
    ),
    "one filter": (Faulty(lambda f, x, w, s: f(x, w)[:, :1]), "values", "has shape"),
    "NaN": (Faulty(lambda f, x, w, s: f(x, w) * torch.nan), "values", "off by nan"),
    "no input gradient": (Faulty(lambda f, x, w, s: f(x.detach(), w) + 0 * x.sum()), "input gradient", "off by"),
    "no weight gradient": (Faulty(lambda f, x, w, s: f(x, w.detach()) + 0 * w.sum()), "weight gradient", "off by"),
    "chunks in reverse": (Faulty(mixed), "batches", "off by"),
    "normal noise": (Faulty(normals), "shots", "no means of 400 signs"),
    "no noise of shots": (Faulty(rounded), "shots", "times the binomial law"),
    "a quarter of the shots": (
        Faulty(options=lambda o: o | {"shots": o["shots"] and o["shots"] // 4}),
        "shots",
        "times the binomial law",
    ),
    "biased shots": (Faulty(lambda f, x, w, s: -f(x, w) if s else f(x, w)), "shots", "law"),
    "seed forgotten": (Faulty(options=lambda o: o | {"seed": None}), "seeds", "does not repeat"),
    "one seed for all": (Faulty(options=lambda o: o | {"seed": 1}), "seeds", "seeds 3 and 4"),
    "the same shots each call": (
        Faulty(lambda f, x, w, s: load_backend("statevector").compile(f.circuit, shots=s, seed=1)(x, w)),
        "seeds",
        "two calls",
    ),
    "gradients of the wrong sign": (
        Faulty(lambda f, x, w, s: 2 * f(x, w).detach() - f(x, w) if s else f(x, w)),
        "gradients under shots",
        "off by",
    ),
    "noise forgotten": (Faulty(options=lambda o: o | {"noise": None}), "noise", "off by"),
    "noise forgotten under shots": (Faulty(options=lambda o: o | {"noise": None}), "noise under shots", "law"),
    "a layer without input gradient": (
        Faulty(lambda f, x, w, s: f(x.detach(), w) + 0 * x.sum()),
        "stacking",
        "gradient of",
    ),
    "shots=0 for exact": (Faulty(options=lambda o: o | {"shots": o["shots"] or None}), "bad input", "shots=0 is taken"),
    "any error": (Faulty(lambda f, x, w, s: 1 / 0), "values", "ZeroDivisionError: division by zero"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault):
    backend, check, says = FAULTS[fault]
    found = backend_conformance(backend, checks=[check])
    assert found.status(check) == "failed"
    with pytest.raises(AssertionError, match="backend faulty fails") as error:
        found.raise_for_faults()
    assert check in str(error.value)
    assert says in str(error.value)


def test_an_unspoiled_backend_has_no_fault():
    backend_conformance(Faulty()).raise_for_faults()


class Nothing:
    """Refuses what it is asked, in words."""

    name = "nothing"

    def compile(self, circuit, *, shots=None, noise=None, seed=None):
        raise Unsupported("runs nothing: use another")


def test_what_is_refused_is_told_and_is_no_fault():
    found = backend_conformance(Nothing(), checks=[check for check in CHECKS if check != "bad input"])
    found.raise_for_faults()
    assert {found.status(finding.check) for finding in found.findings} == {"refused"}
    assert list(found.refusals()) == ["runs nothing: use another"]
    assert "noise" in found.refusals()["runs nothing: use another"]


def test_a_check_is_left_out_with_a_reason_only():
    found = backend_conformance("statevector", checks=["seeds", "noise"], without={"seeds": "it has its own"})
    assert (found.status("seeds"), found.status("noise")) == ("refused", "passed")
    assert found.refusals() == {"it has its own": ["seeds"]}
    for options in ({"without": {"seed": "?"}}, {"checks": ["seed"]}):
        with pytest.raises(ValueError, match="unknown check 'seed': did you mean 'seeds'"):
            backend_conformance("statevector", **options)
    with pytest.raises(ValueError, match="unknown check 'shots'"):
        Conformance("x", ()).status("shots")


def test_statuses():
    passed, refused = Finding("values", "a", 0.0, 1.0), Finding("values", "b", refusal="no")
    failed = Finding("values", "c", 2.0, 1.0, fault="off by 2")
    assert [finding.status for finding in (passed, refused, failed)] == ["passed", "refused", "failed"]
    assert Conformance("x", (passed,)).status("values") == "passed"
    assert Conformance("x", (refused,)).status("values") == "refused"
    assert Conformance("x", (passed, refused)).status("values") == "partly"
    assert Conformance("x", (passed, refused, failed)).status("values") == "failed"
    assert Conformance("x", (passed, refused)).refusals() == {"no": ["values (b)"]}


def test_a_device_with_noise_is_compared_with_its_simulation():
    noisy = load_backend("statevector")

    class Device(Faulty):
        def compile(self, circuit, *, shots=None, noise=None, seed=None):
            return noisy.compile(circuit, shots=shots, noise=NOISE_OF_ITS_OWN, seed=seed)

    assert backend_conformance(Device(), checks=["shots"]).status("shots") == "failed"
    found = backend_conformance(Device(), reference=Device(), checks=["values", "shots", "gradients under shots"])
    found.raise_for_faults()
    assert found.status("shots") == "passed"


def test_a_device_without_a_reference_is_not_blamed_for_its_noise():
    device = pytest.importorskip("qiskit.providers.fake_provider").GenericBackendV2(4, seed=0)
    found = backend_conformance(device, seed=0, checks=["batches"])
    found.raise_for_faults()
    assert found.status("batches") == "refused"
    assert "give reference=" in next(iter(found.refusals()))


NOISE_OF_ITS_OWN = type(NOISE)((("*", NOISE.after[1][1]),))


def test_cases_reach_every_kind_of_circuit():
    found = backend_conformance("fourier", checks=["values"])
    assert found.status("values") == "partly"
    assert list(found.refusals().values()) == [["values (re-uploading)"]]
    assert kernel("strongly_entangling", 3, 1).n_wires == 3
