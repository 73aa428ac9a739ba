import pytest
import torch

from qconv.energy.count import count
from qconv.models import ARMS, DEFAULT_ARMS, arm, build_model, check_comparable
from qconv.networks import NETWORKS

EIGHT, LARGE = (1, 8, 8), (1, 28, 28)
SLOTS = [name for name in ARMS if name not in NETWORKS]
BINARY = {"1.weight", "1.norm.weight", "1.norm.bias"}
TRAINED = {"probabilistic_binary": BINARY, "deformed": BINARY | {"1.angle", "1.offset"}}


@pytest.mark.parametrize("name", SLOTS)
@pytest.mark.parametrize(("shape", "slot_size"), [(EIGHT, 7), (LARGE, 14)])
def test_every_arm_fills_the_slot_of_both_image_sizes(name, shape, slot_size):
    model = build_model(name, shape, 10, seed=0)
    images = torch.rand(3, *shape)
    assert model.slot(images).shape == (3, 4, slot_size, slot_size)
    assert model(images).shape == (3, 10)
    torch.testing.assert_close(model.after_slot(model.slot(images)), model(images))


def test_arms_of_a_comparison_that_names_none():
    assert len(DEFAULT_ARMS) == 10
    assert set(DEFAULT_ARMS) < set(SLOTS)
    assert [name for name in ARMS if ARMS[name].whole] == list(NETWORKS)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("shape", [EIGHT, LARGE])
def test_a_whole_network_is_all_slot(name, shape):
    model = build_model(name, shape, 10, seed=0).eval()
    images = torch.rand(3, *shape)
    scores = model(images)
    assert scores.shape == (3, 10)
    assert torch.equal(model.after_slot(model.slot(images)), scores)
    assert all(key.startswith("slot.") for key in model.state_dict())
    rows = count(model, shape).rows
    assert rows
    assert {row.name.split(".")[0] for row in rows} == {"slot"}


def test_arms_of_two_kinds_are_not_compared():
    check_comparable(["float", "deformed", "tn_eps"])
    check_comparable(["a_pbnn", "mps"])
    with pytest.raises(ValueError, match="float and tn_mps fill the slot of one small network but a_pbnn is a whole"):
        check_comparable(["float", "a_pbnn", "tn_mps"])


def test_arms_differ_in_the_slot_alone():
    states = [build_model(name, EIGHT, 10, seed=3).state_dict() for name in SLOTS]
    for key in ("conv.weight", "conv.bias", "head.weight", "head.bias"):
        assert all(torch.equal(state[key], states[0][key]) for state in states)


@pytest.mark.parametrize("name", ARMS)
def test_initial_weights_come_from_the_seed_alone(name):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one = build_model(name, EIGHT, 10, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    two, other = build_model(name, EIGHT, 10, seed=5), build_model(name, EIGHT, 10, seed=6)
    x = torch.rand(2, *EIGHT)
    assert torch.equal(one.eval()(x), two.eval()(x))
    assert not torch.equal(one.slot(x), other.eval().slot(x))


@pytest.mark.parametrize("name", SLOTS)
def test_what_each_arm_trains_in_its_slot(name):
    trained = {n for n, p in build_model(name, EIGHT, 10, seed=0).slot.named_parameters() if p.requires_grad}
    assert trained == TRAINED.get(name, {"bias"} if name.startswith("random_") else {"weight", "bias"})


def test_stochastic_bits_read_pixels_as_probabilities():
    slot = build_model("probabilistic_binary", EIGHT, 10, seed=0).slot.eval()
    images = torch.rand(2, *EIGHT)
    theta = torch.tanh(slot[1].weight)
    h = 2 * images - 1
    mean = torch.nn.functional.conv2d(h, theta)
    variance = 4 - torch.nn.functional.conv2d(h**2, theta**2)
    # Fresh running statistics: mean 0, variance 1.
    expected = torch.erf(mean / torch.sqrt(2 * variance))
    torch.testing.assert_close(slot(images), expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("float", "mac:fp32*fp32"),
        ("int8", "mac:int8*int8"),
        ("ternary", "mac:ternary*int8"),
        ("binary", "mac:binary*int8"),
    ],
)
def test_conventional_arms_multiply_in_the_formats_of_their_names(name, key):
    slot = count(build_model(name, EIGHT, 10, seed=0), EIGHT).rows[0]
    assert slot.name == "slot"
    assert {k: n for k, n in slot.operations.items() if k.startswith("mac:")} == {key: 7 * 7 * 4 * 4}


def test_only_arms_with_a_circuit_need_a_quantum_device():
    for name, its_arm in ARMS.items():
        operations = count(build_model(name, EIGHT, 10, seed=0), EIGHT).operations
        assert ("device:circuits" in operations) == (its_arm.kernel is not None)
        assert (its_arm.family == "quantum") <= ("device:gates_2q" in operations)


def test_unknown_arm_names_the_nearest():
    with pytest.raises(ValueError, match="unknown arm 'heisenburg': did you mean 'heisenberg'"):
        arm("heisenburg")


@pytest.mark.parametrize("shape", [(1, 8, 9), (1, 4, 4)])
def test_images_that_the_network_cannot_take(shape):
    with pytest.raises(ValueError, match=f"these are {shape[1]}x{shape[2]}"):
        build_model("float", shape, 10, seed=0)
