"""Pruning while training: the cubic schedule, interrupted loops, a real network on scikit-learn's digits."""

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor, nn

from classical.pruning import CubicSchedule, MagnitudePruner, finalize, gradient_scores, prune, sparsity


def sample(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))


@given(
    begin=st.integers(0, 50),
    every=st.integers(1, 20),
    times=st.integers(1, 20),
    step=st.integers(0, 600),
    initial=st.floats(0, 0.5),
    final=st.floats(0.5, 1),
)
def test_cubic_schedule_is_its_closed_form(
    begin: int, every: int, times: int, step: int, initial: float, final: float
) -> None:
    progress = CubicSchedule(begin, every, times)(step)
    prunings = [t for t in range(begin, begin + times * every + 1, every) if t <= step]
    if not prunings:
        assert progress is None
    else:
        assert progress is not None
        s_t = final + (initial - final) * (1 - (prunings[-1] - begin) / (times * every)) ** 3
        assert initial + (final - initial) * progress == pytest.approx(s_t, abs=1e-12)


def test_the_model_follows_the_schedule() -> None:
    model = network()
    pruner = MagnitudePruner(model, final=0.93, initial=0.2, schedule=CubicSchedule(3, 2, 4), skip=("0",))
    fractions, pruned = [], []
    for _ in range(15):
        pruned.append(pruner.step())
        fractions.append(sparsity(model).rows[1].nonzero)
    s = [0.93 - 0.73 * (1 - n / 4) ** 3 for n in range(5)]  # prunings after steps 3, 5, 7, 9 and 11
    left = [960 - round(960 * x) for x in s]
    assert fractions == [960, 960, *np.repeat(left, 2), *[left[-1]] * 3]
    assert pruned == [step in (3, 5, 7, 9, 11) for step in range(1, 16)]
    assert sparsity(model).rows[0].nonzero == 54


@pytest.mark.parametrize("arguments", [(-1, 1, 1), (0, 0, 1), (0, 1, 0), (0, 1.5, 3), (0, 1, 3.0), ("0", 1, 1)])
def test_schedule_errors(arguments: tuple[Any, Any, Any]) -> None:
    with pytest.raises(ValueError, match=r"begin=.*every=.*times="):
        CubicSchedule(*arguments)


def test_pruning_in_steps_is_pruning_the_weights_of_each_step() -> None:
    ours, theirs = network(), network()
    pruner = MagnitudePruner(ours, final={"4": 0.8, "0": 0.4}, schedule=lambda step: step / 4, structure="weight")
    for step in range(1, 5):
        for model in (ours, theirs):
            with torch.no_grad():  # a training step that moves every weight
                for module in (model[0], model[4]):
                    noise = sample(*module.weight.shape, seed=step)
                    stored = getattr(module, "parametrizations", {"weight": None})["weight"]
                    (module.weight if stored is None else stored.original).add_(noise)
        pruner.step()
        prune(theirs, {"4": 0.2 * step, "0": 0.1 * step})
        for index in (0, 4):
            assert torch.equal(ours[index].weight, theirs[index].weight)
        assert pruner.target("4") == pytest.approx(0.2 * step)


def test_gradient_pruner_ranks_by_weight_times_mean_gradient() -> None:
    model, x = network().eval(), sample(6, 1, 6, 6)
    scores = gradient_scores(model, (model(part).square().sum() for part in x.split(2)))
    expected = network().eval()
    prune(expected, 0.7, scores=scores, scope="global")
    schedule: Callable[[int], float] = lambda step: float(step >= 3)  # noqa: E731
    pruner = MagnitudePruner(model, final=0.7, schedule=schedule, score="gradient", scope="global")
    for part in x.split(2):
        model.zero_grad()
        model(part).square().sum().backward()
        pruner.step()
    for index in (0, 4):
        assert torch.equal(model[index].weight, expected[index].weight)
    model.zero_grad()
    with pytest.raises(ValueError, match=r"weight of '0' has no gradient: call step\(\) between"):
        pruner.step()


# --- interruption ---


class Run:
    """A training run with everything that has a state."""

    def __init__(self, score: Any, structure: Any) -> None:
        self.model = network()
        self.optimizer = torch.optim.Adam(self.model.parameters(), 0.01)
        self.pruner = MagnitudePruner(
            self.model, final=0.75, schedule=CubicSchedule(4, 3, 5), score=score, structure=structure
        )
        self.parts = {"model": self.model, "optimizer": self.optimizer, "pruner": self.pruner}

    def train(self, steps: range) -> None:
        for step in steps:
            self.optimizer.zero_grad()
            x, y = sample(8, 1, 6, 6, seed=step), torch.arange(8)
            nn.functional.cross_entropy(self.model(x), y).backward()
            self.optimizer.step()
            self.pruner.step()


