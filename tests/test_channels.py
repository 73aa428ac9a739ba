import copy
import io
from itertools import pairwise

import pytest
import torch
from torch import nn

from circuits import channel_overwrite, encode, kernel, without_entanglement
from qconv import QuantumConv2d, load_backend
from qconv.backends.protocol import Unsupported
from qconv.channels import CHANNELS
from qconv.energy import count, estimate
from qconv.testing import check_layer


def images(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer_of(channels, *sizes, **options):
    torch.manual_seed(0)
    name = "smaldone_u1" if channels.startswith("smaldone") else "strongly_entangling"
    layer = QuantumConv2d(
        *sizes, **{"kernel": name, "depth": 1, "channels": channels, "dtype": torch.float64} | options
    )
    nn.init.uniform_(layer.weight, 0, 6)
    return layer


class TestSeparate:
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("readout", ["z", "probabilities", "ones"])
    def test_it_is_the_sum_over_layers_of_one_channel(self, groups, readout):
        layer = layer_of("separate", 4, 6, (1, 2), groups=groups, readout=readout, bias=True)
        with torch.no_grad():
            layer.bias.normal_()
        x, share, outs = images(2, 4, 3, 4), 4 // groups, 6 // groups
        per_channel = layer.weight.reshape(4, -1, layer.weight.shape[1])
        want = torch.zeros(2, 6, 3, 3, dtype=torch.float64)
        for channel in range(4):
            one = layer_of("joint", 1, outs, (1, 2), readout=readout)
            assert one.weight.shape == per_channel[channel].shape
            one.weight.data = per_channel[channel].detach()
            group = channel // share
            want[:, group * outs : (group + 1) * outs] += one(x[:, channel : channel + 1]).detach()
        torch.testing.assert_close(layer(x), want + layer.bias[:, None, None], atol=1e-10, rtol=0)

    def test_no_circuit_is_wider_than_a_patch_of_one_channel(self):
        layer = layer_of("separate", 16, 4, 2)
        assert (layer.circuit.n_wires, layer.circuit.n_inputs) == (4, 4)
        assert layer.weight.shape == (16, 12)
        joint = layer_of("joint", 16, 4, 1)
        assert joint.circuit.n_wires == 16

    def test_it_takes_any_kernel(self):
        layer = layer_of("separate", 3, 4, (1, 2), kernel=kernel("product", 2).to_qiskit())
        assert layer(images(1, 3, 4, 4)).shape == (1, 4, 4, 3)

    def test_a_sum_is_not_converted(self):
        with pytest.raises(Unsupported, match="groups=in_channels and sum"):
            layer_of("separate", 2, 2, 1).to_classical()
        assert layer_of("separate", 1, 1, (1, 2)).to_classical()

    def test_sums_are_counted(self):
        separate, grouped = (
            QuantumConv2d(3, outs, (1, 2), groups=g, channels=c, readout="z", kernel="product")
            for outs, g, c in ((2, 1, "separate"), (6, 3, "joint"))
        )
        a, b = (layer.counts((3, 4, 4)) for layer in (separate, grouped))
        assert a["add:fp32"] - b["add:fp32"] == 2 * 2 * 12
        assert a["mac:fp32*fp32"] == b["mac:fp32*fp32"]
        assert (a["units"], b["units"]) == (24, 72)


class TestReupload:
    def test_channels_follow_each_other_on_the_same_wires(self):
        layer = layer_of("reupload", 3, 2, (1, 2))
        encoder, block = encode("angle", 2), kernel("strongly_entangling", 2, 1, features=2)
        gates = ()
        for channel in range(3):
            gates += encoder.shift_inputs(2 * channel).gates
            gates += block.shift_weights(channel * block.n_weights).gates[len(encoder.gates) :]
        assert layer.circuit.gates == gates
        assert (layer.circuit.n_wires, layer.circuit.n_inputs, layer.circuit.n_weights) == (2, 6, 18)

    def test_one_channel_is_the_joint_kernel(self):
        assert layer_of("reupload", 1, 2, 2).circuit == layer_of("joint", 1, 2, 2).circuit

    def test_layers_of_all_channels_may_repeat(self):
        layer = layer_of("reupload", 2, 2, (1, 2), depth=3, reupload=True)
        assert layer.circuit.counts()["RY"] == 2 * 2 * 3
        assert layer.circuit.n_weights == 2 * 3 * 6

    def test_it_takes_other_encodings(self):
        assert layer_of("reupload", 2, 2, (1, 2), encoding="zz")(images(1, 2, 3, 3)).shape == (1, 2, 3, 2)
        own = encode("zz", 2, reps=1, entanglement="linear")
        assert layer_of("reupload", 2, 2, (1, 2), encoding=own).circuit.gates[: len(own.gates)] == own.gates
        with pytest.raises(ValueError, match="cannot follow other channels"):
            layer_of("reupload", 2, 2, (1, 2), encoding="amplitude")


class TestSmaldone:
    @pytest.mark.parametrize("unitary", ["u1", "u2"])
    def test_overwriting_is_the_authors_circuit(self, unitary):
        layer = layer_of("smaldone_co", 3, 2, 2, kernel=f"smaldone_{unitary}")
        assert layer.circuit == channel_overwrite(3, 4, unitary=unitary)
        assert layer.circuit.n_wires == 1 + 4
        assert layer.circuit.observables == ("XIIII",)

    def test_registers_and_ancillas_are_options(self):
        default = layer_of("smaldone_pco", 4, 1, 1)
        assert default.circuit == channel_overwrite(4, 1, registers=2)
        other = layer_of("smaldone_pco", 6, 1, 1, registers=3, ancillas=3)
        assert other.circuit == channel_overwrite(6, 1, registers=3, ancillas=3)

    def test_what_changes_nothing_is_taken(self):
        assert layer_of("smaldone_co", 2, 1, (1, 2), entangle=True).circuit == channel_overwrite(2, 2)
        apart = layer_of("smaldone_pco", 2, 1, (1, 2), couple=False)
        assert apart.circuit == channel_overwrite(2, 2, registers=2, couple=False)

    def test_weighted_expectation_values_are_a_layer_a_channel(self):
        net = nn.Sequential(QuantumConv2d(3, 3, 2, groups=3, kernel="smaldone_u1", readout="z0"), nn.Conv2d(3, 1, 1))
        assert net(images(2, 3, 4, 4).float()).shape == (2, 1, 3, 3)

    def test_another_readout_is_of_all_wires(self):
        layer = layer_of("smaldone_co", 2, 4, (1, 2), readout="ones")
        assert layer(images(1, 2, 2, 3)).shape == (1, 4, 2, 2)
        assert len(layer.circuit.observables) == 3

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"kernel": "heisenberg"}, "it takes kernel 'smaldone_u1'"),
            ({"encoding": "zz"}, "encodes by RX"),
            ({"registers": 2}, "unknown option of channels='smaldone_co'"),
            ({"depth": 7}, "was given depth 7: its circuit has no layers"),
            ({"entangle": False}, "for a control take channels='joint'"),
        ],
    )
    def test_errors_say_what_to_do(self, options, says):
        with pytest.raises(ValueError, match=says):
            layer_of("smaldone_co", 2, 1, (1, 2), **options)

    def test_channels_must_fill_the_registers(self):
        with pytest.raises(ValueError, match="3 channels, registers=2 and ancillas=1: give registers=1 or 3"):
            layer_of("smaldone_pco", 3, 1, (1, 2), registers=2)
        with pytest.raises(ValueError, match="6 channels, registers=2 and ancillas=3: give registers=1 or 2 or 3 or 6"):
            layer_of("smaldone_pco", 6, 1, 1, ancillas=3)

    @pytest.mark.parametrize(("channels", "registers"), [(1, 1), (3, 3), (6, 2), (9, 3)])
    def test_as_few_registers_as_fit_and_more_than_one(self, channels, registers):
        layer = layer_of("smaldone_pco", channels, 1, 1)
        assert layer.circuit == channel_overwrite(channels, 1, registers=registers)


