"""Jobs that fail, or that an executor refuses, leave what the others gave; and the memory that jobs are planned for."""

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pytest
import torch

from circuits import kernel
from qconv import load_backend, simulate
from qconv.backends import memory
from qconv.backends.jobs import JobFailed, run_in_jobs
from qconv.gradients import compile_differentiable

CIRCUIT = kernel("basic_entangler", 2, 1)
SHUT = "cannot schedule new futures after shutdown"


def doubled(rows, seed):
    return 2 * rows


def rng():
    return np.random.default_rng(0)


def test_an_executor_that_is_shut_down_is_a_failed_job():
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    with pytest.raises(JobFailed, match=f"patches 0 to 4 of 5 have no values.*{SHUT}"):
        run_in_jobs(doubled, np.ones((5, 1)), 1, rng(), 2, pool)


class Closing(ThreadPoolExecutor):
    """Runs the first call at once, never starts the second, and takes no third one."""

    def __init__(self):
        super().__init__(1)
        self.given = []

    def submit(self, call, /, *args, **options):
        if len(self.given) == 2:
            raise RuntimeError("queue closed")
        self.given.append(Future())
        if len(self.given) == 1:
            self.given[0].set_result(call())
        return self.given[-1]


def test_what_ran_before_an_executor_refused_is_kept_and_the_rest_cancelled():
    pool, rows = Closing(), np.arange(6.0)[:, None]
    with pytest.raises(JobFailed, match=r"patches 2 to 5 of 6 have no values.*queue closed.*2 of 6 circuits") as failed:
        run_in_jobs(doubled, rows, 1, rng(), 2, pool)
    np.testing.assert_array_equal(failed.value.values[:, 0, 0], [0, 2, *[np.nan] * 4])
    assert pool.given[1].cancelled()


def test_without_a_generator_seeds_follow_torchs():
    def seeds(rows, seed):
        return np.full((len(rows), 1), float(seed))

    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(run_in_jobs(seeds, np.zeros((3, 1)), 1, None, 1, None).ravel().tolist())
    assert found[0] == found[1] != found[2]
    assert len(set(found[0])) == 3


class Failing:
    """State vectors that stop at a call, having computed some rows."""

    name = "failing"

    def compile(self, circuit, *, shots=None, noise=None, seed=None):
        compiled, calls = load_backend("statevector").compile(circuit), []

        class Compiled:
            differentiable = False

            def __call__(self, inputs, weights):
                calls.append(len(inputs))
                values = compiled(inputs, weights)
                if len(calls) == 2:
                    missing = np.arange(len(inputs))[:, None] >= 8
                    raise JobFailed("queue closed", np.where(missing[..., None], np.nan, values.numpy()), missing)
                return values

        return Compiled()


def test_a_backward_pass_that_fails_names_patches_and_shifts():
    x, w = torch.rand(3, 2, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
    values = compile_differentiable(Failing(), CIRCUIT)(x, w.requires_grad_())
    # Two weights have two shifts each: 24 rows, of which 8 are one shift and the first patch of the next.
    says = r"patches 0 to 2 of 3 have no values at shifts 1 to 3 of 4 of this call.*queue closed.*8 of 24 circuits"
    with pytest.raises(JobFailed, match=says) as failed:
        values.sum().backward()
    kept = failed.value
    assert kept.values.shape == (4, 3, 2, 2)
    assert np.argwhere(~kept.missing)[-1].tolist() == [1, 0, 1]
    # The first weight turns by +pi/2 or -pi/2 there.
    moved = [w.detach() + torch.tensor([[sign * np.pi / 2, 0.0]], dtype=w.dtype) for sign in (1, -1)]
    right = [simulate(CIRCUIT, x, shifted, backend="statevector").numpy() for shifted in moved]
    assert min(np.abs(kept.values[0] - values).max() for values in right) < 1e-12


def test_a_containers_limit_is_its_memory(tmp_path, monkeypatch):
    whole = memory.machine_memory()
    limit, absent = tmp_path / "memory.max", tmp_path / "absent"
    monkeypatch.setattr(memory, "LIMITS", (absent, limit))
    for text, bytes_ in (("1048576\n", 2.0**20), ("max\n", None), ("9223372036854771712\n", None)):
        limit.write_text(text)
        found = memory.machine_memory()
        assert found == bytes_ if bytes_ else found >= whole > 2.0**20
