"""Rows that no training made, for tests of what is concluded from rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from qconv.rows import Row, Task

_ROW = Row(
    task=Task("digits", "float", 0, 0.01, 1.0, epochs=2),
    val_accuracy=0.9,
    val_loss=0.3,
    n_val=359,
    test_accuracy=0.9,
    n_test=359,
    n_fit=1079,
    official_test=False,
    slot_parameters=20,
    parameters=2062,
    slot_counts={"mac:fp32*fp32": 784, "add:fp32": 10, "cmp:fp32": 5, "params": 20},
    counts={"mac:fp32*fp32": 30448, "params": 2062},
    slot_energy=8e-9,
    slot_energy_low=4e-9,
    slot_energy_high=5e-7,
    slot_arithmetic=3e-9,
    energy=2e-7,
    energy_low=1e-7,
    energy_high=8e-6,
    prices="Made-up prices",
    seconds=1.5,
    measured_joules=None,
    measured_scope="CPU not measured: a test",
    versions={"qconv": "0", "torch": "2"},
)
_DEVICE = {"device:circuits": 49, "device:gates_1q": 784, "device:gates_2q": 1176, "device:shots": 50176}


def make_row(arm: str = "float", seed: int = 0, lr: float = 0.01, multiplier: float = 1.0, **changes: Any) -> Row:
    """A row whose task has this arm, seed and setting; `changes` go to the row."""
    if arm in ("heisenberg", "strongly_entangling", "product", "random_quanvolution"):
        changes = {"slot_counts": _ROW.slot_counts | _DEVICE} | changes
    task = replace(_ROW.task, arm=arm, seed=seed, lr=lr, slot_lr_multiplier=multiplier)
    return replace(_ROW, task=task, **changes)


def make_arm(arm: str, tests: list[float], validation: float = 0.9, **changes: Any) -> list[Row]:
    """One row a seed with these test accuracies, all at one setting."""
    return [
        make_row(arm, seed, test_accuracy=test, val_accuracy=validation, **changes) for seed, test in enumerate(tests)
    ]
