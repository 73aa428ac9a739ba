"""Quantum convolution as a drop-in for nn.Conv2d."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from math import ceil, pi
from typing import Any

import torch
from torch import Tensor, nn

from circuits.ansatze import ANSATZE
from circuits.circuit import Circuit
from circuits.encodings import encode
from circuits.interop import as_circuit, is_program
from circuits.naming import unknown
from circuits.noise import NoiseModel
from circuits.readouts import Readout, find_readout
from qconv.backends.auto import TYPICAL, AutoBackend, AutoCompiled
from qconv.backends.computed import with_plain_features
from qconv.backends.costs import Call
from qconv.backends.loading import as_backend
from qconv.backends.matrix_products import Truncation, truncation_of
from qconv.backends.protocol import (
    DEVICE_SHOTS,
    Backend,
    Compiled,
    Precomputed,
    Unsupported,
    as_int,
    check_options,
    circuit_sizes,
    warn_of_idle_noise,
)
from qconv.channels import CHANNELS, DEPTH, channels_kernel
from qconv.energy.devices import DEVICES, Cost, Device
from qconv.fourier_conv import FourierConv2d as FourierConv2d
from qconv.gradients import compile_differentiable
from qconv.patch_conv import PatchConv2d as PatchConv2d
from qconv.patches import Pair, pad
from qconv.reading import read_out, read_out_counts
from qconv.step_circuits import gradient_method, step_circuits
from qconv.surrogates import surrogate

_REMEMBERED = 15  # shapes of images
_ROUNDING = 1e-12  # coefficients lie in [-1, 1]; what double precision leaves of 0 is smaller


class QuantumConv2d(PatchConv2d):
    """A convolution whose kernel is a quantum circuit; a drop-in for nn.Conv2d.

    Each patch is encoded into qubits, a parametrized circuit acts on them, and expectation values of its observables
    become output channels. All patches share the weights.

    Args:
        in_channels: Channels of the image.
        out_channels: Channels of the output. A circuit gives n_obs of them, so there are
            groups * ceil(out_channels / groups / n_obs) filters (circuits with weights of their own); surplus outputs
            are dropped. A readout may give fewer or more outputs than n_obs.
        kernel_size: As nn.Conv2d.
        stride: As nn.Conv2d.
        padding: As nn.Conv2d, "same" and "valid" included.
        dilation: As nn.Conv2d.
        groups: As nn.Conv2d.
        bias: Whether to add a trainable bias, started at 0; unlike nn.Conv2d's, off by default.
        padding_mode: As nn.Conv2d.
        kernel: A name of `circuits.kernel_names()`; or a Circuit, a PennyLane function f(inputs, weights), QNode or
            tape, a Qiskit QuantumCircuit or an OpenQASM 3 text or file, read by `circuits.as_circuit`, which says how
            features and weights are told apart.
        depth: Layers of a named kernel, or of a PennyLane function's weights where it takes any number of them; another
            kernel of one's own takes none.
        encoding: How features of a patch, in nn.Unfold's order (channel, row, column), enter a named kernel, or one of
            one's own that takes no features: a name of `circuits.encoding_names()` ("angle" is RY(pi x)), or a Circuit
            from `circuits.encode` with options.
        readout: What outputs are: "z" for <Z> of every wire, another of `circuits.find_readout` ("probabilities",
            "ones" ...), "root" (of kernels that discard wires: Z of those left), or Pauli strings. A kernel that brings
            observables keeps them where this is "z".
        channels: How the channels of a group meet: "joint" (their pixels are features of one register), "separate" (a
            circuit a channel, outputs summed), "reupload" (one after another on the same wires), "smaldone_co" or
            "smaldone_pco"; see qconv.channels for wires and costs. With "separate", filters are counted a channel.
        backend: "auto", another name of `qconv.backends.backend_names()`, a backend object, a device of PennyLane's, or
            a BackendV2 or SamplerV2 of Qiskit's.
        shots: Samples a circuit; None for exact expectation values. May be changed later: `layer.shots = 100`.
        noise: A circuits.NoiseModel; None for none. May be changed later, as shots.
        seed: Draws the structure of kernel "random" (None draws that of seed 0) and makes shots repeatable. Layers, and
            processes, of one seed draw the same numbers: give each its own, such as seed + rank (and then a Circuit for
            a random kernel). None: shots follow torch.manual_seed, but for PennyLane's, which draws its own.
        executor: A concurrent.futures Executor that runs the jobs of backend "qiskit", or of a device or sampler of
            Qiskit's, at the same time; see load_backend. It must not be the one that the caller runs on.
        device: As nn.Conv2d.
        dtype: torch.float32 (default) or torch.float64.
        options: Of a named kernel: entangle=False for its control (an encoding that entangles stays), reupload=True to
            repeat the encoding before each layer, and those of `circuits.ansatz_option_values`; of
            channels="smaldone_pco" registers, ancillas and couple.

    Attributes:
        weight: (filters, n_weights), the one trainable parameter besides bias, the same on every backend. Angles in
            radians.
        circuit: The kernel as data; with channels="separate" that of one channel.
        readout: What outputs are made of the circuit's expectation values, as data.

    Raises:
        ValueError: For arguments that do not fit each other, unknown names, or what the backend cannot run.
        UserWarning: Where the noise has channels, but the kernel none of the gates that they follow.

    All filters share one circuit. Henderson et al. draw a random circuit for each of theirs, which is a layer for each
    seed and their outputs side by side:

        layers = [QuantumConv2d(1, 1, 3, kernel="henderson", readout="ones", seed=k) for k in range(8)]
        torch.cat([layer(images) for layer in layers], dim=1)

    Source: Henderson et al., Quanvolutional neural networks (arXiv:1904.04767), made trainable.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        *,
        kernel: Any = "heisenberg",
        depth: int = DEPTH,
        encoding: str | Circuit = "angle",
        readout: str | Sequence[str] = "z",
        channels: str = "joint",
        backend: Any = "auto",
        shots: int | None = None,
        noise: NoiseModel | None = None,
        seed: int | None = None,
        executor: Executor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding, dilation, groups, padding_mode)
        if channels not in CHANNELS:
            raise unknown("channels", channels, CHANNELS)
        self.channels = channels
        self.seed = as_int(seed)
        self.circuit, self.readout = self._read_kernel(kernel, depth, encoding, readout, self.seed, options)
        # Groups of the circuit: with "separate" each channel is one.
        self._runs = in_channels if channels == "separate" else groups
        self._plain, self._preparation = with_plain_features(self.circuit)
        named = isinstance(kernel, str) and kernel in ANSATZE
        self._initial = ANSATZE[kernel].initial if named else "own"
        self._asked = as_backend(backend, executor)
        # Compiled now, so that what a backend cannot run is said here and not in the first training step.
        self._run_with(shots, noise)
        warn_of_idle_noise(self.circuit, noise)

        per_run = ceil(out_channels / groups / self.readout.outputs)
        weight = torch.empty(self._runs * per_run, self.circuit.n_weights, device=device, dtype=dtype)
        if weight.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype is {weight.dtype}: a circuit needs torch.float32 or torch.float64")
        self.weight, self._weight_shape = nn.Parameter(weight), weight.shape
        self._make_bias(bias, weight)
        self.reset_parameters()

    def _read_kernel(
        self,
        kernel: Any,
        depth: int,
        encoding: str | Circuit,
        readout: str | Sequence[str],
        seed: int | None,
        options: dict[str, Any],
    ) -> tuple[Circuit, Readout]:
        share, pixels = self.in_channels // self.groups, self.geometry.taps
        features = pixels if self.channels == "separate" else self.features
        if isinstance(kernel, str) and not is_program(kernel):
            circuit, found = channels_kernel(
                self.channels, share, pixels, kernel, depth, encoding, readout, seed or 0, options
            )
        else:
            if options or self.channels not in ("joint", "separate"):
                raise ValueError(
                    f"channels={self.channels!r} and the options {sorted(options)} were given with a kernel of your "
                    "own: they build named kernels, so use channels 'joint' or 'separate' and no options"
                )
            circuit = self._own_kernel(kernel, features, depth, encoding)
            found = Readout(circuit.observables, len(circuit.observables))
            if readout != "z":
                found = find_readout(readout, circuit.n_wires)
                circuit = circuit.with_observables(found.observables)
        if not circuit.observables:
            raise ValueError("kernel has 0 observables: add at least one with circuit.with_observables(('Z...',))")
        if circuit.n_inputs != features:
            height, width = self.geometry.kernel_size
            channels = features // pixels
            raise ValueError(
                f"kernel has {circuit.n_wires} wires and takes {circuit.n_inputs} features but a {height}x{width} "
                f"patch of {channels} channel{'s' if channels > 1 else ''} gives {features}: change kernel_size "
                "or the kernel"
            )
        return circuit, found

    @staticmethod
    def _own_kernel(kernel: Any, features: int, depth: int, encoding: str | Circuit) -> Circuit:
        circuit = as_circuit(kernel, features, depth)
        # 1 is what the depth of a circuit without layers may be called, too.
        if depth not in (1, DEPTH) and as_circuit(kernel, features) == circuit:
            raise ValueError(
                f"depth {depth} was given with a kernel of your own, which brings its layers: leave it out"
            )
        if circuit.n_inputs == 0:
            before = encode(encoding, features, circuit.n_wires) if isinstance(encoding, str) else encoding
            return before + circuit.shift_weights(before.n_weights)
        if encoding != "angle":
            raise ValueError(
                f"encoding {encoding if isinstance(encoding, str) else 'a Circuit'!r} was given with a kernel of your "
                f"own that takes {circuit.n_inputs} features, which brings its encoding: leave it out, or give a "
                f"kernel without features, such as circuits.from_qiskit(qc, weights=qc.parameters)"
            )
        return circuit

    @property
    def shots(self) -> int | None:
        """Samples a circuit; None for exact expectation values. A new number takes effect at once.

        With a seed, draws start again from its first.

        Raises:
            ValueError: For no whole number of at least 1, or what the backend cannot run; the old number stays.
        """
        return self._shots

    @shots.setter
    def shots(self, shots: int | None) -> None:
        self._run_with(shots, self._noise)

    @property
    def noise(self) -> NoiseModel | None:
        """Channels after gates and misread bits; None for none. A new model takes effect at once, as `shots` does.

        Raises:
            ValueError: For no NoiseModel, or what the backend cannot run; the old one stays.
        """
        return self._noise

    @noise.setter
    def noise(self, noise: NoiseModel | None) -> None:
        self._run_with(self._shots, noise)
        warn_of_idle_noise(self.circuit, noise)

    def _run_with(self, shots: int | None, noise: NoiseModel | None) -> None:
        shots = as_int(shots)
        check_options(shots, noise, self.seed)
        found: tuple[Backend, str] = self._asked, self._asked.name
        if isinstance(self._asked, AutoBackend):
            found = self._asked.forced(self._plain, shots, noise) or (self._asked, "")
        compiled = self._compiled_on(found[0], shots, noise)
        self._shots, self._noise, (self._backend, self._reason) = shots, noise, found
        self._compiled: Compiled | None = compiled
        self._last_call: Call | None = None
        self._ways: dict[tuple[object, ...], tuple[Call, Compiled]] = {}

    def _compiled_on(self, backend: Backend, shots: int | None, noise: NoiseModel | None) -> Compiled:
        return compile_differentiable(backend, self._plain, shots=shots, noise=noise, seed=self.seed)

    def _compile(self) -> Compiled:
        if self._compiled is None:
            self._compiled = self._compiled_on(self._backend, self._shots, self._noise)
        return self._compiled

    def __getstate__(self) -> dict[str, Any]:
        # The circuit is data; what a backend made of it is compiled again where the copy lives.
        return {**self.__dict__, "_compiled": None, "_ways": {}}

    @property
    def backend(self) -> str:
        """The backend that runs the kernel and, where "auto" chose it, why: for the last call, or a typical one."""
        compiled = self._compile()
        if isinstance(compiled, AutoCompiled):
            if self._last_call is not None:
                return compiled.reason(self._last_call)
            typical = compiled.reason(TYPICAL._replace(filters=len(self.weight) // self._runs))
            return f"{typical} (a typical call: there was none yet)"
        return self._reason

    @property
    def truncation_error(self) -> Truncation | None:
        """What the last evaluation on a matrix product state lost; None on backends that truncate nothing.

        The shifted circuits of a backward pass are evaluations too. See load_backend("tensor_network", max_bond=...).
        """
        return truncation_of(self._compile())

    def _way(self, images: Tensor) -> Compiled:
        """How padded or unpadded images of this shape are evaluated."""
        compiled = self._compile()
        if not isinstance(compiled, AutoCompiled):
            return compiled
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
            return compiled.pick(*TYPICAL)
        training = torch.is_grad_enabled() and (images.requires_grad or self.weight.requires_grad)
        # Looked up by shape first: a small layer takes some twenty microseconds in all.
        asked = images.shape, training, images.device
        if asked not in self._ways:
            height, width = self.geometry.output_size(images.shape[2], images.shape[3])
            filters = len(self.weight) // self._runs
            in_images = self._preparation is None
            call = Call(images.shape[0] * height * width, filters, training, images.device.type, in_images)
            # Few, so that images of ever new sizes do not pile up.
            self._ways = dict([*list(self._ways.items())[-_REMEMBERED:], (asked, (call, compiled.pick(*call)))])
        self._last_call, way = self._ways[asked]
        return way

    def reset_parameters(self) -> None:
        """Draw new weights from torch's global generator.

        Rotations start from N(0, 0.1) and gates on two wires at 0, so that a kernel with trainable entanglers starts as
        a product kernel and learns how much entanglement it wants. Named kernels that would stay there draw all angles
        from [0, 2 pi), such as "random". In a kernel of one's own, which may stay there too, gates on two wires start
        from N(0, 0.1) as well, and where they alone have weights, these are drawn from [0, 2 pi).
        """
        reads = ((gate, angle) for gate in self.circuit.gates for angle in gate.angles if angle.source == "weight")
        entangling = {angle.index for gate, angle in reads if len(gate.wires) > 1}
        own = self._initial == "own"
        with torch.no_grad():
            if self._initial == "uniform" or (own and len(entangling) == self.circuit.n_weights):
                self.weight.uniform_(0, 2 * pi)
            else:
                self.weight.normal_(0, 0.1)
                if not own:
                    self.weight[:, sorted(entangling)] = 0
            if self.bias is not None:
                self.bias.zero_()

    def convolve(self, images: Tensor) -> Tensor:
        """See PatchConv2d: images as a whole where the backend takes them, else patch by patch."""
        if self.weight.shape != self._weight_shape:
            raise ValueError(
                f"weight has shape {tuple(self.weight.shape)} but this layer has {self._weight_shape[0]} filters of "
                f"{self._weight_shape[1]} weights: change its values, not its shape"
            )
        way, prepare = self._way(images), self._preparation
        # What is made of expectation values wants all of them; else surplus ones are left out.
        made = self.readout.kind != "values" or self._runs != self.groups
        outs = len(self.weight) // self._runs * len(self.circuit.observables)
        runs = self._runs, outs if made else self.out_channels // self.groups

        def evaluate(patches: Tensor, weights: Tensor) -> Tensor:
            return way(patches if prepare is None else prepare(patches), weights).flatten(1)

        def plain(padded: Tensor, weights: Tensor) -> Tensor:
            return self._over_patches(padded, weights, evaluate, runs)

        # Not isinstance(way, Convolving): asking a protocol takes a sixth of a small layer's time.
        convolve: Callable[..., Tensor | None] | None = getattr(way, "convolve", None)
        result = None
        if convolve is not None and prepare is None:
            result = convolve(images, self.weight, self.geometry, *runs, plain)
        if result is None:
            result = plain(pad(images, self.geometry), self.weight)
        return self._outputs(result) if made else result

    def _outputs(self, values: Tensor) -> Tensor:
        """Output channels (B, out_channels, H, W) from all expectation values (B, run * filter * observable, H, W)."""
        batch, _, height, width = values.shape
        filters = len(self.weight) // self._runs
        values = values.reshape(batch * self._runs * filters, -1, height, width)
        made = read_out(self.readout, values, shots=self.shots).reshape(
            batch, self.groups, -1, filters, self.readout.outputs, height, width
        )
        summed = made.sum(2).flatten(2, 3)[:, :, : self.out_channels // self.groups]
        return summed.flatten(1, 2)

    def evaluate(self, patches: Tensor, weights: Tensor) -> Tensor:
        """See PatchConv2d: expectation values ordered (filter, observable)."""
        prepared = patches if self._preparation is None else self._preparation(patches)
        return self._compile()(prepared, weights).flatten(1)

    def to_classical(self) -> FourierConv2d:
        """The kernel with its weights frozen, as a trigonometric polynomial in plain torch operations.

        Its values are this layer's exact ones, noise included (shots are not drawn: `qconv.surrogate` measures). It
        needs no simulator, asks for no gradients, and goes through torch.export, torch.compile and ONNX export; its
        coefficients can be quantized with `.quantize("int8")`.

        Returns:
            The same geometry, outputs and bias; later changes of this layer do not reach it.

        Raises:
            Unsupported: For an amplitude encoding or computed features, for readout "most_likely_ones", which are no
                polynomials, and for channels="separate", which is a sum of them.
            ValueError: For more than 2^16 coefficients an output, or input scales without a common divisor.

        Source: Schreiber, Eisert & Meyer, Classical surrogates for quantum learning models (arXiv:2206.11740).
        """
        # In double precision, where what should be 0 can be told from what is small: a quantizer that reads signs must
        # not read those of rounding errors.
        if self._runs != self.groups:
            raise Unsupported(
                f"channels='separate' sums the polynomials of {self._runs // self.groups} channels: convert a layer "
                "with groups=in_channels and sum its outputs"
            )
        if self.readout.kind == "most_likely":
            raise Unsupported("readout 'most_likely_ones' is no polynomial: convert one with readout='probabilities'")
        exact = surrogate(self.circuit, self.weight.detach().to("cpu", torch.float64), noise=self.noise)
        # Coefficients (filter, observable, wave) are read out like values; the first wave is constant.
        coefficients = read_out(self.readout, exact.coefficients, only_first=True)
        coefficients = coefficients.where(coefficients.abs() > _ROUNDING, 0).to(self.weight)
        return FourierConv2d.frozen(
            exact.rows(coefficients, self.out_channels, self.groups),
            exact.spectrum,
            self.in_channels,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            self.bias,
            self.padding_mode,
        )

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations of one inference: what runs here, and (device:...) what a quantum device would have to run.

        Args:
            input_shape: (channels, height, width).
        """
        patches, total = self._shape_counts(input_shape)
        compiled = self._compile()
        filters = len(self.weight) // self._runs
        in_images = self._preparation is None
        if isinstance(compiled, AutoCompiled):
            compiled = compiled.pick(patches, filters, False, "cpu", in_images)
        for _ in range(self._runs):
            total += compiled.counts(patches, filters)
            if self._preparation is not None:
                total += self._preparation.counts(patches)
        total += read_out_counts(self.readout, self._runs * filters * patches)
        total += Counter({"add:fp32": (self._runs // self.groups - 1) * total["units"]})
        stored = self.weight.numel()
        if isinstance(compiled, Precomputed):
            stored = compiled.stored_numbers(len(self.weight))
        total["weight_bits"] = 32 * (stored + (0 if self.bias is None else self.out_channels))
        return total

    def cost(self, input_shape: Sequence[int], devices: Sequence[Device] = DEVICES) -> Cost:
        """What a quantum device would run for this layer, by print() or as numbers; nothing is executed.

        On a device of Qiskit's, gates and depth are those of the transpiled circuits.

        Args:
            input_shape: (channels, height, width) of one image, or (batch, channels, height, width).
            devices: Whose published power and time give seconds and joules.
        """
        shape = tuple(input_shape)
        if len(shape) not in (3, 4):
            raise ValueError(
                f"input_shape is {shape}: give ({self.in_channels}, height, width), or a batch size before it"
            )
        images = shape[0] if len(shape) == 4 else 1
        patches = self._shape_counts(shape[-3:])[0] * images * self._runs
        filters = len(self.weight) // self._runs
        compiled = self._compile()
        sizes = circuit_sizes(compiled, self._plain)
        steps = [step_circuits(compiled, self._plain, patches, filters, inputs=inputs) for inputs in (False, True)]
        return Cost(
            patches=patches,
            filters=filters,
            wires=self._plain.n_wires,
            settings=len(sizes),
            shots=self.shots or DEVICE_SHOTS,
            sampled=self.shots is not None,
            gates_1q=patches * filters * sum(size.gates_1q for size in sizes),
            gates_2q=patches * filters * sum(size.gates_2q for size in sizes),
            depth=max(size.depth for size in sizes),
            weight_step=steps[0],
            step=steps[1],
            method=gradient_method(compiled),
            devices=tuple(devices),
        )

    def extra_repr(self) -> str:
        """The arguments that define the layer."""
        shots = f", shots={self.shots}" if self.shots else ""
        shots += "" if self.channels == "joint" else f", channels={self.channels!r}"
        shots += "" if self.readout.kind == "values" else f", readout={self.readout.kind!r}"
        # A device that was given, which most backends have none of.
        device = getattr(self._backend, "device", None)
        named = device if isinstance(device, str) else getattr(device, "name", type(device).__name__)
        on = "" if device is None else f" on {named}"
        return (
            f"{super().extra_repr()}, wires={self.circuit.n_wires}, filters={len(self.weight)}, "
            f"weights={self.circuit.n_weights}, backend={self._backend.name}{on}{shots}"
        )
