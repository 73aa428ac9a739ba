from math import log, sqrt

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qconv.tensors.trains import (
    add,
    canonical,
    contract,
    entanglement_entropy,
    from_dense,
    inner,
    norm,
    ranks,
    schmidt_values,
    to_dense,
    truncate,
)

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12, torch.complex64: 1e-5, torch.complex128: 1e-12}


def train(sizes, bonds, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    edges = [1, *bonds, 1]
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [
        torch.randn(edges[k], size, edges[k + 1], generator=generator, dtype=wide).to(dtype)
        for k, size in enumerate(sizes)
    ]


def dense(cores):
    """Entry by entry, a product of matrices each."""
    arrays = [core.numpy() for core in cores]
    result = np.zeros([a.shape[1] for a in arrays], dtype=arrays[0].dtype)
    for index in np.ndindex(*result.shape):
        product = np.eye(1)
        for array, i in zip(arrays, index, strict=True):
            product = product @ array[:, i, :]
        result[index] = product[0, 0]
    return result


@st.composite
def trains(draw):
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    bonds = [draw(st.integers(1, 5)) for _ in sizes[1:]]
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    return train(sizes, bonds, dtype, draw(st.integers(0, 99)))


def close(got, want, dtype, scale=1.0):
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[dtype] * max(1.0, float(scale)))


@given(trains())
def test_dense_and_back(cores):
    want, dtype = dense(cores), cores[0].dtype
    size = np.linalg.norm(want)
    close(to_dense(cores), want, dtype, size)
    again = from_dense(torch.from_numpy(want))
    close(dense(again), want, dtype, size)
    for k in range(len(again) - 1):
        isometry = again[k].flatten(0, 1)
        close(isometry.mH @ isometry, np.eye(isometry.shape[1]), dtype)
        # The rank of a cut is the rank of the matrix there.
        if dtype in (torch.float64, torch.complex128):
            matrix = want.reshape(int(np.prod(want.shape[: k + 1])), -1)
            clean = from_dense(torch.from_numpy(want), 1e-11 * size)
            assert ranks(clean)[k] == max(1, np.linalg.matrix_rank(matrix, tol=1e-10 * size))


@given(trains(), st.integers(0, 4))
def test_canonical_forms(cores, center):
    center = min(center, len(cores) - 1)
    want, dtype = dense(cores), cores[0].dtype
    found = canonical(cores, center)
    close(dense(found), want, dtype, np.linalg.norm(want))
    for k, core in enumerate(found):
        matrix = core.flatten(0, 1) if k < center else core.flatten(1).mH
        if k != center:
            close(matrix.mH @ matrix, np.eye(matrix.shape[1]), dtype)
    assert float(torch.linalg.vector_norm(found[center])) == pytest.approx(np.linalg.norm(want), rel=1e-4)


@given(trains(), st.integers(1, 4))
def test_schmidt_values_and_entropy(cores, cut):
    if len(cores) == 1:
        return
    cut = min(cut, len(cores) - 1)
    want, dtype = dense(cores), cores[0].dtype
    values = np.linalg.svd(want.reshape(int(np.prod(want.shape[:cut])), -1), compute_uv=False)
    got = schmidt_values(cores, cut).numpy()
    kept = min(len(got), len(values))
    size = np.linalg.norm(want)
    close(got[:kept], values[:kept], dtype, size)
    assert (np.abs(np.concatenate([got[kept:], values[kept:]])) <= TOLERANCE[dtype] * max(1, size)).all()
    p = values**2 / (values**2).sum()
    entropy = -sum(x * np.log(x) for x in p if x > 1e-30)
    assert float(entanglement_entropy(cores, cut)) == pytest.approx(entropy, abs=50 * TOLERANCE[dtype])


def test_entropy_of_known_states():
    one = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    pairs = from_dense(torch.einsum("ij,kl->ijkl", one, one))
    assert [round(float(entanglement_entropy(pairs, cut)), 12) for cut in (1, 2, 3)] == [
        round(log(2), 12),
        0.0,
        round(log(2), 12),
    ]
    assert ranks(pairs) == (2, 1, 2)


@given(trains(), st.integers(0, 99))
def test_inner_products_and_norms(cores, seed):
    sizes, dtype = [core.shape[1] for core in cores], cores[0].dtype
    other = train(sizes, [2] * (len(sizes) - 1), dtype, seed)
    a, b = dense(cores), dense(other)
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    close(inner(cores, other), np.vdot(a, b), dtype, scale)
    close(norm(cores), np.linalg.norm(a), dtype, np.linalg.norm(a))
    close(to_dense(add([cores, other, cores])), 2 * a + b, dtype, np.linalg.norm(a) + np.linalg.norm(b))


@given(trains(), st.integers(1, 4))
def test_truncation_states_its_error(cores, bond):
    want, dtype = dense(cores), cores[0].dtype
    short, error = truncate(cores, bond)
    assert all(rank <= bond for rank in ranks(short))
    size = np.linalg.norm(want)
    assert error == pytest.approx(
        np.linalg.norm(dense(short) - want), rel=1e-4, abs=TOLERANCE[dtype] * max(1, float(size))
    )


