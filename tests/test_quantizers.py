"""What all quantizers promise: codes and levels say what forward gives, states are kept, names and errors are clear."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import parametrize

from classical.quantizers import (
    BNN,
    HWGQ,
    LQ,
    LSQ,
    NAQ,
    TTQ,
    DoReFaActivation,
    DoReFaWeight,
    IntegerActivation,
    IntegerWeight,
    Learned,
    Quantizer,
    RelaxedQuantizer,
    Uneven,
    quantizer,
    quantizer_names,
)

DTYPES = (torch.float32, torch.float64)
ROLES: tuple[Any, ...] = ("weight", "activation")
NAMES = [(name, role) for role in ROLES for name in quantizer_names(role) if name != "float"]
LEARNED = [(name, role) for name, role in NAMES if isinstance(quantizer(name, role), Learned)]
ONE_OF_EACH = [
    *((name, "weight") for name in ("ttq", "naq5", "lq2", "lsq4", "rq4", "rq_st2")),
    *((name, "activation") for name in ("lq2", "lsq4", "rq4", "rq_st2")),
]


def sample(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 0.6) -> Tensor:
    return scale * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def ready(name: str, role: Any, x: Tensor) -> Quantizer:
    """A quantizer in eval() that has seen x in train()."""
    built = quantizer(name, role).to(x.dtype)
    built(x)
    return built.eval()


def gradient(q: Quantizer, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of sum(g q(x)) and the random g."""
    x = x.clone().requires_grad_()
    g = sample(*x.shape, seed=7, scale=1.0, dtype=x.dtype)
    q.zero_grad()
    (q(x) * g).sum().backward()
    assert x.grad is not None
    return x.grad, g


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("role", ROLES)
def test_codes_and_levels_say_exactly_what_forward_gives(role: str, dtype: torch.dtype) -> None:
    x = sample(4, 3, 5, 5, dtype=dtype)
    for name in quantizer_names(role):  # type: ignore[arg-type]
        if name == "float":
            continue
        q = ready(name, role, x)
        output = q(x)
        assert output.dtype == dtype
        if not isinstance(q, Uneven):
            codes, scale, zero = q.integers(x)
            assert codes.dtype == zero.dtype == torch.int32
            assert scale.dtype == dtype
            assert set(codes.unique().tolist()) <= set(q.grid), name
            assert q.max_code == max(abs(code) for code in q.grid)
            assert torch.equal((codes - zero) * scale, output), name
        if q.bits <= 8:
            book = q.codebook(x)
            assert book.codes.dtype == torch.int32
            assert book.codes.shape == x.shape
            assert book.levels.shape in ((len(q.grid),), (4, len(q.grid))), name
            assert (book.levels.diff() > 0).all(), name
            assert torch.equal(book.values(), output), name
            assert len(q.grid) <= 2**q.bits


def test_a_channel_or_sample_of_its_own_levels_has_a_row() -> None:
    x = sample(4, 3, 5, 5)
    for name in ("int4_channel", "int4_channel_affine", "xnor", "lq2"):
        assert ready(name, "weight", x).codebook(x).levels.dim() == 2, name
    for name in ("int4", "int4_affine", "twn", "ttq", "naq5", "dorefa3", "lsq3", "rq3", "bnn"):
        assert ready(name, "weight", x).codebook(x).levels.dim() == 1, name
    for name in ("lq2", "lsq3", "dorefa3", "hwgq2"):
        assert ready(name, "activation", x).codebook(x).levels.dim() == 1, name


@pytest.mark.parametrize("role", ROLES)
def test_what_happens_to_zero(role: str) -> None:
    x = sample(2, 3, 4, 4) + 0.3
    x[0, 0, 0] = torch.tensor([0.0, -0.0, 0.0, 0.0])
    signs = ("bnn", "xnor") if role == "activation" else ("bnn", "xnor", "dorefa", "lq")  # 0 is none of their levels
    for name in quantizer_names(role):  # type: ignore[arg-type]
        at_zero = ready(name, role, x)(x)[0, 0, 0]
        if not name.startswith(signs) or name.startswith("lsq"):
            assert (at_zero == 0).all(), name
        else:
            assert (at_zero != 0).all(), name
            assert at_zero.unique().numel() == 1  # -0 is 0


