"""tensorcircuit-ng, whose users write the whole step in JAX."""

import importlib
import importlib.util
import logging
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peer import Peer, batched_limit, signs, too_wide
from benchmarks.systems import CLASSES, NUDGE, Answers
from benchmarks.workloads import ERROR, SIZE, Mode, Workload


class Tensorcircuit(Peer):
    """State vectors in JAX: vmap over patches, one jit around the whole step, images and weights included."""

    name, package, module = "tensorcircuit-ng", "tensorcircuit-ng", "tensorcircuit"
    note = "JAX, jit and vmap"
    batch_limit = 16

    def __init__(self, workload: Workload) -> None:
        super().__init__(workload)
        self.limit = batched_limit(workload)
        self.weights = np.zeros((workload.filters, workload.layers, workload.wires, 3), dtype=np.float32)

    @classmethod
    def installed(cls) -> bool:
        """See Peer."""
        return super().installed() and importlib.util.find_spec("jax") is not None

    @classmethod
    def cannot(cls, workload: Workload) -> str | None:
        """See Peer."""
        return too_wide(workload)

    def set_weights(self, weights: Tensor) -> None:
        """See System."""
        self.weights = weights.reshape(self.weights.shape).numpy().copy()

    @cached_property
    def convolve(self) -> Callable[[Any, Any], Any]:
        """(images, weights) -> (B, outputs, H', W')."""
        logging.getLogger("tensorcircuit").setLevel(logging.ERROR)  # it warns of optimizers that are not used here
        tc: Any = importlib.import_module(self.module)
        jax: Any = importlib.import_module("jax")
        tc.set_backend("jax")
        tc.set_dtype("complex64")
        w = self.workload
        z = signs(w.wires).numpy()

        def patch_values(x: Any, weights: Any) -> Any:
            circuit = (tc.DMCircuit if w.noise else tc.Circuit)(w.wires)
            for move, i, k in w.moves():
                if move == "encode":
                    circuit.ry(i, theta=math.pi * x[k])
                elif move == "rot":
                    phi, theta, omega = weights[k, i]
                    circuit.u(i, theta=theta, phi=omega, lbd=phi)
                else:
                    circuit.cnot(i, k)
                    if w.noise:
                        circuit.depolarizing(i, px=ERROR / 3, py=ERROR / 3, pz=ERROR / 3)
                        circuit.depolarizing(k, px=ERROR / 3, py=ERROR / 3, pz=ERROR / 3)
            if w.noise:
                return jax.numpy.diagonal(circuit.state()).real @ z
            state = circuit.state()
            return (state.real**2 + state.imag**2) @ z

        over_filters = jax.vmap(patch_values, (None, 0))
        over_patches = jax.vmap(over_filters, (0, None))

        def convolve(images: Any, weights: Any) -> Any:
            columns = jax.lax.conv_general_dilated_patches(images, (w.side, w.side), (w.stride, w.stride), "VALID")
            batch, _, height, width = columns.shape
            values = over_patches(columns.transpose(0, 2, 3, 1).reshape(-1, w.wires), weights)
            return values.reshape(batch, height, width, w.outputs).transpose(0, 3, 1, 2)

        return convolve

    @cached_property
    def compiled(self) -> tuple[Any, Any]:
        """Values, and gradients of their sum with respect to (images, weights), each in one jit."""
        jax: Any = importlib.import_module("jax")
        gradients = jax.grad(lambda images, weights: self.convolve(images, weights).sum(), (0, 1))
        return jax.jit(self.convolve), jax.jit(gradients)

    def load(self, mode: Mode, images: Tensor) -> None:
        """See System."""
        jax: Any = importlib.import_module("jax")
        if self.workload.batches is not None:
            self._load_epoch(jax)
            return
        values, gradients = self.compiled
        data, latest = jax.numpy.asarray(images.numpy()), jax.numpy.asarray(self.weights)

        def train() -> None:
            nonlocal latest
            latest = latest * NUDGE
            jax.block_until_ready(gradients(data, latest))

        self._call = train if mode == "training" else lambda: jax.block_until_ready(values(data, latest))

    def _load_epoch(self, jax: Any) -> None:
        w, convolve, numpy = self.workload, self.convolve, jax.numpy
        assert w.batches is not None
        batches = min(self.batch_limit or w.batches, w.batches)
        rng = np.random.default_rng(0)
        data = numpy.asarray(rng.random((batches, w.batch, w.channels, SIZE, SIZE), dtype=np.float32))
        labels = numpy.asarray(rng.integers(0, CLASSES, (batches, w.batch)))
        head = numpy.asarray(rng.normal(0, 0.03, (w.outputs * w.steps**2, CLASSES)).astype(np.float32))
        parameters = (numpy.asarray(self.weights), head, numpy.zeros(CLASSES))

        def loss(parameters: Any, images: Any, labels: Any) -> Any:
            weights, head, bias = parameters
            logits = convolve(images, weights).reshape(len(images), -1) @ head + bias
            chosen = numpy.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
            return -chosen.mean()

        def step(state: Any, images: Any, labels: Any) -> Any:
            """Adam, written out."""
            count, parameters, first, second = state
            slopes = jax.grad(loss)(parameters, images, labels)
            mix = jax.tree.map
            first = mix(lambda m, g: 0.9 * m + 0.1 * g, first, slopes)
            second = mix(lambda v, g: 0.999 * v + 0.001 * g * g, second, slopes)
            bias1, bias2 = 1 - 0.9**count, 1 - 0.999**count
            parameters = mix(
                lambda p, m, v: p - 1e-3 * (m / bias1) / (numpy.sqrt(v / bias2) + 1e-8), parameters, first, second
            )
            return count + 1, parameters, first, second

        step = jax.jit(step)
        zeros = jax.tree.map(numpy.zeros_like, parameters)
        latest = [(numpy.float32(1), parameters, zeros, zeros)]

        def epoch() -> None:
            for images, classes in zip(data, labels, strict=True):
                latest[0] = step(latest[0], images, classes)
            jax.block_until_ready(latest[0])

        self._call = epoch

    def run(self) -> None:
        """See System."""
        self._call()

    def answers(self, images: Tensor) -> Answers:
        """See System."""
        jax: Any = importlib.import_module("jax")

        arguments = jax.numpy.asarray(images.numpy()), jax.numpy.asarray(self.weights)
        values, gradients = (function(*arguments) for function in self.compiled)
        found = jax.tree.map(lambda array: torch.from_numpy(np.array(array)), (values, *gradients))
        values, image_gradient, weight_gradient = found
        return Answers(values, weight_gradient, image_gradient)
