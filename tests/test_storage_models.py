"""Models as files: what is read back computes the same, bit for bit, and nothing else is changed."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from classical import QuantizedConv2d, QuantizedLinear, integer_twin
from classical.quantizers import Quantizer, quantizer_names
from classical.storage import load, load_model, read, save_model, share_parameter, sizes
from qconv import QuantumConv2d
from qconv.energy import count

NAMES = [
    name
    for name in quantizer_names("weight")
    if not name.removesuffix("_channel").removesuffix("_affine")[3:].isdigit() or name[:4] in ("int2", "int4", "int8")
]


def images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*(shape or (4, 1, 8, 8)), generator=torch.Generator().manual_seed(seed)).to(dtype)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build()


def network(weight: str = "int8", activation: str = "int8", bias: bool = True) -> nn.Module:
    return nn.Sequential(
        QuantizedConv2d(1, 6, 3, weight=weight, activation=activation, bias=bias),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        QuantizedLinear(6 * 36, 5, weight=weight, activation=activation, bias=bias),
    )


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 30), nn.Linear(30, 5)
    )


def trained(model: nn.Module) -> nn.Module:
    """A few steps, so that scales, ranges and running statistics are none of the initial ones; then eval()."""
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    model.train()
    for seed in range(3):
        optimizer.zero_grad()
        model(images(seed=seed)).square().mean().backward()
        optimizer.step()
    return model.eval()


def contents(model: nn.Module) -> tuple[list[str], dict[str, Tensor], list[bool]]:
    state = {name: value.clone() for name, value in model.state_dict().items()}
    return [repr(module) for module in model.modules()], state, [module.training for module in model.modules()]


def unchanged(before: tuple[Any, ...], model: nn.Module) -> bool:
    after = contents(model)
    return before[0] == after[0] and before[2] == after[2] and before[1].keys() == after[1].keys() and all(
        torch.equal(value, after[1][name]) for name, value in before[1].items()
    )  # fmt: skip


# Quantized models.


@pytest.mark.parametrize("weight", NAMES)
def test_quantized_models_compute_the_same(tmp_path: Path, weight: str) -> None:
    model = trained(seeded(lambda: network(weight)))
    x, before = images(seed=9), contents(model)
    written = save_model(model, tmp_path / "file")
    assert unchanged(before, model)
    assert written == (tmp_path / "file").stat().st_size
    other = seeded(lambda: network(weight), seed=1).eval()
    assert not torch.equal(other(x), model(x))
    assert load_model(other, tmp_path / "file") is other
    assert torch.equal(other(x), model(x))
    assert count(other, (1, 8, 8)) == count(model, (1, 8, 8))
    # What is written again, from the codes alone, is the same file.
    save_model(other, tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()
    twice = load_model(other, tmp_path / "again")
    assert torch.equal(twice(x), model(x))


@pytest.mark.parametrize(
    ("weight", "activation"), [("int8", "int8"), ("twn", "int4"), ("ttq", "int8"), ("xnor", "xnor")]
)
def test_loaded_layers_have_integer_twins(tmp_path: Path, weight: str, activation: str) -> None:
    model = trained(seeded(lambda: network(weight, activation)))
    save_model(model, tmp_path / "file")
    other = load_model(seeded(lambda: network(weight, activation), seed=1), tmp_path / "file").eval()
    x = images(seed=5)
    assert torch.equal(integer_twin(other[0])(x), integer_twin(model[0])(x))


@pytest.mark.parametrize("activation", quantizer_names("activation"))
def test_activation_quantizers_keep_what_they_learned(tmp_path: Path, activation: str) -> None:
    model = trained(seeded(lambda: network("int4", activation)))
    save_model(model, tmp_path / "file")
    other = load_model(seeded(lambda: network("int4", activation), seed=1), tmp_path / "file").eval()
    assert torch.equal(other(images(seed=7)), model(images(seed=7)))


def test_codes_alone_are_kept_of_a_quantized_weight(tmp_path: Path) -> None:
    model = trained(seeded(lambda: network("int4")))
    save_model(model, tmp_path / "file")
    found = sizes(tmp_path / "file")
    rows = {row.name: row for row in found.tensors}
    assert rows["4.weight"].bytes <= 6 * 36 * 5 * 4 / 8 + 4
    assert found.metadata == {"0.weight": "int4", "4.weight": "int4"}
    codes, scale, zero = read(tmp_path / "file")["4.weight"]
    assert codes.abs().max() == 7
    assert (scale.shape, int(zero)) == ((), 0)
    assert torch.equal(load(tmp_path / "file")["4.weight"], model[4].quantized_weight())


def test_loaded_codes_do_not_follow_the_weight(tmp_path: Path) -> None:
    model = trained(seeded(network))
    save_model(model, tmp_path / "file")
    other = load_model(seeded(network, seed=1), tmp_path / "file").eval()
    expected = other(images())
    assert torch.equal(other[4].weight, other[4].quantized_weight())
    with torch.no_grad():
        other[4].weight.mul_(2)
    assert torch.equal(other(images()), expected)
    again = copy.deepcopy(other)
    again.load_state_dict(other.state_dict())
    assert torch.equal(again(images()), expected)
    other.train()
    other(images()).sum().backward()
    assert other[0].bias.grad is not None
    assert other[4].weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("weight", ["float", "int8", "int12_channel", "ttq"])
def test_other_number_types(tmp_path: Path, weight: str, dtype: torch.dtype) -> None:
    model = trained(seeded(lambda: network(weight))).to(dtype)
    save_model(model, tmp_path / "file")
    other = load_model(seeded(lambda: network(weight), seed=1).to(dtype), tmp_path / "file").eval()
    x = images(seed=3, dtype=dtype)
    assert other(x).dtype == dtype
    assert torch.equal(other(x), model(x))


def test_quantum_kernels_and_their_classical_form(tmp_path: Path) -> None:
    quantum = seeded(lambda: nn.Sequential(QuantumConv2d(1, 4, 2), nn.Flatten(), nn.Linear(196, 3))).eval()
    save_model(quantum, tmp_path / "file")
    other = load_model(seeded(lambda: copy.deepcopy(quantum).apply(_reset)), tmp_path / "file")
    assert torch.equal(other(images()), quantum(images()))
    classical = quantum[0].to_classical().quantize("int8")
    save_model(classical, tmp_path / "file")
    assert sizes(tmp_path / "file").metadata == {"weight": "int8"}
    blank = copy.deepcopy(classical)
    nn.init.normal_(blank.weight)
    assert torch.equal(load_model(blank, tmp_path / "file")(images()), classical(images()))


def _reset(module: nn.Module) -> None:
    for parameter in module.parameters(recurse=False):
        nn.init.normal_(parameter)


class Rounding(Quantizer):
    """A quantizer of a user's own that states nothing."""

    def __init__(self) -> None:
        super().__init__("rounding", "int8", range(-7, 8))
        self.register_buffer("step", torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return (x / self.step).round() * self.step

    def constants(self, weight: Tensor) -> int:
        return 1


def test_a_quantizer_without_codes_keeps_its_weight(tmp_path: Path) -> None:
    model = seeded(lambda: QuantizedLinear(6, 4, weight=Rounding(), activation="float")).eval()
    save_model(model, tmp_path / "file")
    other = seeded(lambda: QuantizedLinear(6, 4, weight=Rounding(), activation="float"), seed=1)
    load_model(other, tmp_path / "file")
    assert torch.equal(other.weight, model.weight)
    assert isinstance(other.weight_quantizer, Rounding)
    assert torch.equal(other(images(3, 6)), model(images(3, 6)))


# Pruned and otherwise made weights.


def masked() -> nn.Module:
    model = plain()
    for layer, amount in ((model[0], 0.5), (model[4], 0.9)):
        prune.l1_unstructured(layer, "weight", amount)
    prune.random_structured(model[5], "weight", 0.5, dim=0)
    prune.l1_unstructured(model[5], "bias", 0.4)
    return model


def parametrized() -> nn.Module:
    model = plain()
    parametrizations.weight_norm(model[4])
    parametrizations.spectral_norm(model[5])
    share_parameter(model[0], bits=2)
    return model


def shared() -> nn.Module:
    model = masked()
    for i in (0, 4, 5):
        share_parameter(model[i], bits=3)
    return model


def quantized_masked() -> nn.Module:
    model = network("int8", "int8")
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.l1_unstructured(model[4], "weight", 0.9)
    return model


def removed() -> nn.Module:
    model = masked()
    for layer, name in ((model[0], "weight"), (model[4], "weight"), (model[5], "weight"), (model[5], "bias")):
        prune.remove(layer, name)
    return model


class Tied(nn.Module):
    """Two layers with one weight, and one layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.head = self.first

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.first(x))).flatten(1)
        return out


class Buffers(nn.Module):
    """What a state_dict holds beside parameters, and what it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(8))
        self.register_buffer("mask", torch.rand(8) > 0.5)
        self.register_buffer("cache", torch.rand(8), persistent=False)
        self.register_buffer("wave", torch.rand(8) * 1j)
        self.register_buffer("nothing", None)
        self.register_parameter("bias", None)
        self.scale = nn.Parameter(torch.rand(()))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x.flatten(1) * self.scale + (self.table * self.mask + self.wave.imag).repeat(8)
        return out


