"""ONNX files that another runtime reads: the same answers, and codes where codes belong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from test_integer_networks import Block, trained_network
from torch import Tensor, nn

from classical import quantize
from classical.integer import export_onnx, integer_network

onnx = pytest.importorskip("onnx", reason="the onnx extra is not installed")
pytest.importorskip("onnxscript", reason="the onnx extra is not installed")
runtime = pytest.importorskip("onnxruntime", reason="the onnx extra is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


def run(path: Path, x: Tensor) -> np.ndarray:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return np.asarray(output)


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        Block(8, 16, 2),
        nn.Conv2d(16, 16, 3, groups=4, padding=1, padding_mode="reflect"),
        nn.BatchNorm2d(16),
        nn.ReLU6(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """A float network trained on images of digits, and other images with their labels."""
    data = load_digits()
    x = torch.from_numpy(data.images).float()[:, None] / 16
    y = torch.from_numpy(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(8):
            for batch in torch.randperm(1200).split(60):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()
    return model.eval(), x[1200:], y[1200:]


@pytest.mark.parametrize("options", [{}, {"weight": "int8_channel_affine"}], ids=["int8", "channels"])
def test_onnxruntime_names_the_same_digits(
    digits: tuple[nn.Module, Tensor, Tensor], options: dict[str, Any], tmp_path: Path
) -> None:
    model, x, y = digits
    quantized = quantize(model, **options)
    with torch.no_grad():
        quantized.train()(x[:200])
        quantized.load_state_dict({**quantized.state_dict(), **model.state_dict()})  # batch norm as it was
        expected = quantized.eval()(x)
        assert (expected.argmax(1) == y).double().mean() > 0.9
    path = tmp_path / "digits.onnx"
    export_onnx(quantized, x[:1], path)
    found = torch.from_numpy(run(path, x))
    integer = integer_network(quantized, x[:1])(x)
    # Two float engines may round the same number to neighboring levels; answers that close to a tie are rare.
    for other in (expected, integer):
        assert (found.argmax(1) == other.argmax(1)).double().mean() >= 0.998
        assert (found - other).abs().mean() < 0.005 * other.abs().max()
    assert not list(tmp_path.glob("*.part"))


def test_weights_are_stored_as_int8_and_biases_as_int32(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Conv2d(5, 2, 1))
    quantized = quantize(model, weight="int8_channel", last=("float", "float"))
    x = torch.rand(3, 1, 7, 7, generator=torch.Generator().manual_seed(0))
    quantized(x)
    quantized.eval()
    export_onnx(quantized, x, tmp_path / "model.onnx")
    file = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(file)
    stored = {tuple(i.dims): i.data_type for i in file.graph.initializer}
    types = onnx.TensorProto
    assert stored[4, 1, 3, 3] == stored[5, 4, 3, 3] == types.INT8
    assert stored[2, 5, 1, 1] == types.FLOAT
    assert sum(i.data_type == types.INT32 for i in file.graph.initializer) == 2
    kinds = [node.op_type for node in file.graph.node]
    assert kinds.count("QuantizeLinear") == 2
    assert kinds.count("DequantizeLinear") == 2 * 3  # input, weight, bias
    (size,) = (i for i in file.graph.initializer if tuple(i.dims) == (5, 4, 3, 3))
    codes = quantized.get_submodule("2").weight_quantizer.integers(quantized.get_submodule("2").weight).codes
    assert np.array_equal(onnx.numpy_helper.to_array(size), codes.numpy())
    assert file.graph.input[0].type.tensor_type.shape.dim[0].dim_param  # batches of any size


@pytest.mark.parametrize("options", [{"weight": "int4", "activation": "int4"}, {"weight": "twn", "activation": "lsq4"}])
def test_fewer_bits_are_clipped_to_their_levels(options: dict[str, Any], tmp_path: Path) -> None:
    model, x = trained_network(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(784, 3)), torch.float32, **options
    )
    export_onnx(model, x, tmp_path / "model.onnx")
    with torch.no_grad():
        expected = model(3 * x).numpy()  # beyond the range that was seen
    np.testing.assert_allclose(run(tmp_path / "model.onnx", 3 * x), expected, atol=0.02 * np.abs(expected).max())


def test_what_is_no_int8_is_named(tmp_path: Path) -> None:
    x = torch.rand(2, 1, 5, 5)
    for options, says in (
        ({"weight": "ttq"}, "layer '0' cannot be written: the levels of 'ttq' are no multiples"),
        ({"weight": "dorefa8"}, r"layer '0' cannot be written: its weights, .* have codes .* \.\.\. 255, not int8"),
        ({"activation": "bnn"}, r"its inputs, BNN\(bnn\), are no codes of at most 8 bits that round to the nearest"),
        ({"activation": "int12"}, r"its inputs, .*int12.*, are no codes of at most 8 bits"),
        ({"weight": "float"}, "layer '0' cannot be written: 'float' values have no integer codes"),
    ):
        model = quantize(nn.Sequential(nn.Conv2d(1, 2, 3)), **options)  # type: ignore[arg-type]
        with torch.no_grad():
            model[0].weight[0, 0, 0, 0] = 1.0  # type: ignore[index]
        model(x)
        with pytest.raises(ValueError, match=says):
            export_onnx(model, x, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_without_onnx_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("classical.integer.onnx.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'qconv\[onnx\]'"):
        export_onnx(nn.Identity(), torch.rand(1, 1), tmp_path / "model.onnx")
