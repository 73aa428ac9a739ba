"""Features that are computed from patches before a circuit runs, so that backends see circuits of plain features.

A circuit whose angles are products, sums or fixed functions of features is the same circuit with those numbers as its
inputs, after a map that depends on the patch alone. Any backend runs it, and autograd carries gradients through.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from math import isinf

import numpy as np
import torch
from torch import Tensor

from circuits.circuit import Circuit
from circuits.features import Factor, Feature
from qconv.backends.contraction import SINCOS_MULTIPLICATIONS
from qconv.backends.matrix_products import Truncation, truncation_of
from qconv.backends.protocol import Compiled, check_shapes


def with_plain_features(circuit: Circuit) -> tuple[Circuit, Preparation | None]:
    """A circuit of plain features, and how its inputs are made from those of the given one; None where they are equal.

    Args:
        circuit: Any circuit.
    """
    if not circuit.features:
        return circuit, None
    angles = [angle for gate in circuit.gates for angle in gate.angles if angle.source == "input"]
    plain = sorted({angle.index for angle in angles if angle.computed is None})
    wanted: list[int | Feature] = [*plain, *circuit.features]
    places = {read: k for k, read in enumerate(wanted)}
    gates = (
        replace(
            gate,
            angles=tuple(
                replace(angle, index=places[angle.index if angle.computed is None else angle.computed], computed=None)
                if angle.source == "input"
                else angle
                for angle in gate.angles
            ),
        )
        for gate in circuit.gates
    )
    return replace(circuit, gates=tuple(gates)), Preparation(circuit.n_inputs, plain, circuit.features)


class Preparation:
    """Computes a circuit's inputs from patches.

    Args:
        n_inputs: Features of a patch.
        plain: Features that are passed on as they are.
        features: What is computed and follows them.
    """

    def __init__(self, n_inputs: int, plain: list[int], features: tuple[Feature, ...]) -> None:
        self.n_inputs = n_inputs
        wanted = [Feature(((1.0, (Factor(k),)),)) for k in plain] + list(features)
        factors = dict.fromkeys(factor for feature in wanted for factor in feature.factors)
        # Factors of the same function are evaluated together.
        self._groups: dict[tuple[str, tuple[float, ...]], list[int]] = {}
        for factor in factors:
            self._groups.setdefault((factor.function, factor.parameters), []).append(factor.index)
        self._checked = {f.index: f.range for f in factors if not isinf(f.range[1])}
        places = {
            Factor(index, *form): k
            for k, (form, index) in enumerate((form, index) for form, own in self._groups.items() for index in own)
        }
        products = list(dict.fromkeys(product for feature in wanted for _, product in feature.terms))
        # Short products are filled up with the number 1, which stands behind all factors.
        longest = max(len(product) for product in products)
        rows = [[*(places[f] for f in product), *[len(places)] * (longest - len(product))] for product in products]
        self._products = np.array(rows).T
        self._multiplied = sum(len(product) - 1 for product in products)
        self._sums = np.zeros((len(products), len(wanted)))
        for k, feature in enumerate(wanted):
            for coefficient, product in feature.terms:
                self._sums[products.index(product), k] = coefficient
        self._is_copy = np.array_equal(self._sums, np.eye(*self._sums.shape))

    def __call__(self, inputs: Tensor) -> Tensor:
        """Features (P, n_inputs) -> inputs of the plain circuit (P, n).

        Raises:
            ValueError: For a feature outside what its function is defined for.
        """
        self._check(inputs)
        parts = [
            _value(function, parameters, inputs[:, torch.as_tensor(own, device=inputs.device)])
            for (function, parameters), own in self._groups.items()
        ]
        if len(self._products) > 1:
            parts.append(torch.ones_like(inputs[:, :1]))
        table = torch.cat(parts, dim=1)
        places = [torch.as_tensor(row, device=inputs.device) for row in self._products]
        result = table[:, places[0]]
        for row in places[1:]:
            result = result * table[:, row]
        return result if self._is_copy else result @ torch.as_tensor(self._sums, dtype=inputs.dtype).to(inputs.device)

    def _check(self, inputs: Tensor) -> None:
        # What watches a program run cannot ask for its numbers: there the function gives NaN outside its range.
        watched = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if not self._checked or watched or torch._C._are_functorch_transforms_active() or inputs.is_meta:
            return
        if inputs.numel() == 0:
            return
        lowest, highest = inputs.detach().amin(0).tolist(), inputs.detach().amax(0).tolist()
        for index, (low, high) in self._checked.items():
            if lowest[index] < low or highest[index] > high:
                worst = lowest[index] if lowest[index] < low else highest[index]
                raise ValueError(
                    f"feature {index} is {worst:.4g} but this encoding takes [{low:g}, {high:g}]: scale the images, or "
                    "clamp what the layer before gives"
                )

    def counts(self, patches: int) -> Counter[str]:
        """Operations for so many patches; an arcsine is taken to cost as much as a sine and a cosine."""
        applied = {"step": 0, "arc": 0, "bit": 0}
        for (function, _), own in self._groups.items():
            if function != "x":
                applied[function if function in applied else "arc"] += len(own)
        arcs = SINCOS_MULTIPLICATIONS * applied["arc"]
        per_patch = {
            "mul:fp32": self._multiplied + arcs + 2 * applied["bit"],
            "add:fp32": arcs + applied["bit"],
            "cmp:fp32": applied["step"],
            "mac:fp32*fp32": 0 if self._is_copy else int(np.count_nonzero(self._sums)),
        }
        return +Counter({key: amount * patches for key, amount in per_patch.items()})


def _value(function: str, parameters: tuple[float, ...], x: Tensor) -> Tensor:
    """A function of the table of features."""
    if function == "x":
        return x
    if function == "step":
        return torch.where(x.isnan(), x, (x > parameters[0]).to(x.dtype))
    if function == "bit":
        bit, bits = parameters
        gray = torch.floor(x * (2**bits - 1) + 0.5)
        return torch.floor(gray / 2**bit).remainder(2)
    # At the ends the slope is infinite: it is taken as 0, so that a white pixel does not end a training.
    inside = x.abs() < 1
    safe, fixed = torch.where(inside, x, torch.zeros_like(x)), x.detach()
    if function == "arcsin":
        return torch.where(inside, torch.arcsin(safe), torch.arcsin(fixed))
    if function == "arccos":
        return torch.where(inside, torch.arccos(safe), torch.arccos(fixed))
    return torch.where(inside, torch.arccos(safe * safe), torch.arccos(fixed * fixed))


class PreparedCompiled:
    """A compiled circuit of plain features behind the map that computes them.

    Args:
        circuit: As the user knows it.
        compiled: Of the plain circuit; autograd flows through it.
        preparation: The map.
    """

    differentiable = True

    def __init__(self, circuit: Circuit, compiled: Compiled, preparation: Preparation) -> None:
        self.circuit, self._compiled, self._preparation = circuit, compiled, preparation

    def __call__(self, inputs: Tensor, weights: Tensor) -> Tensor:
        """See Compiled."""
        check_shapes(self.circuit, inputs, weights)
        return self._compiled(self._preparation(inputs), weights)

    @property
    def truncation_error(self) -> Truncation | None:
        """What the last evaluation lost where the backend truncates; see load_backend."""
        return truncation_of(self._compiled)

    def counts(self, patches: int, filters: int) -> Counter[str]:
        """See Compiled."""
        return self._compiled.counts(patches, filters) + self._preparation.counts(patches)