@pytest.mark.parametrize("build", [plain, masked, removed, parametrized, shared, quantized_masked, Tied, Buffers])
def test_models_of_all_kinds_compute_the_same(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    model = trained(seeded(build))
    model.train()
    before = contents(model)
    save_model(model, tmp_path / "file")
    assert unchanged(before, model)
    model.eval()
    other = load_model(seeded(build, seed=1), tmp_path / "file")
    assert all(module.training for module in other.modules() if not isinstance(module, Quantizer))
    assert torch.equal(other.eval()(images(seed=8)), model(images(seed=8)))
    assert not any(parametrize.is_parametrized(module) for module in other.modules())
    assert not any(name.endswith("_mask") for name in other.state_dict())


@pytest.mark.parametrize("build", [masked, removed, parametrized, shared])
def test_made_weights_load_into_a_plain_model(tmp_path: Path, build: Callable[[], nn.Module]) -> None:
    model = trained(seeded(build))
    save_model(model, tmp_path / "file")
    other = load_model(seeded(plain, seed=1), tmp_path / "file").eval()
    assert torch.equal(other(images(seed=8)), model(images(seed=8)))
    assert set(load(tmp_path / "file")) == set(plain().state_dict())


def test_zeros_of_a_mask_cost_nothing_though_they_are_negative(tmp_path: Path) -> None:
    for build in (masked, removed):
        model = seeded(build)
        weight = model[4].weight if build is removed else model[4].weight_orig * model[4].weight_mask
        assert (weight.view(torch.int32) == -(2**31)).any()  # -0.0
        save_model(model, tmp_path / "file")
        row = next(row for row in sizes(tmp_path / "file").tensors if row.name == "4.weight")
        assert row.bytes < 1.1 * 4 * int((weight != 0).sum()) + 6480 / 8


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    model = seeded(Tied)
    save_model(model, tmp_path / "file")
    assert set(load(tmp_path / "file")) == {"first.weight", "first.bias", "second.bias"}
    other = load_model(seeded(Tied, seed=1), tmp_path / "file")
    assert other.second.weight is other.first.weight is other.head.weight
    assert torch.equal(other.first.weight, model.first.weight)


def test_sharing_makes_files_smaller_at_every_step(tmp_path: Path) -> None:
    model = seeded(plain)
    found = [save_model(model, tmp_path / "file")]
    for layer in (model[0], model[4], model[5]):
        prune.l1_unstructured(layer, "weight", 0.9)
    found.append(save_model(model, tmp_path / "file"))
    for layer in (model[0], model[4], model[5]):
        share_parameter(layer, bits=3)
    found.append(save_model(model, tmp_path / "file"))
    found.append(save_model(model, tmp_path / "file", floats=torch.float16))
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)