@pytest.mark.parametrize("channels", CHANNELS)
class TestAll:
    @pytest.mark.parametrize("groups", [1, 2])
    def test_layers_conform(self, channels, groups):
        check_layer(layer_of(channels, 4, 4, (1, 2), groups=groups), 4, size=3, atol=1e-10)

    def test_conv2ds_arguments_keep_their_meaning(self, channels):
        arguments = {"stride": (1, 2), "padding": 1, "dilation": (2, 1), "padding_mode": "reflect"}
        x = images(2, 2, 6, 7)
        layer = layer_of(channels, 2, 3, (2, 1), **arguments)
        assert layer(x).shape == nn.Conv2d(2, 3, (2, 1), **arguments)(x.float()).shape
        assert layer(x[0]).shape == layer(x).shape[1:]
        assert layer.counts((2, 6, 7))["units"] == layer(x)[0].numel()
        assert estimate(count(layer, (2, 6, 7))).joules > 0

    def test_backends_agree_and_both_gradients_flow(self, channels):
        layers = [layer_of(channels, 2, 2, 1, backend=name) for name in ("statevector", "pennylane", "qiskit", "auto")]
        results = []
        for layer in layers:
            layer.load_state_dict(layers[0].state_dict())
            x = images(1, 2, 2, 2).requires_grad_()
            y = layer(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.weight))))
        assert results[0][1].abs().max() > 1e-3
        for one, other in pairwise(results):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b, atol=1e-9, rtol=0)

    def test_it_trains(self, channels):
        layer, x = layer_of(channels, 2, 2, 1), images(4, 2, 2, 2)
        optimizer = torch.optim.Adam(layer.parameters(), 0.1)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            losses.append((layer(x) - 0.3).square().mean())
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < 0.7 * losses[0]

    def test_it_is_saved_and_copied(self, channels):
        layer, x = layer_of(channels, 2, 2, 1), images(1, 2, 2, 2)
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        for twin in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
            assert torch.equal(twin(x), layer(x))
            assert repr(twin) == repr(layer)


