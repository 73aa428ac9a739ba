"""Codes of real inputs against the quantizers that define them: thresholds, compiled loops."""

import pickle

import pytest
import torch
from test_quantized_layers import sample
from torch import Tensor

from classical.integer import integer_twin
from classical.integer.codes import input_code, rounds_to_nearest, thresholds
from classical.integer.layers import IntegerLayer
from classical.layers import QuantizedLinear
from classical.quantizers import Quantizer, quantizer, quantizer_names

NAMES = [name for name in quantizer_names("activation") if name not in ("float", "xnor") and not name.startswith("lq")]


def ready(name: str, x: Tensor) -> Quantizer:
    built = quantizer(name, "activation").to(x.dtype)
    built(x)
    return built.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_thresholds_are_where_the_code_changes(name: str, dtype: torch.dtype) -> None:
    activation = ready(name, 2 * sample(4, 300, dtype=dtype))
    like = torch.zeros((), dtype=dtype)
    found = thresholds(activation, like)
    grid = torch.tensor(activation.grid)
    at = found.to(dtype)
    assert torch.equal(at.double(), found)
    assert (found.diff() > 0).all()
    assert torch.equal(activation.integers(at[None]).codes[0], grid[1:].int())
    below = torch.nextafter(at, torch.full_like(at, -torch.inf))
    assert torch.equal(activation.integers(below[None]).codes[0], grid[:-1].int())
    x = torch.linspace(-9, 9, 4001, dtype=dtype)
    counted = grid[torch.searchsorted(found, x.double(), right=True)]
    assert torch.equal(counted.int(), activation.integers(x[None]).codes[0])


def test_which_quantizers_round_to_the_nearest() -> None:
    like = torch.zeros(())
    x = 2 * sample(4, 300)
    for name in NAMES:
        activation = ready(name, x)
        code = input_code(activation, like)
        expected = not name.startswith(("bnn", "hwgq"))
        assert rounds_to_nearest(thresholds(activation, like), code) is expected, name
        assert code.dtype == (torch.int8 if activation.bits <= 8 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_codes_are_the_quantizers(name: str, dtype: torch.dtype) -> None:
    """Bit for bit: at every threshold and beside it, at both infinities, of thousands of other numbers."""
    pytest.importorskip("numba")
    activation = ready(name, 2 * sample(4, 300, dtype=dtype))
    like = torch.zeros((), dtype=dtype)
    code = input_code(activation, like, "numba")
    if name.startswith(("int", "lsq")):
        assert code.compiled == dtype
    if name.startswith(("bnn", "hwgq")):
        assert code.compiled is None
    assert input_code(activation, like).compiled is None
    at = thresholds(activation, like).to(dtype)
    inf = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30, 0.0, -0.0], dtype=dtype)
    beside = [torch.nextafter(at, torch.full_like(at, side)) for side in (torch.inf, -torch.inf)]
    x = torch.cat((at, *beside, inf, 3 * sample(5000, seed=1, dtype=dtype)))[None]
    expected = activation.integers(x).codes
    found = code.encode(activation, x)
    assert found.dtype == code.dtype
    assert torch.equal(found.int() + code.shift, expected)
    # Of another layout, of no numbers, of another type.
    square = x[:, :4900].reshape(70, 70).T
    assert torch.equal(code.encode(activation, square).int() + code.shift, activation.integers(square).codes)
    assert code.encode(activation, x[:, :0]).shape == (1, 0)
    other = x.to(torch.float64 if dtype == torch.float32 else torch.float32)
    assert torch.equal(code.encode(activation, other).int() + code.shift, activation.integers(other).codes)
    x[0, 3] = torch.nan
    with pytest.raises(ValueError, match="input holds NaN"):
        code.encode(activation, x)


def twin_of(seed: int, scale: float = 1.0, activation: str = "int8") -> tuple[IntegerLayer, Tensor]:
    layer = QuantizedLinear(6, 5, weight="int8", activation=activation)
    with torch.no_grad():
        layer.weight.copy_(sample(5, 6, seed=seed))
    x = scale * sample(9, 6, seed=seed)
    layer(x)
    return integer_twin(layer.eval()), x


@pytest.mark.parametrize("activation", ["int8", "lsq4"])
def test_the_state_of_another_code_is_refused(activation: str) -> None:
    """Its padding, corrections and compiled loops would be those of the codes that it was built for."""
    twin, x = twin_of(0, activation=activation)
    copied, _ = twin_of(0, activation=activation)
    copied.load_state_dict(twin.state_dict())
    assert torch.equal(copied(x), twin(x))
    other, _ = twin_of(1, 3.0, activation)
    with pytest.raises(ValueError, match=r"inputs whose scale, zero, ends.*build the integer twin from the layer"):
        other.load_state_dict(twin.state_dict())


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_twins_go_where_there_are_no_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    twin, x = twin_of(0)
    right = twin(x)
    with pytest.raises(ValueError, match="need a batch axis"):
        twin.encode(x[0])
    other = twin_of(1)[1][:9]
    traced = torch.jit.trace(twin, x)
    assert torch.equal(traced(other), twin(other))
    twin = pickle.loads(pickle.dumps(twin))
    monkeypatch.setattr("classical.integer.loading.find_spec", lambda name: None)
    assert torch.equal(twin(x), right)