def test_the_example_of_the_documentation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (Path(__file__).parents[1] / "docs" / "storage.md").read_text()
    block = text.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    with torch.random.fork_rng():
        exec(block, found)
    assert capsys.readouterr().out.strip() == block.split("# ")[-1].splitlines()[0]
    x = images(3, 784)
    torch.testing.assert_close(found["same"](x), found["model"](x), rtol=1e-2, atol=1e-2)  # levels in float16


def test_a_quantized_layer_in_two_places_is_stored_once(tmp_path: Path) -> None:
    def build() -> nn.Module:
        layer = QuantizedLinear(8, 8, weight="int4")
        return nn.Sequential(layer, nn.ReLU(), layer)

    model = seeded(build)
    model(images())
    save_model(model.eval(), tmp_path / "file")
    assert {row.name for row in sizes(tmp_path / "file").tensors} == {
        *("0.weight", "0.bias", "0.activation_quantizer.low", "0.activation_quantizer.high")
    }
    other = load_model(seeded(build, seed=1), tmp_path / "file").eval()
    assert torch.equal(other(images()), model(images()))


# Rounding on demand.


def test_floats_and_biases_are_rounded_when_asked(tmp_path: Path) -> None:
    model = trained(seeded(lambda: network("int8")))
    save_model(model, tmp_path / "file", floats=torch.bfloat16, biases="int8")
    other = load_model(seeded(lambda: network("int8"), seed=1), tmp_path / "file").eval()
    assert torch.equal(other[4].quantized_weight(), model[4].quantized_weight())  # codes are not rounded again
    assert torch.equal(other[1].running_var, model[1].running_var.bfloat16().float())
    assert torch.equal(other[1].num_batches_tracked, model[1].num_batches_tracked)
    step = model[4].bias.abs().max() / 127
    assert 0 < (other[4].bias - model[4].bias).abs().max() <= step / 2 * 1.001
    assert other[4].bias.dtype == torch.float32