class TestOptions:
    def test_a_layer_takes_the_options_of_its_kernel(self):
        control = QuantumConv2d(1, 4, 2, kernel="strongly_entangling", entangle=False, ranges=(1, 2))
        full = QuantumConv2d(1, 4, 2, kernel="strongly_entangling", ranges=(1, 2))
        assert control.circuit == without_entanglement(full.circuit)
        assert "CNOT" not in control.circuit.counts()
        again = QuantumConv2d(1, 4, 2, kernel="product", reupload=True, depth=3)
        assert again.circuit.counts()["RY"] == 12

    @pytest.mark.parametrize(
        ("options", "says"),
        [
            ({"strides": 2}, "unknown option of kernel 'heisenberg' 'strides'"),
            (
                {"kernel": kernel("product", 4), "entangle": False},
                r"\['entangle'\] were given with a kernel of your own",
            ),
            ({"kernel": kernel("product", 4), "channels": "reupload"}, "they build named kernels"),
            ({"kernel": kernel("product", 4), "depth": 9}, "depth 9 was given with a kernel of your own"),
            ({"kernel": kernel("product", 4), "encoding": "zz"}, "encoding 'zz' was given with a kernel of your own"),
            ({"channels": "seperate"}, "did you mean 'separate'"),
        ],
    )
    def test_errors_say_what_to_do(self, options, says):
        with pytest.raises(ValueError, match=says):
            QuantumConv2d(1, 4, 2, **options)

    def test_shots_and_noise_reach_every_channel(self):
        layer = layer_of("separate", 2, 2, 1, shots=50, seed=0)
        values = layer(images(1, 2, 2, 2)).detach()
        torch.testing.assert_close(values * 50, (values * 50).round(), atol=1e-9, rtol=0)
        assert load_backend("qiskit").name in layer.backend


@pytest.mark.parametrize("channels", ["joint", "separate", "reupload"])
def test_the_root_of_a_pooling_kernel_is_one_output(channels):
    size = (1, 4) if channels == "joint" else (2, 4)
    layer = QuantumConv2d(
        2, 1, size, kernel="hur_qcnn", depth=3, readout="root", channels=channels, dtype=torch.float64
    )
    assert layer.circuit.observables == ("IIIIZIII",)
    every = QuantumConv2d(2, 8, size, kernel="hur_qcnn", depth=3, channels=channels, dtype=torch.float64)
    every.weight.data = layer.weight.data
    x = images(1, 2, 2, 5)
    torch.testing.assert_close(layer(x), every(x)[:, 4:5], atol=1e-10, rtol=0)


def test_the_root_of_a_circuit_of_ones_own_is_not_known():
    with pytest.raises(ValueError, match="give the wire that is left"):
        QuantumConv2d(1, 1, 2, kernel=kernel("ttn", 4), readout="root")
