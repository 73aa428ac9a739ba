"""How the channels of an image meet in one layer of quantum kernels.

With C channels a group, k pixels a channel, encodings of w(k) wires for k features, and an ansatz of d layers:

=============  ==================  =============================  ====================================================
channels       wires               weights a filter               circuits a patch and filter
=============  ==================  =============================  ====================================================
joint          w(C k)              those of the ansatz            1, all pixels side by side
separate       w(k)                C times those of the ansatz    C, one a channel; outputs are summed, in [-C, C]
reupload       w(k)                C times those of the ansatz    1, C times as deep
smaldone_co    1 + k               C times the unitary's plus 1   1, about 2 C times as deep as the unitary
smaldone_pco   a + r k             as smaldone_co, and couplings  1, about 2 C / r times as deep as the unitary
=============  ==================  =============================  ====================================================

"reupload" encodes one channel after another on the same wires, each followed by the ansatz with weights of its own.
"smaldone_co" (channel overwrite) undoes each channel's unitary once an ancilla has taken it in; "smaldone_pco" reads r
registers at once into a ancillas, and couples registers unless couple=False. r divides C; it is by default the smallest
such number above 1: 2, or 3 of RGB. With a = 1, the default, that is the authors' PCO; with ancillas=r, one a register,
it is their PCO-T. Both take kernel "smaldone_u1" or
"smaldone_u2", encode by RX(pi x), have no depth, and read X of the first ancilla where readout is "z", the default,
which their authors turn into arccos(<X>) / pi (here that is left to the network); for Z of wires list Pauli strings.
Without gates on several wires their ancilla would see nothing, so they have no control. The authors' "weighted
expectation value" is one circuit a channel before a weighted sum:

    nn.Sequential(QuantumConv2d(3, 3, 2, groups=3, kernel="smaldone_u1", readout="z0"), nn.Conv2d(3, 1, 1))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from circuits.ansatze import channel_overwrite
from circuits.ansatze.library import check_flag, check_sizes
from circuits.circuit import Circuit
from circuits.encodings import encode, find_encoding
from circuits.kernels import interleaved, kernel_readout
from circuits.kernels import kernel as named_kernel
from circuits.naming import unknown
from circuits.options import is_whole
from circuits.readouts import Readout, find_readout

SMALDONE = ("smaldone_co", "smaldone_pco")
CHANNELS = ("joint", "separate", "reupload", *SMALDONE)
DEPTH = 2  # layers where none are asked for
_UNITARIES = {"smaldone_u1": "u1", "smaldone_u2": "u2"}


def channels_kernel(
    scheme: str,
    channels: int,
    pixels: int,
    name: str,
    depth: int,
    encoding: str | Circuit,
    readout: str | Sequence[str],
    seed: int,
    options: dict[str, Any],
) -> tuple[Circuit, Readout]:
    """The circuit that a layer with a named kernel runs on the channels of a patch, and its readout.

    Args:
        scheme: A name of CHANNELS.
        channels: Channels of a group.
        pixels: Pixels of a channel's patch.
        name: A named kernel.
        depth: As of `kernel`; 1 or the default DEPTH where there is none.
        encoding: As of `kernel`; with "reupload" of one channel.
        readout: As of `find_readout`; of SMALDONE "z" stands for X of the first ancilla.
        seed: As of `kernel`.
        options: Those of `kernel` and of the ansatz; for "smaldone_pco" registers (the smallest
            number above 1 that divides the channels), ancillas (1) and couple (True).

    Returns:
        Inputs ordered (channel, pixel): those of all channels, or of one with "separate".

    Raises:
        ValueError: For an unknown scheme, and what does not fit each other.
    """
    if scheme not in CHANNELS:
        raise unknown("channels", scheme, CHANNELS)
    if scheme in SMALDONE:
        return _smaldone(scheme, channels, pixels, name, depth, encoding, readout, options)
    features = pixels if scheme != "joint" else channels * pixels
    wires = encoding.n_wires if isinstance(encoding, Circuit) else find_encoding(encoding).wires(features)
    if scheme != "reupload":
        circuit = named_kernel(name, wires, depth, encoding, readout, features=features, seed=seed, **options)
        return circuit, kernel_readout(name, readout, wires, depth, reupload=options.get("reupload", False))
    encoder = encoding if isinstance(encoding, Circuit) else encode(encoding, features)
    if not isinstance(encoding, Circuit) and not find_encoding(encoding).again and channels > 1:
        raise ValueError(f"encoding {encoding!r} prepares a state, which cannot follow other channels: use another")
    own = dict(options)
    reupload = own.pop("reupload", False)
    check_sizes(name, wires, depth)
    check_flag(name, "reupload", reupload)
    rounds = depth if reupload else 1
    encoders = [encoder.shift_inputs(k * features) for _ in range(rounds) for k in range(channels)]
    circuit = interleaved(encoders, name, 1 if rounds > 1 else depth, seed, **own)
    found = kernel_readout(name, readout, wires, depth, reupload=reupload)
    return circuit.with_observables(found.observables), found


def _smaldone(
    scheme: str,
    channels: int,
    pixels: int,
    name: str,
    depth: int,
    encoding: str | Circuit,
    readout: str | Sequence[str],
    options: dict[str, Any],
) -> tuple[Circuit, Readout]:
    if name not in _UNITARIES or encoding not in ("angle", "angle_x"):
        what = encoding if isinstance(encoding, str) else "a Circuit"
        raise ValueError(
            f"channels={scheme!r} was given kernel {name!r} and encoding {what!r}: it takes kernel 'smaldone_u1' or "
            "'smaldone_u2' and encodes by RX(pi x) itself"
        )
    if depth not in (1, DEPTH):
        raise ValueError(
            f"channels={scheme!r} was given depth {depth}: its circuit has no layers to repeat, so leave it"
        )
    if options.get("entangle", True) is not True:
        raise ValueError(
            f"channels={scheme!r} was given entangle={options['entangle']!r}: its ancilla sees the channels through "
            "entangling gates alone; for a control take channels='joint', 'separate' or 'reupload' with entangle=False"
        )
    known: dict[str, Any] = {}
    if scheme == "smaldone_pco":
        dividing = [r for r in range(1, channels + 1) if channels % r == 0]
        known = {"registers": dividing[min(1, len(dividing) - 1)], "ancillas": 1, "couple": True}
    options = {option: value for option, value in options.items() if option != "entangle"}
    for option in options:
        if option not in known:
            raise unknown(f"option of channels={scheme!r}", option, ["entangle", *known])
    known |= options
    if scheme == "smaldone_pco":
        registers, ancillas = known["registers"], known["ancillas"]
        if registers not in dividing or not is_whole(ancillas) or not 1 <= ancillas <= registers:
            raise ValueError(
                f"channels={scheme!r} was given {channels} channels, registers={registers!r} and "
                f"ancillas={ancillas!r}: give registers={' or '.join(map(str, dividing))}, which divide the channels, "
                "and ancillas of 1 to registers"
            )
    circuit = channel_overwrite(channels, pixels, unitary=_UNITARIES[name], **known)
    if readout == "z":
        return circuit, Readout(circuit.observables, len(circuit.observables))
    found = find_readout(readout, circuit.n_wires)
    return circuit.with_observables(found.observables), found