def test_rounding_errors(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"floats is torch\.int8 but must be None, torch\.float16 or torch\.bfloat16"):
        save_model(model, tmp_path / "file", floats=torch.int8)
    with pytest.raises(ValueError, match="unknown weight quantizer 'int88'"):
        save_model(model, tmp_path / "file", biases="int88")
    with torch.no_grad():
        model.weight[0, 0] = 1e6
    with pytest.raises(
        ValueError, match=r"'weight' has values beyond the range of torch\.float16: choose torch\.bfloat16"
    ):
        save_model(model, tmp_path / "file", floats=torch.float16)
    assert not (tmp_path / "file").exists()


def test_infinite_ranges_stay_infinite(tmp_path: Path) -> None:
    model = network().eval()  # its input ranges have seen nothing
    save_model(model, tmp_path / "file", floats=torch.float16)
    other = load_model(seeded(network, seed=1), tmp_path / "file")
    assert other[0].activation_quantizer.low == torch.inf


# Files of other models.


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: network("int4"), "holds '0.weight' quantized by 'int8' but the model quantizes it by 'int4'"),
        (lambda: network("float"), "holds '0.weight' quantized by 'int8' but the model quantizes it by 'float'"),
        (lambda: network("int8", "float"), "the model lacks '0.activation_quantizer.high', '0.act"),
        (lambda: network("int8", "int8", bias=False), "the model lacks '0.bias', '4.bias'"),
        (lambda: nn.Sequential(network()[:4], nn.Linear(3, 3)), "the file lacks '0.0.activation_quantizer.* more"),
        (lambda: nn.Sequential(*network()[:4], QuantizedLinear(9, 5)), r"'4.weight' has shape \(5, 216\) in the file"),
    ],
)  # fmt: skip
def test_a_file_of_another_model_changes_nothing(tmp_path: Path, build: Callable[[], nn.Module], message: str) -> None:
    save_model(trained(seeded(network)), tmp_path / "file")
    model = seeded(build, seed=1)
    before = contents(model)
    with pytest.raises(ValueError, match=message):
        load_model(model, tmp_path / "file")
    assert unchanged(before, model)


def test_float_weights_do_not_load_into_a_quantized_layer(tmp_path: Path) -> None:
    save_model(network("float", "int8"), tmp_path / "file")
    with pytest.raises(ValueError, match="quantized by 'float' but the model quantizes it by 'twn'"):
        load_model(network("twn", "int8"), tmp_path / "file")


def test_a_damaged_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    model = seeded(quantized_masked)
    save_model(model, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    before = contents(model)
    with pytest.raises(ValueError, match="is damaged or incomplete"):
        load_model(model, path)
    assert unchanged(before, model)


class Extra(nn.Linear):
    """A layer with state that is no tensor."""

    def get_extra_state(self) -> dict[str, int]:
        return {"steps": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass


def test_models_that_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'1' \(Extra\) has state that is no tensor"):
        save_model(nn.Sequential(nn.ReLU(), Extra(2, 2)), tmp_path / "file")
    with pytest.raises(ValueError, match=r"the weight of LazyLinear\(.*\) has no shape yet: run a batch"):
        save_model(nn.Sequential(nn.LazyLinear(3)), tmp_path / "file")


@pytest.mark.parametrize("weight", ["float", "int8", "ttq"])
@pytest.mark.parametrize(
    ("stored", "own"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
    ],
)
def test_a_model_of_other_numbers_is_refused(
    tmp_path: Path, weight: str, stored: torch.dtype, own: torch.dtype
) -> None:
    save_model(trained(seeded(lambda: network(weight))).to(stored), tmp_path / "file")
    other = seeded(lambda: network(weight), seed=1).to(own)
    before = contents(other)
    with pytest.raises(ValueError, match=rf"holds '0.* in {stored} but the model in {own}: turn the model's numbers"):
        load_model(other, tmp_path / "file")
    assert unchanged(before, other)


def test_files_of_rounded_numbers_fit_the_model_that_they_are_of(tmp_path: Path) -> None:
    for floats in (torch.float16, torch.bfloat16):
        model = trained(seeded(network))
        save_model(model, tmp_path / "file", floats=floats, biases="int8")
        other = load_model(seeded(network, seed=1), tmp_path / "file")
        assert torch.equal(other[1].weight, model[1].weight.to(floats).float())