@pytest.mark.parametrize("stop", [0, 2, 8, 11, 18])
@pytest.mark.parametrize(
    ("score", "structure"), [("magnitude", "weight"), ("gradient", "weight"), ("magnitude", "filter")]
)
def test_an_interrupted_run_goes_on_bit_for_bit(score: str, structure: str, stop: int) -> None:
    whole, first, second = (Run(score, structure) for _ in range(3))
    whole.train(range(24))
    first.train(range(stop))
    file = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in first.parts.items()}, file)
    first.train(range(stop, 24))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for name, part in second.parts.items():
        part.load_state_dict(saved[name])
    second.train(range(stop, 24))
    for other in (first, second):
        for a, b in zip(whole.model.state_dict().values(), other.model.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    assert second.pruner.steps == 24
    assert sparsity(whole.model).fraction > 0.6


def test_gradients_are_those_since_the_last_pruning() -> None:
    model = nn.Sequential(nn.Linear(4, 1, bias=False))
    nn.init.ones_(model[0].weight)
    pruner = MagnitudePruner(model, final=0.5, schedule=lambda step: step // 2 / 2, score="gradient")
    zeros = []
    for gradient in ([4, 1, 9, 2], [4, 1, 9, 2], [3, 0, 1, 3], [3, 0, 1, 3]):  # over all four, the last is weakest
        model[0].parametrizations.weight.original.grad = torch.tensor([gradient], dtype=torch.float32)
        pruner.step()
        zeros.append((model[0].weight[0] == 0).nonzero().flatten().tolist())
    assert zeros == [[], [1], [1], [1, 2]]


def test_a_state_stays_as_it_was() -> None:
    pruner = MagnitudePruner(network(), final=0.5, schedule=lambda step: step / 10)
    state = pruner.state_dict()
    pruner.step()
    assert all(keep.all() for keep in state["masks"].values())
    assert not all(keep.all() for keep in pruner.state_dict()["masks"].values())


def test_the_pruner_restores_its_masks_alone() -> None:
    first, second = network(), network()
    pruner, other = (MagnitudePruner(model, final=0.5, schedule=lambda step: 1.0) for model in (first, second))
    pruner.step()
    other.load_state_dict(pruner.state_dict())
    for index in (0, 4):
        assert torch.equal(first[index].weight, second[index].weight)
    assert not other.step()  # it is done


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("steps"), "a pruner's state has"),
        (lambda state: state["masks"].pop("4"), r"masks of \['0'\] but this pruner of \['0', '4'\]"),
        (lambda state: state["masks"].update({"4": torch.ones(2)}), r"shape \(2,\) but its weight \(10, 96\)"),
        (lambda state: state["gradients"].update({"4": torch.ones(2)}), "gradients of"),
    ],
)
def test_foreign_states_are_refused(change: Callable[[Any], Any], message: str) -> None:
    pruner = MagnitudePruner(network(), final=0.5, schedule=lambda step: step / 10)
    pruner.step()
    state = pruner.state_dict()
    change(state)
    with pytest.raises(ValueError, match=message):
        pruner.load_state_dict(state)
    assert pruner.steps == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"final": 1.2}, "must be from 0 to 1"),
        ({"final": 0.5, "initial": 0.7}, "initial is 0.7 but must be from 0 to the final fraction 0.5"),
        ({"final": {"4": 0.5}, "scope": "global"}, "give one fraction"),
        ({"final": {"5": 0.5}}, "no prunable layer '5'"),
        ({"final": 0.5, "score": "size"}, "score is 'size'"),
        ({"final": 0.5, "structure": "row"}, "structure is 'row'"),
        ({"final": 0.5, "structure": "layer"}, "rank layers with scope='global'"),
        ({"final": 0.5, "schedule": 5}, "schedule is 5 but must be a function of the step"),
    ],
)
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MagnitudePruner(network(), **{"schedule": lambda step: 1.0} | arguments)


# --- a real training ---


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    x, y = torch.tensor(images[order] / 16, dtype=torch.float32), torch.tensor(labels[order])
    return x[:1200], y[:1200], x[1200:], y[1200:]


def test_iterative_pruning_keeps_the_accuracy_on_digits() -> None:
    x, y, test_x, test_y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)

    def epochs(n: int, after_step: Callable[[], object] = lambda: None) -> float:
        for _ in range(n):
            for chosen in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[chosen]), y[chosen]).backward()
                optimizer.step()
                after_step()
        return accuracy(model)

    def accuracy(network: nn.Module) -> float:
        with torch.no_grad():
            return float((network(test_x).argmax(1) == test_y).float().mean())

    dense = epochs(20)
    one_shot = copy.deepcopy(model)
    prune(one_shot, 0.8)
    shot = accuracy(finalize(one_shot))
    pruner = MagnitudePruner(model, final=0.8, schedule=CubicSchedule(0, 19, 10))  # an epoch has 19 steps
    gradual = epochs(15, pruner.step)
    assert sparsity(model).fraction == pytest.approx(0.8, abs=1e-4)
    assert dense > 0.96
    assert gradual > dense - 0.01
    assert shot < gradual - 0.1
