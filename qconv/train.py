"""Train and evaluate any classifier; nothing here knows what a quantum layer is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Score:
    """Accuracy in [0, 1] and mean cross-entropy in nats over `n` images."""

    accuracy: float
    loss: float
    n: int


def _check(images: Tensor, labels: Tensor) -> None:
    if len(images) != len(labels) or not len(images):
        raise ValueError(
            f"there are {len(images)} images and {len(labels)} labels: give one label an image, at least one"
        )


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    lr: float = 0.01,
    slot_lr_multiplier: float = 1.0,
    weight_decay: float = 0.0,
    warmup: float = 0.3,
    batch_size: int = 64,
    seed: int = 0,
    loss: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
    on_step: Callable[[], object] | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> None:
    """Train `model` in place by Adam under a one-cycle schedule on cross-entropy (AdamW where weight_decay is not 0).

    The same model, data and arguments give the same weights (bit for bit with the same number of torch threads).

    Args:
        model: (B, C, H, W) -> (B, classes). Parameters that need no gradient stay as they are.
        images: (N, C, H, W), floating point.
        labels: (N,), int64, or (N, ...) what else `loss` takes.
        epochs: passes over the data, from 1.
        lr: the schedule's highest learning rate, above 0.
        slot_lr_multiplier: factor on `lr` for the parameters of `model.slot`, above 0.
        weight_decay: each step also multiplies all parameters by 1 - weight_decay * learning rate, from 0.
        warmup: share of the steps in which the learning rate rises, above 0 and below 1; it then falls as a cosine.
        batch_size: images a step, from 1; the last batch of an epoch may be smaller.
        seed: draws the order of the images.
        loss: (scores (B, classes), labels of the batch) -> mean loss; cross-entropy unless given.
        on_step: called after each step, for what else changes weights: a pruning schedule, a bound.
        on_epoch: called with (epochs done, mean training loss of the epoch).

    Raises:
        ValueError: an argument is out of range, or images and labels differ in number.
    """
    _check(images, labels)
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, but are {epochs} and {batch_size}")
    if not (lr > 0 and slot_lr_multiplier > 0):
        raise ValueError(f"lr and slot_lr_multiplier must be above 0, but are {lr} and {slot_lr_multiplier}")
    if not 0 < warmup < 1:
        raise ValueError(f"warmup is a share of the steps, above 0 and below 1, but is {warmup}")
    if not 0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay is {weight_decay}: give a number from 0")
    slot = [p for name, p in model.named_parameters() if name.startswith("slot.") and p.requires_grad]
    rest = [p for name, p in model.named_parameters() if not name.startswith("slot.") and p.requires_grad]
    parts = [(p, rate) for p, rate in ((rest, lr), (slot, lr * slot_lr_multiplier)) if p]
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in parts], weight_decay=weight_decay)
    steps = epochs * -(-len(images) // batch_size)
    # A rise over exactly one step makes torch divide zero by zero.
    rise = warmup if warmup * steps != 1 else warmup / 2
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[rate for _, rate in parts], total_steps=steps, pct_start=rise
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.split(torch.randperm(len(images), generator=generator), batch_size):
            optimizer.zero_grad()
            found = loss(model(images[chosen]), labels[chosen])
            found.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if on_step is not None:
                on_step()
            total += found.item() * len(chosen)
        if on_epoch is not None:
            on_epoch(epoch + 1, total / len(images))


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 512) -> Score:
    """Accuracy and mean cross-entropy of `model` in eval mode; its mode is put back afterwards.

    Args:
        model: (B, C, H, W) -> (B, classes).
        images: (N, C, H, W), N at least 1.
        labels: (N,), int64.
        batch_size: images a forward pass.

    Raises:
        ValueError: images and labels differ in number, or there are none.
    """
    _check(images, labels)
    was_training = model.training
    model.eval()
    correct, loss = 0, 0.0
    for x, y in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
        scores = model(x)
        correct += int((scores.argmax(1) == y).sum())
        loss += cross_entropy(scores, y, reduction="sum").item()
    model.train(was_training)
    return Score(correct / len(images), loss / len(images), len(images))