def test_formats() -> None:
    kinds = {"int": None, "bnn": "binary", "xnor": "binary", "twn": "ternary", "ttq": "ternary", "naq": "ternary"}
    kinds |= {"lq": "binary"}
    for name, role in NAMES:
        q = quantizer(name, role)
        base = name.rstrip("0123456789")
        expected = kinds.get(base) or ("binary" if q.bits == 1 else f"int{q.bits}")
        assert q.format == expected, name


def test_uneven_levels_have_no_integers() -> None:
    for name, role in [("ttq", "weight"), ("naq7", "weight"), ("lq3", "weight"), ("lq3", "activation")]:
        with pytest.raises(ValueError, match=rf"levels of '{name}' are no multiples of one scale: use codebook\(\)"):
            quantizer(name, role).integers(torch.ones(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "role"), LEARNED)
def test_learned_scales_start_from_the_first_batch(name: str, role: Any) -> None:
    x, other = sample(4, 3, 5, 5), 7 * sample(4, 3, 5, 5, seed=1)
    q, explicit = quantizer(name, role).double(), quantizer(name, role).double()
    keys = set(q.state_dict())
    assert not q.calibrated
    q.eval()(x)
    if role == "activation":
        q.train()(x[:0])
    assert not q.calibrated
    q.train()(x)
    explicit.fit(x)
    assert q.calibrated
    assert explicit.calibrated
    assert set(q.state_dict()) == keys
    if not isinstance(q, LQ):  # whose basis also moves in train()
        for key, value in explicit.state_dict().items():
            assert torch.equal(q.state_dict()[key], value)
        q(other)  # only the first batch starts them
        for key, value in explicit.state_dict().items():
            assert torch.equal(q.state_dict()[key], value)
    # A copy by state_dict, into one that has seen nothing and into one that has seen something else.
    loaded = quantizer(name, role).double()
    loaded.load_state_dict(q.state_dict())
    assert loaded.calibrated
    assert torch.equal(loaded.eval()(x), q.eval()(x))
    refit = quantizer(name, role).double()
    refit.fit(other)
    refit.load_state_dict(q.state_dict())
    assert torch.equal(refit.eval()(x), q(x))
    assert torch.equal(copy.deepcopy(q)(x), q(x))
    fresh = quantizer(name, role).double()
    fresh.load_state_dict(quantizer(name, role).double().state_dict())
    assert not fresh.calibrated


@pytest.mark.parametrize(("name", "role"), NAMES)
def test_eval_changes_nothing_and_is_deterministic(name: str, role: Any) -> None:
    x = sample(4, 3, 5, 5, dtype=torch.float32)
    for q in (quantizer(name, role).eval(), ready(name, role, x)):
        before, seen = copy.deepcopy(q.state_dict()), q.calibrated
        outputs = [q(x), q(x)]
        assert torch.equal(*outputs)
        q.train().eval()
        assert q.calibrated == seen
        assert all(torch.equal(before[key], value) for key, value in q.state_dict().items())


def test_activations_that_have_seen_nothing_do_not_mix_samples() -> None:
    x = sample(3, 2, 4, 4, dtype=torch.float32).abs() * torch.tensor([1.0, 10.0, 100.0])[:, None, None, None]
    for name in quantizer_names("activation"):
        q = quantizer(name, "activation").eval()
        together = q(x)
        for i in range(3):
            alone = q(x[i : i + 1])[0]
            if name.startswith("lq"):  # least squares, to rounding
                torch.testing.assert_close(together[i], alone)
            else:
                assert torch.equal(together[i], alone), name
        if name not in ("bnn", "xnor") and not name.startswith(("dorefa", "hwgq")):
            assert (together[2] > 3).any(), name  # each with a range of its own


@pytest.mark.parametrize(("name", "role"), ONE_OF_EACH)
def test_scales_stay_positive_whatever_an_optimizer_does(name: str, role: Any) -> None:
    x = sample(4, 3, 5, 5)
    q = ready(name, role, x)
    turned = copy.deepcopy(q)
    with torch.no_grad():
        for key, parameter in turned.named_parameters():
            if key != "log_noise":  # an exponent
                parameter.neg_()
    assert torch.equal(turned(x), q(x))
    assert (turned.codebook(x).levels.diff() > 0).all()
    assert all((scale > 0).all() for scale in [q.codebook(x).levels[..., -1]])


