import pytest
import torch

from qconv.energy.count import count
from qconv.models import ARMS, arm, build_model

EIGHT, LARGE = (1, 8, 8), (1, 28, 28)


@pytest.mark.parametrize("name", ARMS)
@pytest.mark.parametrize(("shape", "slot_size"), [(EIGHT, 7), (LARGE, 14)])
def test_every_arm_fills_the_slot_of_both_image_sizes(name, shape, slot_size):
    model = build_model(name, shape, 10, seed=0)
    images = torch.rand(3, *shape)
    assert model.slot(images).shape == (3, 4, slot_size, slot_size)
    assert model(images).shape == (3, 10)
    torch.testing.assert_close(model.after_slot(model.slot(images)), model(images))


def test_arms_differ_in_the_slot_alone():
    states = [build_model(name, EIGHT, 10, seed=3).state_dict() for name in ARMS]
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


@pytest.mark.parametrize("name", ARMS)
def test_what_each_arm_trains_in_its_slot(name):
    trained = {n for n, p in build_model(name, EIGHT, 10, seed=0).slot.named_parameters() if p.requires_grad}
    assert trained == ({"bias"} if name.startswith("random_") else {"weight", "bias"})


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
