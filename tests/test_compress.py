"""From a float model to a compressed one: recipes, training, files, and what is measured."""

import copy
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from classical.layers import QuantizedConv2d, QuantizedLinear
from classical.pruning import sparsity
from classical.quantizers import quantizer_names
from classical.storage import sizes
from qconv.compression import comparison, compress, load_compressed, measure
from qconv.data import load_dataset
from qconv.energy.prices import HOROWITZ_45NM
from qconv.energy.units import joules
from qconv.lenets import LeNet300, build_lenet
from qconv.recipes import _distilled, carry_out, method_names, recipe, structure
from qconv.train import evaluate, fit

FEW = {"epochs": 2, "batch_size": 100}


@pytest.fixture(scope="module")
def data():
    """A split of the digits; all tests train on few of them."""
    return load_dataset("digits").split(0, n_train=400, n_validation=100, n_test=200)


@pytest.fixture(scope="module")
def dense(data):
    """A small float network that has learned the digits somewhat."""
    model = build_lenet("lenet300", (1, 8, 8), 10, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of dropout
        fit(model, *data.train, epochs=20, lr=0.003, seed=0)
    return model.eval()


@pytest.fixture(scope="module")
def convolutional(data):
    model = build_lenet("lenet5", (1, 8, 8), 10, seed=0)
    fit(model, *data.train, epochs=3, lr=0.003, seed=0)
    return model.eval()


class Viewing(nn.Module):
    """Takes a view of its last images, whose channels then cannot lie together."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, 8, 3), nn.Linear(288, 10)

    def forward(self, x):
        x = self.conv(x).relu()
        return self.linear(x.view(x.size(0), -1))


@pytest.mark.parametrize("method", ["int8", "dfq", "lsq4", "prune"])
def test_a_network_that_takes_views_is_compressed(data, method):
    made = compress(Viewing(), data, method=method, epochs=None if method in ("int8", "dfq") else 1)
    assert 0 <= made.after.accuracy <= 1
    assert made.after.bytes < made.before.bytes


def weights(model):
    return {name: p.detach().clone() for name, p in model.state_dict().items()}


# --- recipes ---


@pytest.mark.parametrize(
    ("method", "bits", "full", "weight", "activation", "edges"),
    [
        ("int8", None, "int8", "int8", "int8", None),
        ("int", 5, "int5", "int5", "int5", None),
        ("int4_channel", None, "int4_channel", "int4_channel", "int4", None),
        ("lsq", 3, "lsq3", "lsq3", "lsq3", ("int8", "int8")),
        ("lsq", None, "lsq2", "lsq2", "lsq2", ("int8", "int8")),
        ("rq_st2", None, "rq_st2", "rq_st2", "rq_st2", ("int8", "int8")),
        ("twn", None, "twn", "twn", "int8", ("int8", "int8")),
        ("naq5", None, "naq5", "naq5", "int8", ("int8", "int8")),
        ("xnor", None, "xnor", "xnor", "xnor", ("int8", "int8")),
        ("hwgq2", None, "hwgq2", "xnor", "hwgq2", ("int8", "int8")),
        (" prune + twn + huffman ", None, "prune+twn+huffman", "twn", "int8", ("int8", "int8")),
        ("prune", None, "prune", None, None, None),
    ],
)
def test_a_method_names_its_quantizers(method, bits, full, weight, activation, edges):
    found = recipe(method, bits=bits)
    assert (found.method, found.weight, found.activation, found.edges) == (full, weight, activation, edges)


def test_what_else_a_recipe_holds():
    deep = recipe("prune+share+huffman", bits=3, sparsity=0.95)
    assert (deep.steps, deep.bits, deep.sparsity, deep.coding) == (("prune", "share", "huffman"), 3, 0.95, "auto")
    assert (recipe("prune").sparsity, recipe("prune").coding, recipe("prune").bits) == (0.9, "sparse", None)
    assert (recipe("share").bits, recipe("dfq").bits, recipe("dfq", bits=6).bits) == (4, 8, 6)
    assert (recipe("twn").coding, recipe("twn").sparsity) == ("packed", None)
    assert recipe("prune").rate("prune") == 2e-3
    assert recipe("prune", lr=0.01).rate("prune") == 0.01
    assert (recipe("lsq2").rate("quantize"), recipe("bnn").rate("quantize")) == (1e-3, 2e-3)


@pytest.mark.parametrize(
    ("method", "epochs", "expected"),
    [
        ("int8", None, {"quantize": 0}),
        ("int4", None, {"quantize": 10}),  # 1,000 batches are more than 4 epochs of 100
        ("lsq2", 3, {"quantize": 3}),
        ("prune", None, {"prune": 30}),
        ("prune+share+huffman", 12, {"prune": 12, "share": 2}),
        ("prune+int8", 1, {"prune": 1, "quantize": 1}),
        ("dfq", None, {}),
    ],
)
def test_epochs_of_each_step(method, epochs, expected):
    assert recipe(method, epochs=epochs).schedule(10_000, 100) == expected
    assert recipe("lsq2").schedule(1_000_000, 100) == {"quantize": 4}


def test_every_method_has_a_recipe():
    for name in method_names():
        if name != "huffman":
            assert recipe(name).method == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "lsq9"}, "unknown step of a method 'lsq9': did you mean 'lsq"),
        ({"method": "LSQ2"}, "unknown step of a method 'LSQ2': did you mean 'lsq2'"),
        ({"method": "prune++twn"}, r"method is 'prune\+\+twn' but must name a step, or several"),
        ({"method": "twn+prune"}, "has prune after quantize: prune first"),
        ({"method": "share+lsq2"}, "has quantize after share"),
        ({"method": "prune+dfq"}, "dfq comes alone or before huffman"),
        ({"method": "huffman"}, "alone changes nothing"),
        ({"method": "huffman+prune"}, "has prune after huffman"),
        ({"method": "prune+bnn"}, "'bnn' turns 0 into other weights"),
        ({"method": "prune+dorefa2"}, "'dorefa2' turns 0 into other weights"),
        ({"method": "prune+hwgq2"}, "'hwgq2' turns 0 into other weights"),
        ({"method": "float+huffman"}, "has huffman after float"),
        ({"method": "float", "epochs": 0}, "epochs is 0 but method 'float' takes 1 or more"),
        ({"method": "twn", "bits": 2}, "bits is 2 but method 'twn' leaves no choice of bits"),
        ({"method": "twn", "sparsity": 0.5}, "sparsity is 0.5 but method 'twn' prunes nothing"),
        ({"method": "prune", "sparsity": 1.0}, "sparsity is 1.0 but must be above 0 and below 1"),
        ({"method": "prune", "epochs": 0}, "epochs is 0 but method 'prune' takes 1 or more"),
        ({"method": "dfq", "epochs": 1}, "epochs is 1 but method 'dfq' takes none"),
        ({"method": "lsq2", "epochs": 0}, "'lsq2' learns its levels in training"),
        ({"method": "twn", "distill": 1.5}, "distill is 1.5 but must be a share"),
    ],
)
def test_recipes_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        recipe(**arguments)


@pytest.mark.parametrize("name", quantizer_names())
def test_only_quantizers_that_keep_zeros_follow_pruning(name):
    if name == "float":
        return
    weights = torch.randn(1, 200, generator=torch.Generator().manual_seed(0))
    weights[:, ::4] = 0
    layer = QuantizedLinear(200, 1, weight=name)
    with torch.no_grad():
        layer.weight.copy_(weights)
    layer.weight_quantizer.fit(layer.weight)
    if layer.eval().quantized_weight()[weights == 0].any():
        with pytest.raises(ValueError, match=f"prunes weights to 0 but '{name}' turns 0 into other weights"):
            recipe(f"prune+{name}")
    else:
        assert recipe(f"prune+{name}").weight == name


# --- what a step does to a model ---


def test_pruning_keeps_the_largest_share_and_trains_the_rest(data, dense):
    small = carry_out(recipe("prune", sparsity=0.95, epochs=10), dense, *data.train, batch_size=50)
    found = sparsity(small)
    assert found.weights - found.nonzero == round(0.95 * found.weights)
    assert not any(hasattr(layer, "parametrizations") for layer in small)
    once = np.sort(np.concatenate([p.detach().abs().flatten() for n, p in dense.named_parameters() if "weight" in n]))
    cut = once[round(0.95 * found.weights) - 1]
    one_shot = copy.deepcopy(dense)
    with torch.no_grad():
        for name, p in one_shot.named_parameters():
            if "weight" in name:
                p.mul_(p.abs() > float(cut))
    assert evaluate(small, *data.test).accuracy > evaluate(one_shot, *data.test).accuracy + 0.1


def test_shared_weights_are_few_values_and_zeros_stay(data, dense):
    small = carry_out(recipe("prune+share", bits=2, sparsity=0.5, epochs=6), dense, *data.train, batch_size=50)
    assert sparsity(small).fraction == pytest.approx(0.5, abs=1e-4)
    for layer in small:
        if isinstance(layer, nn.Linear):
            values = layer.weight.unique()
            assert len(values[values != 0]) == 4
            assert isinstance(layer.weight, nn.Parameter)


def test_quantizing_after_pruning_leaves_no_pruned_weight(data, dense):
    pruned = carry_out(recipe("prune", sparsity=0.7, epochs=6), dense, *data.train, batch_size=50)
    small = carry_out(recipe("prune+int4", sparsity=0.7, epochs=6), dense, *data.train, batch_size=50)
    for name in ("fc1", "fc2", "fc3"):
        before, after = pruned.get_submodule(name), small.get_submodule(name)
        assert isinstance(after, QuantizedLinear)
        assert after.weight_quantizer.name == "int4"
        assert not after.quantized_weight()[before.weight == 0].any()
        assert not torch.equal(before.weight, after.weight)


def test_layers_of_a_quantized_model(data, convolutional):
    small = carry_out(recipe("dorefa2", epochs=1), convolutional, *data.train)
    layers = [m for m in small.modules() if isinstance(m, QuantizedConv2d | QuantizedLinear)]
    names = [(m.weight_quantizer.name, m.activation_quantizer.name) for m in layers]
    assert names == [("int8", "int8"), ("dorefa2", "dorefa2"), ("dorefa2", "dorefa2"), ("int8", "int8")]
    assert not small.training
    whole = carry_out(recipe("dorefa2", epochs=1), convolutional, *data.train, skip=("fc1",))
    assert type(whole.get_submodule("fc1")) is nn.Linear


def test_float_is_trained_on_as_quantizers_are(data, dense):
    trained = carry_out(recipe("float", epochs=2), dense, *data.train, batch_size=50, seed=3)
    assert type(trained.fc1) is nn.Linear
    unrounded = replace(recipe("lsq2", epochs=2), weight="float", activation="float", edges=None)
    expected = carry_out(unrounded, dense, *data.train, batch_size=50, seed=3)
    assert isinstance(expected.fc1, QuantizedLinear)
    assert all(torch.equal(p, trained.state_dict()[name]) for name, p in weights(expected).items())
    assert not torch.equal(trained.fc1.weight, dense.fc1.weight)
    for n_images in (10_000, 1_000_000):
        schedules = [recipe(method).schedule(n_images, 100) for method in ("float", "lsq2")]
        assert list(schedules[0].values()) == list(schedules[1].values())
    assert recipe("float").rate("float") == recipe("lsq2").rate("quantize")


@pytest.mark.parametrize("method", ["prune+lsq4", "prune+rq4", "prune+lsq2"])
def test_steps_of_pruned_weights_start_from_those_that_are_left(method, data, dense):
    pruned = carry_out(recipe("prune", sparsity=0.9, epochs=6), dense, *data.train, batch_size=50)
    layer = structure(pruned, recipe(method, sparsity=0.9, epochs=6)).fc2
    left = layer.weight.detach()[layer.weight != 0]
    assert len(left) < 0.3 * layer.weight.numel()
    grid = torch.tensor(layer.weight_quantizer.grid)

    def error(step):
        return (left[:, None] - step * grid).abs().amin(1).square().sum()

    steps = torch.linspace(0.001, 1, 2000) * left.abs().max()
    found = error(layer.weight_quantizer.step.detach())
    assert found <= 1.03 * min(error(step) for step in steps)
    assert found < 0.5 * error(2 * layer.weight.detach().abs().mean() / grid[-1] ** 0.5)


@pytest.mark.parametrize("method", ["lsq2", "rq_st2", "dorefa2", "hwgq2", "lq2", "dorefa1"])
def test_negative_inputs_are_not_lost_silently(method, data):
    def build(activation):
        layers = nn.Conv2d(1, 4, 3), activation, nn.Conv2d(4, 4, 3), activation, nn.Flatten(), nn.Linear(64, 10)
        return nn.Sequential(*layers)

    for activation in (nn.Tanh(), nn.LeakyReLU()):
        with pytest.raises(ValueError, match=rf"layer '2' go down to -.*'{method}' has no level below 0"):
            carry_out(recipe(method, epochs=1), build(activation), *data.train)
    small = carry_out(recipe(method, epochs=1), build(nn.ReLU()), *data.train)
    assert small[2].activation_quantizer.name == method
    assert type(carry_out(recipe(method, epochs=1), build(nn.Tanh()), *data.train, skip=("2",))[2]) is nn.Conv2d


def test_signs_see_negative_numbers(data, convolutional):
    small = structure(convolutional, recipe("bnn"))
    assert [type(small.get_submodule(name)) for name in ("act1", "act2", "act3")] == [nn.Hardtanh] * 3
    assert isinstance(convolutional.get_submodule("act1"), nn.ReLU)

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)

        def forward(self, x):
            return self.three(torch.relu(self.two(torch.relu(self.one(x.flatten(1))))))

    with pytest.raises(ValueError, match=r"the inputs of layer 'two' are 0 or more, so that all their signs would be"):
        carry_out(recipe("xnor", epochs=1), Hidden(), *data.train)


def test_the_float_model_stays_as_it_is_and_so_does_the_generator(data, dense):
    before, state = weights(dense), torch.get_rng_state()
    for method in ("int8", "rq4", "prune+share"):
        carry_out(recipe(method, epochs=0 if method == "int8" else 1), dense, *data.train)
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert dense.drop1.p == 0.25


@pytest.mark.parametrize("method", ["rq4", "prune+share"])
def test_the_seed_decides(method, data, dense):
    chosen = recipe(method, epochs=1)
    one, same, other = (weights(carry_out(chosen, dense, *data.train, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["fc1.weight"], other["fc1.weight"])


def test_norms_behind_noisy_layers_hold_the_statistics_of_rounded_ones(data, convolutional):
    noisy = carry_out(recipe("rq_st2", epochs=1), convolutional, *data.train, batch_size=50)
    found = noisy.norm2.running_mean.clone()
    noisy.norm1.train()  # as in training, a batch is normalized by itself
    noisy.norm1.momentum = 0.0
    with torch.no_grad():
        means = []
        for batch in data.train.images.split(50):
            hidden = noisy.act1(noisy.norm1(noisy.pool1(noisy.conv1(batch))))
            means.append(noisy.pool2(noisy.conv2(hidden)).mean((0, 2, 3)))
    torch.testing.assert_close(found, torch.stack(means).mean(0), rtol=1e-4, atol=1e-4)
    # With the noise they are others, and so is the network.
    noisy.conv2.train()
    with torch.no_grad():
        drawn = noisy.pool2(noisy.conv2(hidden)).mean((0, 2, 3))
    assert (drawn - means[-1]).abs().max() > 100 * (found - torch.stack(means).mean(0)).abs().max()


def test_no_unit_is_left_out_while_a_compressed_model_learns(data, dense):
    seen = []

    class Watched(nn.Dropout):
        def forward(self, x):
            seen.append((self.training, self.p))
            return super().forward(x)

    model = copy.deepcopy(dense)
    model.drop1 = Watched(0.5)
    small = carry_out(recipe("prune", epochs=1), model, *data.train)
    assert (True, 0.0) in seen
    assert (True, 0.5) not in seen
    assert small.drop1.p == 0.5


def test_distillation_is_hintons_loss():
    generator = np.random.default_rng(0)
    scores, teacher = generator.normal(size=(2, 6, 5))
    labels = generator.integers(0, 5, 6)

    def softmax(z):
        e = np.exp(z - z.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p, q = softmax(teacher / 3), softmax(scores / 3)
    soft = 9 * (p * np.log(p / q)).sum(1).mean()
    hard = -np.log(softmax(scores)[np.arange(6), labels]).mean()
    targets = torch.from_numpy(np.concatenate([teacher, np.eye(5)[labels]], 1))
    ours = torch.from_numpy(scores).requires_grad_()
    loss = _distilled(ours, targets, share=0.7)
    assert loss.item() == pytest.approx(0.7 * soft + 0.3 * hard, rel=1e-12)
    loss.backward()
    # T^2 times the gradient (q - p) / T of the divergence, and that of cross-entropy.
    expected = (0.7 * 3 * (q - p) + 0.3 * (softmax(scores) - np.eye(5)[labels])) / 6
    np.testing.assert_allclose(ours.grad.numpy(), expected, atol=1e-12)


def test_the_float_models_scores_teach(data, dense):
    """With labels that say nothing, only the float model's scores can be learned from."""
    nonsense = torch.zeros_like(data.train.labels)
    taught, misled = (
        carry_out(recipe("int4", epochs=15, distill=share), dense, data.train.images, nonsense) for share in (1.0, 0.0)
    )
    assert evaluate(taught, *data.test).accuracy > 0.8
    assert evaluate(misled, *data.test).accuracy < 0.3


def test_progress_is_told_step_by_step(data, dense):
    told = []
    carry_out(recipe("prune+share", epochs=12), dense, *data.train, progress=lambda *a: told.append(a))
    assert [a[:3] for a in told] == [("prune", n, 12) for n in range(1, 13)] + [("share", n, 2) for n in (1, 2)]
    assert all(math.isfinite(a[3]) for a in told)


# --- compress() and its file ---


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("int8", {}),
        ("dfq", {}),
        ("lq2", FEW),
        ("twn", FEW),
        ("ttq", FEW),
        ("lsq2", FEW),
        ("xnor", FEW),
        ("prune", FEW | {"sparsity": 0.9}),
        ("prune+share+huffman", FEW | {"sparsity": 0.9, "bits": 3}),
    ],
)
def test_the_file_is_the_model(method, options, data, convolutional, tmp_path):
    made = compress(convolutional, data, method=method, **options)
    path = tmp_path / "model"
    made.save(path)
    assert path.stat().st_size == made.after.bytes == sizes(path).bytes
    network = build_lenet("lenet5", (1, 8, 8), 10, seed=9)
    loaded = load_compressed(path, network, recipe(method, **{k: v for k, v in options.items() if k != "batch_size"}))
    x = data.test.images
    assert torch.equal(loaded(x), made.model(x))
    assert made.after.accuracy == evaluate(loaded, *data.test).accuracy
    assert made.after.validation == evaluate(loaded, *data.validation).accuracy
    assert made.ratio == made.before.bytes / made.after.bytes > 3.5
    assert made.after.joules < made.before.joules
    assert str(made) == comparison(made.before, made.after)


