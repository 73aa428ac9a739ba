import copy
import io
from math import sqrt

import numpy as np
import pytest
import torch
from bits import network, numbers
from torch import nn

import qconv
from qconv.binarization import Ensemble, MeanProbabilities, binarize, ensemble, reestimate
from qconv.binary_modules import BinaryActivation, PixelBits, ProbabilisticMaxPool2d
from qconv.deformed import QuantumDeformedLinear
from qconv.energy import count
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear


@pytest.mark.parametrize("mode", ["map", "ternary", "sample"])
def test_binarized_networks_are_networks_of_bits(mode):
    model = network().eval()
    reestimate(model, [torch.rand(64, 1, 8, 8)])
    theta = [torch.tanh(layer.weight.detach()) for layer in (model[1], model[3])]
    before = copy.deepcopy(model.state_dict())
    small = binarize(model, mode, torch.Generator().manual_seed(1))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    weights = [layer.theta() for layer in (small[1], small[3])]
    for bits, mean in zip(weights, theta, strict=True):
        assert set(bits.unique().tolist()) <= ({-1.0, 0.0, 1.0} if mode == "ternary" else {-1.0, 1.0})
        if mode == "map":
            assert torch.equal(bits, mean.sign())
        if mode == "ternary":
            assert torch.equal(bits, mean.sign() * ((1 + mean.abs()) / 2 >= 0.75))
    x = torch.rand(5, 1, 8, 8)
    # The same in plain torch: sums, running statistics, signs.
    a = nn.functional.conv2d(2 * x - 1, weights[0], stride=2)
    norm = small[1].norm
    a = nn.functional.batch_norm(a, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    assert torch.equal(small[:2](x), torch.where(a >= 0, 1.0, -1.0))
    norm = small[3].norm
    b = torch.where(a >= 0, 1.0, -1.0).flatten(1) @ weights[1].T
    b = nn.functional.batch_norm(b, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    torch.testing.assert_close(small(x), b)
    keys = [k for k in count(small, (1, 8, 8)).macs() if not k.startswith(("binary", "ternary"))]
    assert not keys


def test_drawn_weights_have_their_means():
    model = nn.Sequential(ProbabilisticBinaryLinear(20000, 1))
    with torch.no_grad():
        model[0].weight.fill_(0.5)
    bits = binarize(model, "sample", torch.Generator().manual_seed(0))[0].theta()
    p = np.tanh(0.5)
    assert abs(bits.mean().item() - p) < 5 * sqrt((1 - p**2) / 20000)


def test_ensemble_averages_probabilities():
    model = network().eval()
    x = torch.rand(4, 1, 8, 8)
    together = ensemble(model, 3, torch.Generator().manual_seed(0))
    assert len({member[1].weight.sum().item() for member in together.members}) == 3
    want = torch.stack([torch.softmax(member(x), -1) for member in together.members]).mean(0)
    torch.testing.assert_close(together(x).exp(), want)


def test_what_an_ensemble_costs():
    together = ensemble(network().eval(), 3, torch.Generator().manual_seed(0))
    rows = count(together, (1, 8, 8)).rows
    assert [row.name for row in rows] == [f"members.{k}.{i}" for k in range(3) for i in range(4)] + ["average"]
    single = count(together.members[0], (1, 8, 8))
    for k in range(3):
        assert [row.operations for row in rows[4 * k : 4 * k + 4]] == [row.operations for row in single.rows]
    assert rows[-1].input_shape == rows[-1].output_shape == (3,)
    # By hand, of 3 members and 3 classes: softmax's largest, differences, exponentials, sums, logarithms, differences;
    # then over members the same, and the largest is added back, less log n.
    exponentials, logarithms = 3 * 3 + 3 * 3, 3 + 3
    assert rows[-1].operations == {
        "mul:fp32": 10 * exponentials + 14 * logarithms,
        "add:fp32": 10 * exponentials + 13 * logarithms + 3 * (3 + 2 + 3) + 3 * (3 + 2 + 1 + 1),
        "cmp:fp32": logarithms + 3 * 2 + 3 * 2,
        "units": 3,
        "activation_bits": 96,
    }
    assert MeanProbabilities(5).counts((10,))["units"] == 10


def test_norms_of_all_members_are_reestimated():
    together = ensemble(network().eval(), 2, torch.Generator().manual_seed(0))
    batches = [torch.rand(16, 1, 8, 8) for _ in range(3)]
    alone = copy.deepcopy(together.members[1])
    reestimate(together, batches)
    reestimate(alone, batches)
    assert torch.equal(together.members[1][1].norm.running_var, alone[1].norm.running_var)
    assert not torch.equal(together.members[0][1].norm.running_var, alone[1].norm.running_var)


def test_what_a_binary_network_is_built_of_is_public():
    made = (BinaryActivation, PixelBits, ProbabilisticMaxPool2d, Ensemble, binarize, ensemble, reestimate)
    for name in made:
        assert getattr(qconv, name.__name__) is name
        assert name.__name__ in qconv.__all__
    assert {"Moments", "StochasticBatchNorm1d", "StochasticBatchNorm2d"} <= set(qconv.__all__)


def test_reestimated_statistics_are_plain_averages():
    model = network().eval()
    drawn_model = binarize(model, "sample", torch.Generator().manual_seed(0))
    weights = {k: v.clone() for k, v in drawn_model.state_dict().items() if "running" not in k and "tracked" not in k}
    batches = [torch.rand(16, 1, 8, 8) for _ in range(3)]
    reestimate(drawn_model, batches)
    a = [nn.functional.conv2d(2 * x - 1, drawn_model[1].theta(), stride=2) for x in batches]
    norm = drawn_model[1].norm
    torch.testing.assert_close(norm.running_mean, torch.stack([t.mean((0, 2, 3)) for t in a]).mean(0))
    variances = [t.transpose(0, 1).flatten(1).var(1) for t in a]
    torch.testing.assert_close(norm.running_var, torch.stack(variances).mean(0))
    assert not any(m.training for m in drawn_model.modules())
    assert norm.momentum == 0.1
    assert all(torch.equal(drawn_model.state_dict()[k], v) for k, v in weights.items())


def test_torchs_norms_are_reestimated_too():
    model = nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.BatchNorm1d(4, track_running_stats=False)
    )
    batches = [torch.rand(8, 3) for _ in range(5)]
    reestimate(model, batches)
    hidden = torch.stack([model[0](batch) for batch in batches])
    torch.testing.assert_close(model[1].running_mean, hidden.mean((0, 1)))
    torch.testing.assert_close(model[1].running_var, hidden.var(1).mean(0))
    with pytest.raises(ValueError, match="0 batch norms with running statistics"):
        reestimate(model[2:], batches)


@pytest.mark.parametrize("mode", ["map", "ternary", "sample"])
def test_a_hard_networks_state_makes_another_network_hard(mode):
    soft = network().eval()
    hard = binarize(soft, mode, torch.Generator().manual_seed(0))
    x = torch.rand(5, 1, 8, 8)
    assert not torch.equal(hard[:2](x), soft[:2](x))
    stream = io.BytesIO()
    torch.save(hard.state_dict(), stream)
    stream.seek(0)
    fresh = network().eval()
    state = torch.load(stream)
    kept = dict(state)
    fresh.load_state_dict(state)
    assert state.keys() == kept.keys()
    assert torch.equal(fresh(x), hard(x))
    assert not any(layer.weight.requires_grad for layer in (fresh[1], fresh[3]))
    assert count(fresh, (1, 8, 8)).operations == count(hard, (1, 8, 8)).operations
    # The soft state has no such entries, and loading it releases the weights.
    assert not [key for key in soft.state_dict() if key.endswith(("hard", "bits_in"))]
    fresh.load_state_dict(soft.state_dict())
    assert torch.equal(fresh(x), soft(x))
    assert fresh[1].weight.requires_grad
    # A layer alone, and by assignment to one without memory.
    alone = ProbabilisticBinaryConv2d(1, 4, 3, stride=2, device="meta").eval()
    alone.load_state_dict(hard[1].state_dict(), assign=True)
    assert torch.equal(alone(2 * x - 1), hard[:2](x))
    # Some entries alone say nothing of the others.
    hard.load_state_dict({"1.norm.bias": torch.ones(4)}, strict=False)
    assert hard[1].hard
    with pytest.raises(RuntimeError, match="deformation is 'pair'"):
        QuantumDeformedLinear(36, 3, output="mean").load_state_dict(hard[3].state_dict(), strict=False)


def test_drawing_new_weights_makes_a_layer_soft():
    layer = ProbabilisticBinaryLinear(6, 4, bias=True, norm=False)
    h = numbers(3, 6, dtype=torch.float32)
    for restart in (layer.reset_parameters, lambda: layer.init_from(torch.randn(4, 6))):
        layer.binarize_("map")
        assert set(layer(h).flatten().tolist()) <= {-1.0, 1.0}
        assert not layer.bias.requires_grad
        restart()
        assert layer.weight.requires_grad
        assert layer.bias.requires_grad
        assert layer(h).abs().max() < 1


def test_what_a_hard_network_costs():
    model = nn.Sequential(
        PixelBits(),
        ProbabilisticBinaryConv2d(1, 4, 3),
        ProbabilisticBinaryConv2d(4, 4, 3, padding=1, output="moments"),
        ProbabilisticMaxPool2d(2),
        BinaryActivation(),
        nn.Flatten(),
        ProbabilisticBinaryLinear(36, 5),
        ProbabilisticBinaryLinear(5, 3, output="mean"),
    )
    rows = {row.name: row.operations for row in count(binarize(model), (1, 8, 8)).rows}
    # Pixels are real, hidden units are bits, and with padding they may be 0.
    assert rows["1"]["mac:binary*fp32"] == 4 * 36 * 9
    assert rows["2"]["mac:binary*ternary"] == 4 * 36 * 36
    assert rows["6"]["mac:binary*binary"] == 36 * 5
    assert rows["7"]["mac:binary*binary"] == 5 * 3
    assert sum(key.startswith("mac") for row in rows.values() for key in row) == 4
    # A sign is one bit; sums are not.
    assert [rows[k]["activation_bits"] for k in "167"] == [4 * 36, 5, 32 * 3]
    assert rows["2"]["activation_bits"] == 2 * 32 * 4 * 36
    # Behind sums that nothing made bits of, inputs are numbers.
    sums = nn.Sequential(ProbabilisticBinaryLinear(6, 5, output="mean"), nn.Tanh(), ProbabilisticBinaryLinear(5, 3))
    assert count(binarize(sums), (6,)).macs() == {"binary*fp32": 6 * 5 + 5 * 3}


def test_failing_batches_leave_the_statistics():
    model = network()
    reestimate(model, [torch.rand(8, 1, 8, 8)])
    before = copy.deepcopy(model.state_dict())

    def breaks_at(n):
        for _ in range(n):
            yield torch.rand(8, 1, 8, 8)
        raise OSError("disk")

    for n in (0, 1):
        with pytest.raises(OSError, match="disk"):
            reestimate(model, breaks_at(n))
        with pytest.raises(ValueError, match="input channels"):
            reestimate(model, [torch.rand(8, 1, 8, 8)] * n + [torch.rand(8, 2, 8, 8)])
        with pytest.raises(ValueError, match="batches are empty"):
            reestimate(model, [])
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert model[1].norm.momentum == 0.1


def test_batches_may_come_with_labels():
    batches = [torch.rand(8, 1, 8, 8) for _ in range(3)]
    models = [network() for _ in range(3)]
    labels = torch.zeros(8)
    for model, given in zip(
        models, (batches, [(x, labels) for x in batches], [[x, labels] for x in batches]), strict=True
    ):
        reestimate(model, given)
    for model in models[1:]:
        assert torch.equal(model[1].norm.running_var, models[0][1].norm.running_var)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: binarize(network(), "nearest"), "nearest"),
        (lambda: binarize(nn.Linear(2, 2)), "0 probabilistic binary layers"),
        (lambda: reestimate(nn.Linear(2, 2), []), "0 batch norms with running statistics"),
        (lambda: reestimate(network(), []), "batches are empty"),
        (lambda: ensemble(network(), 0), "n is 0"),
        (lambda: Ensemble([]), "members are empty"),
    ],
)
def test_errors_say_both_values(make, says):
    with pytest.raises(ValueError) as error:
        make()
    assert says in str(error.value)
