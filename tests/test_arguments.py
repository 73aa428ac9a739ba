"""Arguments of another type or out of range: one clear ValueError each, and before anything is trained or written."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from circuits.naming import unknown
from classical import calibrate, export_onnx, integer_network, integer_twin, quantize
from classical.checks import real, whole
from classical.data_free import fold_batch_norms
from classical.pruning import CubicSchedule, MagnitudePruner, find_ticket, prune
from classical.quantizers import HWGQ, LQ, LSQ, NAQ, DoReFaWeight, IntegerActivation, IntegerWeight, RelaxedQuantizer
from classical.storage import load_model, save, save_model
from qconv.compression import compress
from qconv.data import Part, Split

NOT_WHOLE: tuple[Any, ...] = (2.5, 4.0, "2", None, True, math.nan, [2])
DIGITS = Part(torch.rand(20, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 10)
DATA = Split(DIGITS, DIGITS, DIGITS)


def network(outputs: int = 10) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, outputs)).eval()


def test_numbers() -> None:
    assert not any(whole(value, 1, 8) for value in NOT_WHOLE)
    assert [whole(value, 2, 3) for value in (1, 2, np.int64(3), 4)] == [False, True, True, False]
    assert [real(value, 0, 1) for value in (-0.1, 0, np.float32(0.5), 1.1)] == [False, True, True, False]
    assert not any(real(value) for value in (math.nan, math.inf, "1", None, True, 1j, torch.tensor(1.0)))


@pytest.mark.parametrize(
    "quantizer", [LSQ, RelaxedQuantizer, LQ, NAQ, HWGQ, DoReFaWeight, IntegerWeight, IntegerActivation]
)
@pytest.mark.parametrize("bits", [*NOT_WHOLE, 0, 17])
def test_bits_of_quantizers(quantizer: Callable[[Any], Any], bits: Any) -> None:
    with pytest.raises(ValueError, match=r"(has|have) .* (bits|levels), not"):
        quantizer(bits)


@pytest.mark.parametrize("change", [{"method": "int4"}, {"method": "prune"}, {"method": "dfq"}])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seed": -1}, "seed is -1 but must be a whole number from 0"),
        ({"seed": 1.5}, r"seed is 1\.5 but"),
        ({"batch_size": 0}, "batch_size is 0 but must be a whole number from 1"),
        ({"lr": -1}, "lr is -1 but must be above 0"),
        ({"lr": math.nan}, "lr is nan but"),
        ({"distill": "a"}, "distill is 'a' but must be a share"),
        ({"bits": 4.0}, r"bits is 4\.0 but must be a whole number"),
        ({"method": None}, "method is None but must name a step"),
        ({"method": "prune+"}, r"method is 'prune\+' but must name a step, or several with a \+ between"),
        ({"method": ""}, "method is '' but must name a step"),
        ({"method": "prune", "epochs": 1.5}, r"epochs is 1\.5 but method 'prune' takes 1 or more, whole"),
        ({"method": "prune", "sparsity": "a"}, "sparsity is 'a' but must be above 0 and below 1"),
        ({"method": "prune+share", "bits": 99}, r"bits is 99 but method 'prune\+share' takes 1 to 16"),
        ({"method": "dfq", "bits": 1}, "bits is 1 but method 'dfq' takes 2 to 16"),
        ({"model": network(5)}, r"scores of shape \(1, 5\) for one image, but the labels go up to 9"),
        ({"model": "net"}, r"model is 'net' \(str\) but must be an nn\.Module"),
        ({"data": None}, r"data is a NoneType but must be a Split: load_dataset\(name\)\.split\(seed=0\)"),
        ({"data": tuple(DIGITS)}, "data is a tuple but must be a Split"),
    ],
)
def test_compress(change: dict[str, Any], arguments: dict[str, Any], message: str) -> None:
    given = {"model": network(), "data": DATA, "epochs": None} | change | arguments
    with pytest.raises(ValueError, match=message):
        compress(**given)


def calibrated() -> Any:
    model = quantize(network())
    calibrate(model, [DIGITS.images])
    return model


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: save_model("m", path), r"model is 'm' \(str\) but must be an nn\.Module"),
        (lambda path: fold_batch_norms("m"), "model is 'm'"),
        (lambda path: integer_network("m", DIGITS.images), "model is 'm'"),
        (lambda path: integer_network(calibrated(), "x"), "input is a str but must be a tensor"),
        (lambda path: integer_network(calibrated(), DIGITS.images, threads=0), "threads is 0 but must be 1 or more"),
        (lambda path: integer_twin(calibrated()[1], threads=1.5), r"threads is 1\.5 but"),
        (lambda path: integer_network(quantize(network()), DIGITS.images), r"data_free_quantize\(\) .* input_range="),
        (lambda path: save(torch.zeros(3), path), "tensors is a Tensor but must map names, as strings, to tensors"),
        (lambda path: save({1: torch.zeros(3)}, path), "tensors is a dict but"),
        (lambda path: save({"w": [1, 2]}, path), "'w': a list cannot be stored: give a tensor, Codes or a Codebook"),
        (lambda path: save({"w": torch.ones(2)}, path, metadata={"a": 3}), r"metadata is \{'a': 3\} but"),
        (lambda path: prune(network(), "a"), "the amount to prune is 'a' but must be a number"),
        (lambda path: prune(network(), {"1": [0.5]}), r"the amount to prune is \[0\.5\] but"),
        (lambda path: MagnitudePruner(network(), final="a", schedule=CubicSchedule(0, 1, 1)), "amount to prune is 'a'"),
        (
            lambda path: MagnitudePruner(network(), final=0.5, initial="a", schedule=CubicSchedule(0, 1, 1)),
            "initial is 'a' but must be from 0 to the final fraction",
        ),
        (lambda path: find_ticket(network(), print, final=0.5, rounds=1.5), r"rounds=1\.5"),
    ],
)
def test_other_calls(call: Callable[[Any], Any], message: str, tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_onnx(tmp_path: Any) -> None:
    pytest.importorskip("onnxscript")
    path = tmp_path / "file"
    with pytest.raises(ValueError, match=r"model is 'm' \(str\)"):
        export_onnx("m", DIGITS.images, path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="input is a str but must be a tensor"):
        export_onnx(calibrated(), "x", path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"layer '1' cannot be written: .* input_range=\(low, high\)"):
        export_onnx(quantize(network()), DIGITS.images, path)


@pytest.mark.parametrize("quantized", [True, False])
def test_a_file_of_another_model_says_how_to_build_it(quantized: bool, tmp_path: Any) -> None:
    path = tmp_path / "model.qcnv"
    saved, other = (quantize(network()) if each else network() for each in (quantized, not quantized))
    save_model(saved, path)
    advice = r"build the model as the stored one was, if that was quantized with the same quantize\(\.\.\.\)"
    with pytest.raises(ValueError, match=advice):
        load_model(other, path)


@pytest.mark.parametrize(("weight", "activation"), [("int8", "int8"), ("bnn", "bnn"), ("twn", "lsq4")])
def test_integers_refuse_nan_and_take_infinities_for_the_ends(weight: str, activation: str) -> None:
    x = torch.rand(2, 16) - 0.5
    model: Any = quantize(nn.Sequential(nn.Linear(16, 10)), weight=weight, activation=activation).train()
    model(x)
    model.eval()
    x[0, :2] = torch.tensor([math.inf, -math.inf])  # whose sum is NaN, too
    for integers in (integer_twin(model[0]), integer_network(model, x)):
        torch.testing.assert_close(integers(x), integers(x.clamp(-100, 100)), rtol=0, atol=0)
        with pytest.raises(ValueError, match="input holds NaN, which no integer stands for"):
            integers(torch.where(x == x[1, 3], math.nan, x))


def test_hints_ignore_case_and_what_is_no_string() -> None:
    assert "did you mean 'RX'? " in str(unknown("gate", "rx", ["RX", "CZ"]))
    assert "did you mean 'cz'? " in str(unknown("gate", "CZZ", ["rx", "cz"]))
    for name in (None, 3, ["rx"], ""):
        assert str(unknown("gate", name, ["rx", "cz"])) == f"unknown gate {name!r}: Valid names: rx, cz"