def test_data_free_quantization_knows_the_input_range_and_reports(data, convolutional):
    made = compress(convolutional, data, method="dfq")
    quantized = made.model.conv1.activation_quantizer
    assert (float(quantized.low), float(quantized.high)) == (
        float(data.train.images.min()),
        float(data.train.images.max()),
    )
    ranges = {entry.layers: entry.done for entry in made.report.entries if entry.step == "range"}
    assert ranges.keys() == {"conv1", "conv2", "fc1", "fc2"}
    assert ranges["conv1"]
    assert any(entry.step == "fold" for entry in made.report.entries)
    assert compress(convolutional, data, method="int8").report is None


def test_biases_are_rounded_for_the_smallest_file_and_measured_so(data, dense):
    plain, small = (compress(dense, data, method=m, bits=3, **FEW) for m in ("share", "share+huffman"))
    assert not torch.equal(plain.model.fc1.bias, small.model.fc1.bias)
    assert len(small.model.fc1.bias.unique()) <= 255
    assert plain.after.bytes > small.after.bytes + 3 * 400  # 410 biases of 4 bytes and of 1


def test_measures_against_hand_counts(data):
    model = LeNet300((1, 8, 8))
    with torch.no_grad():
        model.fc1.weight.view(-1)[: 64 * 150] = 0
    found = measure(model, data, 1000)
    sizes_of = [(64, 300), (300, 100), (100, 10)]
    macs = [n * m for n, m in sizes_of]
    macs[0] -= 64 * 150
    assert found.macs == {"fp32*fp32": sum(macs)}
    products = sum(macs) * 32 * 32
    sums = sum(n * m * (64 + math.log2(n)) for n, m in sizes_of)
    assert found.bops == pytest.approx(products + sums, rel=1e-12)
    assert (found.bytes, found.n_test, found.n_validation) == (1000, 200, 100)
    energy = Counter({"mac:fp32*fp32": sum(macs), "cmp:fp32": 400, "weight_bits": 8000})
    energy["activation_bits"] = 32 * (300 + 300 + 100 + 100 + 10)
    expected = sum(n * HOROWITZ_45NM[key].typical for key, n in energy.items())
    assert found.joules == pytest.approx(expected, rel=1e-12)
    assert found.low < found.joules < found.high


def test_the_table_says_what_was_measured(data, dense):
    before = measure(dense, data, 100_000)
    after = replace(before, accuracy=before.accuracy - 0.015, bytes=8_000, macs={"int8*int8": 7}, joules=1.25e-9)
    lines = comparison(before, after).splitlines()
    assert lines[1].startswith("test accuracy (200 images)")
    assert lines[1].endswith("-1.50 points")
    assert "100,000 B" in lines[2]
    assert "8,000 B" in lines[2]
    assert lines[2].endswith("12.5 times less")
    assert lines[4].split()[-2:] == ["fp32*fp32", "int8*int8"]
    assert joules(1.25e-9) in lines[6]


def test_a_model_that_no_method_can_change(data):
    with pytest.raises(ValueError, match="to quantize"):
        compress(nn.Sequential(nn.Flatten(), nn.ReLU()), data)