def test_a_scale_of_an_optimizer_with_weight_decay_moves_only_by_its_gradient_and_decay() -> None:
    q = ready("lsq4", "weight", sample(4, 3, 5, 5)).train()
    optimizer = torch.optim.SGD(q.parameters(), lr=0.1, weight_decay=0.5)
    (step,) = q.parameters()
    start = step.item()
    gradient(q, sample(4, 3, 5, 5))
    assert step.grad is not None
    optimizer.step()
    assert step.item() == pytest.approx(start - 0.1 * (step.grad.item() + 0.5 * start), rel=1e-12)


def test_extreme_values() -> None:
    zeros, tiny = torch.zeros(2, 3), torch.full((2, 3), 1e-42)
    no_zero = ("bnn", "dorefa", "lsq", "lq")
    for name in quantizer_names():
        if not name.startswith(no_zero) or name.startswith("lsq"):
            assert torch.equal(quantizer(name).eval()(zeros), zeros), name
        assert quantizer(name)(tiny).isfinite().all(), name
        assert quantizer(name)(zeros).isfinite().all(), name
    for name in quantizer_names("activation"):
        if name not in ("bnn", "xnor"):
            assert torch.equal(quantizer(name, "activation").eval()(zeros), zeros), name
        assert quantizer(name, "activation")(tiny).isfinite().all(), name
    nan = torch.tensor([[float("nan"), 1.0]])
    for name, role in NAMES:
        assert quantizer(name, role)(nan)[0, 0].isnan(), name
        assert quantizer(name, role).eval()(nan)[0, 0].isnan(), name


def test_half_precision_in_half_precision_out() -> None:
    x = sample(2, 3, 4, 4, dtype=torch.float16)
    for name, role in [*NAMES, ("float", "weight"), ("float", "activation")]:
        q = quantizer(name, role).eval()
        half, full = q(x), q(x.float())
        assert half.dtype == torch.float16
        torch.testing.assert_close(half, full.half())


@pytest.mark.parametrize(("name", "role"), NAMES)
def test_memory_formats_and_layouts_do_not_matter(name: str, role: Any) -> None:
    x = sample(4, 3, 5, 5, dtype=torch.float32)
    other = x.to(memory_format=torch.channels_last)
    for q in (quantizer(name, role).eval(), ready(name, role, x)):
        torch.testing.assert_close(q(other), q(x))
        if name != "float":
            assert q(other).is_contiguous(memory_format=torch.channels_last), name
        torch.testing.assert_close(q(x.transpose(2, 3)), q(x).transpose(2, 3))


@pytest.mark.parametrize(("name", "role"), [("int8_affine", "weight"), ("twn", "weight"), *ONE_OF_EACH])
def test_quantizers_are_torch_parametrizations(name: str, role: Any) -> None:
    if role == "activation":
        return
    conv = torch.nn.Conv2d(3, 4, 3)
    q = quantizer(name)
    expected = copy.deepcopy(q)
    expected.fit(conv.weight)
    expected = expected.eval()(conv.weight)
    q.fit(conv.weight)
    parametrize.register_parametrization(conv.eval(), "weight", q.eval())
    assert torch.equal(conv.weight, expected)
    conv(torch.rand(1, 3, 5, 5)).sum().backward()
    assert conv.parametrizations.weight.original.grad is not None  # type: ignore[union-attr]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "role"), [("int8", "activation"), ("xnor", "weight"), ("dorefa2", "weight"), *ONE_OF_EACH]
)
def test_torch_compiles_them_without_breaks(name: str, role: Any, training: bool) -> None:
    x = sample(4, 3, 5, 5, dtype=torch.float32)
    q = ready(name, role, x).train(training)
    plain, traced = copy.deepcopy(q), torch.compile(copy.deepcopy(q), fullgraph=True, backend="aot_eager")
    results = []
    for one in (plain, traced):
        torch.manual_seed(0)
        y = x.clone().requires_grad_()
        output = one(y)
        output.square().sum().backward()
        results.append([output.detach(), y.grad])
    torch.testing.assert_close(*results)