@given(trains(), st.sampled_from([0.0, 1e-6, 0.1, 1.0, 10.0]))
def test_truncation_stays_within_the_tolerance(cores, tolerance):
    want, dtype = dense(cores), cores[0].dtype
    slack = TOLERANCE[dtype] * max(1, np.linalg.norm(want))
    for short in (truncate(cores, tolerance=tolerance)[0], from_dense(torch.from_numpy(want), tolerance)):
        assert np.linalg.norm(dense(short) - want) <= tolerance * (1 + 1e-9) + slack


@pytest.mark.parametrize("exponent", [1, 3, 5, 7, 9, 11])
def test_small_errors_are_exact_too(exponent):
    # Errors far below the root of the precision, where differences of inner products say nothing.
    big, small = train([3] * 6, [2] * 5, seed=1), train([3] * 6, [3] * 5, seed=2)
    small[0] = small[0] * 10.0**-exponent
    cores = add([big, small])
    short, error = truncate(cores, 2)
    want = np.linalg.norm(dense(short) - dense(cores))
    assert error == pytest.approx(want, rel=1e-9 * 10**exponent / 10 if exponent > 5 else 1e-9)
    assert 0 < error < 10 * float(norm(small))


def test_one_cut_is_the_best_possible_and_the_budget_is_spent():
    cores = train([8, 8], [8])
    values = np.linalg.svd(dense(cores), compute_uv=False)
    short, error = truncate(cores, 3)
    assert error == pytest.approx(np.sqrt((values[3:] ** 2).sum()), rel=1e-12)
    short, error = truncate(cores, tolerance=error * (1 + 1e-9))
    assert ranks(short) == (3,)
    # What the first cuts leave, the last one may spend.
    values = np.diag([1.0, 0.2, 0.1])
    cores = [torch.ones(1, 1, 1).double(), *from_dense(torch.from_numpy(values))]
    assert ranks(truncate(cores, tolerance=0.1001)[0]) == (1, 2)
    assert ranks(truncate(cores, tolerance=0.0999)[0]) == (1, 3)
    assert ranks(truncate(cores, tolerance=sqrt(0.0501))[0]) == (1, 1)


@given(trains(), st.integers(0, 5))
def test_contraction_with_vectors(cores, opened):
    opened = min(opened, len(cores) - 1)
    generator = torch.Generator().manual_seed(3)
    dtype = cores[0].dtype
    vectors = [torch.randn(7, core.shape[1], generator=generator).to(dtype) for core in cores[opened:]]
    want = np.broadcast_to(dense(cores), (7, *(core.shape[1] for core in cores)))
    for vector in vectors[::-1]:
        want = np.einsum("p...i,pi->p...", want, vector.numpy())
    close(contract(cores, vectors), want, dtype, np.linalg.norm(dense(cores)) * 30)


@pytest.mark.parametrize("function", [norm, lambda c: inner(c, c), lambda c: entanglement_entropy(c, 2)])
def test_gradients(function):
    cores = [core.requires_grad_() for core in train([2, 2, 2, 2], [2, 3, 2])]
    assert torch.autograd.gradcheck(lambda *c: function(list(c)), cores)


def test_entropy_of_a_product_has_a_gradient():
    cores = [core.requires_grad_() for core in train([2, 2], [1])]
    entanglement_entropy(cores, 1).backward()
    assert all(torch.isfinite(core.grad).all() for core in cores)


def test_long_trains_never_become_dense():
    cores = [core / sqrt(2) for core in train([2] * 60, [4] * 59)]
    short, error = truncate(cores, 3)
    difference = float(inner(cores, cores) + inner(short, short) - 2 * inner(cores, short)) ** 0.5
    assert error == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: to_dense([]), "0 cores"),
        (lambda: to_dense([torch.zeros(1, 2)]), "(1, 2)"),
        (lambda: norm(train([2, 2], [2])[::-1]), "rank on its left is 1"),
        (lambda: norm(train([2, 2], [2])[:1]), "its right rank must be 1"),
        (
            lambda: norm([torch.ones(1, 2, 1), torch.ones(1, 2, 1).double()]),
            "torch.float64 but core 0 is torch.float32",
        ),
        (lambda: inner(train([2], []), train([3], [])), "sizes [2] and [3]"),
        (lambda: canonical(train([2], []), 1), "center is 1"),
        (lambda: schmidt_values(train([2], []), 1), "cut is 1"),
        (lambda: entanglement_entropy([torch.zeros(1, 2, 1)] * 2, 1), "0 has no entropy"),
        (lambda: truncate(train([2], []), 0), "largest rank is 0"),
        (lambda: truncate(train([2], []), tolerance=-1.0), "tolerance is -1.0"),
        (lambda: from_dense(torch.tensor(1.0)), "shape ()"),
        (lambda: add([train([2], []), train([3], [])]), "[(2,), (3,)]"),
        (lambda: contract(train([2], []), []), "0 vectors"),
        (lambda: contract(train([2], []), [torch.zeros(3, 4)]), "shapes [(3, 4)]"),
    ],
)
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)
