import math

import pytest
import torch
from torch import nn

from qconv.train import evaluate, fit


def blobs(n=120, seed=0):
    """Two classes of 1x2x2 images, apart by their brightness."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    return torch.rand(n, 1, 2, 2, generator=generator) * 0.4 + 0.6 * labels[:, None, None, None], labels


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.slot = nn.Linear(4, 4)
            self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.tanh(self.slot(x.flatten(1))))


def test_learns_what_can_be_learned():
    images, labels = blobs()
    model = Net()
    losses = []
    fit(
        model,
        images,
        labels,
        epochs=15,
        lr=0.05,
        batch_size=16,
        on_epoch=lambda epoch, loss: losses.append((epoch, loss)),
    )
    assert [epoch for epoch, _ in losses] == list(range(1, 16))
    assert losses[-1][1] < 0.1 < losses[0][1]
    assert evaluate(model, *blobs(seed=1)).accuracy == 1.0


def test_same_task_same_weights_and_no_touch_of_the_global_generator():
    weights = []
    for seed in (0, 0, 1):
        model = Net()
        before = torch.get_rng_state()
        fit(model, *blobs(), epochs=2, lr=0.01, batch_size=16, seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(model.slot.weight.detach().clone())
        torch.rand(7)  # what other code draws must not matter
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("multiplier", [1.0, 5.0, 0.1])
def test_multiplier_scales_the_slots_steps(multiplier):
    model = Net()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    moved = {}

    def after_first_step(epoch, loss):
        if epoch == 1:
            moved.update({name: (p.detach() - start[name]).abs() for name, p in model.named_parameters()})

    images, labels = blobs(32)
    fit(
        model,
        images,
        labels,
        epochs=10,
        lr=0.01,
        slot_lr_multiplier=multiplier,
        batch_size=32,
        on_epoch=after_first_step,
    )
    # Adam's first step is the learning rate itself, whatever the gradient: the schedule starts at 1/25 of the highest.
    torch.testing.assert_close(moved["head.bias"], torch.full((2,), 0.01 / 25), rtol=1e-3, atol=0)
    torch.testing.assert_close(moved["slot.bias"], torch.full((4,), multiplier * 0.01 / 25), rtol=1e-3, atol=0)


def test_weight_decay_shrinks_by_the_rate_and_is_off_by_default():
    images, labels = blobs(32)
    weights = {}
    for decay in (None, 0.0, 7.0):
        model = Net()  # the same initial weights each time
        start = model.head.weight.detach().clone()
        options = {} if decay is None else {"weight_decay": decay}
        first = {}
        fit(
            model,
            images,
            labels,
            epochs=10,
            lr=0.01,
            batch_size=32,
            on_epoch=lambda epoch, loss, first=first, model=model: first.setdefault(
                "w", model.head.weight.detach().clone()
            ),
            **options,
        )
        weights[decay] = first["w"]
    assert torch.equal(weights[None], weights[0.0])
    # Decoupled: the first step, at 1/25 of the highest rate, also takes 7 times that rate off every weight.
    torch.testing.assert_close(weights[0.0] - weights[7.0], 7.0 * 0.01 / 25 * start)
    with pytest.raises(ValueError, match="weight_decay is -1"):
        fit(Net(), images, labels, epochs=1, weight_decay=-1)


def test_frozen_parameters_stay():
    model = Net()
    model.slot.weight.requires_grad_(False)
    start = model.slot.weight.clone()
    bias = model.slot.bias.detach().clone()
    fit(model, *blobs(), epochs=1, lr=0.01)
    assert torch.equal(model.slot.weight, start)
    assert not torch.equal(model.slot.bias, bias)


def test_a_single_step_and_a_short_last_batch_train():
    images, labels = blobs(33)
    for epochs, batch in ((1, 64), (1, 32), (2, 20)):
        model = Net()
        start = model.head.weight.detach().clone()
        fit(model, images, labels, epochs=epochs, lr=0.01, batch_size=batch)
        assert torch.isfinite(model.head.weight).all()
        assert not torch.equal(model.head.weight, start)


class Constant(nn.Module):
    """Always the same scores; counts how often dropout would have been on."""

    def __init__(self):
        super().__init__()
        self.modes = []

    def forward(self, x):
        self.modes.append(self.training)
        return torch.tensor([0.0, 1.0, 2.0]).expand(len(x), 3)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_score_of_a_model_whose_answers_are_known(batch_size):
    model = Constant()
    score = evaluate(model, torch.zeros(5, 1, 2, 2), torch.tensor([2, 2, 0, 1, 2]), batch_size=batch_size)
    assert score.accuracy == 3 / 5
    assert score.n == 5
    log_sum = math.log(1 + math.e + math.e**2)
    assert score.loss == pytest.approx(log_sum - (2 + 2 + 0 + 1 + 2) / 5)
    assert not any(model.modes)
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0, "lr": 0.1}, "epochs and batch_size must be at least 1, but are 0 and 64"),
        ({"epochs": 1, "lr": 0.1, "batch_size": 0}, "are 1 and 0"),
        ({"epochs": 1, "lr": 0.0}, "above 0, but are 0.0 and 1.0"),
        ({"epochs": 1, "lr": 0.1, "slot_lr_multiplier": -1.0}, "above 0, but are 0.1 and -1.0"),
        ({"epochs": 1, "lr": math.nan}, "above 0"),
    ],
)
def test_arguments_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(Net(), *blobs(), **arguments)


@pytest.mark.parametrize(("n_images", "n_labels"), [(4, 3), (0, 0)])
def test_images_without_labels(n_images, n_labels):
    images, labels = torch.zeros(n_images, 1, 2, 2), torch.zeros(n_labels, dtype=torch.long)
    for work in (lambda: fit(Net(), images, labels, epochs=1), lambda: evaluate(Net(), images, labels)):
        with pytest.raises(ValueError, match=f"{n_images} images and {n_labels} labels"):
            work()


def test_a_loss_of_ones_own_and_a_call_after_each_step():
    images, labels = blobs(33)
    seen, calls = [], []

    def loss(scores, targets):
        seen.append((scores.shape, targets.shape))
        return ((scores - targets) ** 2).mean()

    targets = torch.eye(2)[labels]
    model = Net()
    before = ((model(images) - targets) ** 2).mean()
    fit(model, images, targets, epochs=20, lr=0.03, batch_size=20, loss=loss, on_step=lambda: calls.append(len(seen)))
    assert calls == list(range(1, 41))
    assert seen[:2] == [((20, 2), (20, 2)), ((13, 2), (13, 2))]
    assert ((model(images) - targets) ** 2).mean() < 0.3 * before


def test_what_a_call_after_a_step_changes_stays_changed():
    model = Net()

    def bound():
        with torch.no_grad():
            model.head.weight.clamp_(-0.01, 0.01)

    fit(model, *blobs(), epochs=2, lr=0.05, on_step=bound)
    assert model.head.weight.abs().max() <= 0.01


@pytest.mark.parametrize(("warmup", "highest"), [(0.1, 10), (0.3, 30), (0.01, 1)])
def test_the_rate_rises_for_a_share_of_the_steps(warmup, highest, monkeypatch):
    rates = []
    made = torch.optim.lr_scheduler.OneCycleLR

    class Watched(made):
        def step(self, *arguments):
            super().step(*arguments)
            rates.append(self.get_last_lr()[0])

    monkeypatch.setattr(torch.optim.lr_scheduler, "OneCycleLR", Watched)
    images, labels = blobs(100)
    fit(Net(), images, labels, epochs=1, lr=0.02, warmup=warmup, batch_size=1)
    # The scheduler steps once as it is built; the highest rate is reached after the share of the steps.
    top = max(range(len(rates)), key=rates.__getitem__)
    assert abs(top - highest) <= 1
    assert rates[top] == pytest.approx(0.02, rel=1e-2)
    assert rates[-1] < 0.02 / 1000


@pytest.mark.parametrize("warmup", [0.0, 1.0, -0.1, math.nan])
def test_the_share_of_the_rise(warmup):
    with pytest.raises(ValueError, match="warmup is a share"):
        fit(Net(), *blobs(), epochs=1, warmup=warmup)