@pytest.mark.parametrize(("name", "role"), NAMES)
def test_everything_stays_on_the_device_of_the_input(name: str, role: Any) -> None:
    x = torch.empty(4, 3, 5, 5, device="meta", requires_grad=True)
    q = quantizer(name, role).to("meta")
    q.eval()(x)
    for _ in range(2):  # with and without fitting
        output = q.train()(x)
        assert output.is_meta
        assert output.shape == x.shape
        output.sum().backward()
        assert all(tensor.is_meta for tensor in q.state_dict().values())
    if q.bits <= 8:
        assert all(tensor.is_meta for tensor in q.eval().codebook(x))


def test_factory() -> None:
    for role in ROLES:
        for name in quantizer_names(role):
            built = quantizer(name, role)
            assert built.name == name
            assert role in built.roles
            assert quantizer(built, role) is built
            assert name in repr(built)


@pytest.mark.parametrize(
    ("spec", "role", "message"),
    [
        ("int88", "weight", "unknown weight quantizer 'int88': the nearest name is 'int8'"),
        ("INT4", "activation", "unknown activation quantizer 'INT4': the nearest name is 'int4'"),
        ("TWN", "weight", "the nearest name is 'twn'"),
        ("naq4", "weight", r"Valid names: float, int2 ... int16, .*, naq3, naq5, naq7, naq9, lq1 ... lq4"),
        ("", "weight", "unknown weight quantizer '': Valid names"),
        (None, "weight", "unknown weight quantizer None: Valid names"),
        (["int8"], "weight", r"unknown weight quantizer \['int8'\]: Valid names"),
        ("twn", "activation", "'twn' is not for activations: choose one of float, int2 ... int16, bnn"),
        ("hwgq2", "weight", "'hwgq2' is not for weights"),
        ("int8_channel", "activation", "not for activations"),
        (IntegerWeight(8), "activation", r"IntegerWeight\(int8\) is for weight, not for activation"),
        (LSQ(4), "activation", r"LSQ\(lsq4\) is for weight, not for activation"),
        (LSQ(4, role="activation"), "weight", r"LSQ\(lsq4\) is for activation, not for weight"),
        ("int8", "bias", "role is 'bias' but must be 'weight' or 'activation'"),
        ("int8", ["weight"], r"role is \['weight'\] but"),
    ],
)
def test_factory_errors(spec: Any, role: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantizer(spec, role)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: IntegerWeight(1), "2 to 16 bits, not 1"),
        (lambda: IntegerActivation(17), "2 to 16 bits, not 17"),
        (lambda: IntegerActivation(8, momentum=0), "momentum is 0"),
        (lambda: LSQ(1), "2 to 8 bits, not 1"),
        (lambda: DoReFaWeight(9), "1 to 8 bits, not 9"),
        (lambda: DoReFaActivation(0), "1 to 8 bits, not 0"),
        (lambda: HWGQ(5), "1 to 4 bits, not 5"),
        (lambda: LQ(5), "1 to 4 bits, not 5"),
        (lambda: LQ(2, momentum=1.5), "momentum is 1.5"),
        (lambda: NAQ(4), "3, 5, 7 or 9 levels, not 4"),
        (lambda: TTQ(0), "threshold is 0"),
        (lambda: RelaxedQuantizer(9), "2 to 8 bits, not 9"),
        (lambda: RelaxedQuantizer(temperature=0), "temperature is 0"),
        (lambda: RelaxedQuantizer(window=1), "window has 1 grid points"),
    ],
)
def test_constructor_errors(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_other_errors() -> None:
    for name in ("int8", "lsq4", "rq4", "lq2"):
        with pytest.raises(ValueError, match=r"shape \(3,\) but need a batch axis first"):
            quantizer(name, "activation").eval()(torch.ones(3))
    with pytest.raises(ValueError, match="no integer codes"):
        quantizer("float").integers(torch.ones(1))
    with pytest.raises(ValueError, match="no integer codes"):
        quantizer("float").codebook(torch.ones(1))
    with pytest.raises(ValueError, match="'int9' has 9 bits: a codebook lists at most 8"):
        quantizer("int9").codebook(torch.ones(1))
    assert BNN().codebook(torch.ones(1)).levels.tolist() == [-1, 1]
