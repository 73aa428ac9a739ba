"""Methods of compression by name: what they do to a float model, and for how long they train it.

A method is one step, or several joined by "+":
    QUANTIZER   a name of `classical.quantizer_names()`: layers become QuantizedConv2d and QuantizedLinear
    dfq         data-free quantization: of the images, the smallest and the largest number are all that is looked at
    float       nothing is compressed, only trained on as a quantizer is: what the training alone is worth
    prune       the smallest weights become zero while the model trains, ever fewer at a time
    share       the weights of a layer take few values, which are then trained
    huffman     the codes in the file are words of unequal length
in this order: prune first, then share or QUANTIZER, then huffman, as in "lsq2", "prune+twn", "prune+share+huffman".
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, one_hot
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

from circuits.naming import unknown
from classical.calibration import calibrate
from classical.checks import real, whole
from classical.convert import quantize
from classical.data_free import Report, data_free_quantize
from classical.pruning.masks import finalize, keep_zeros, private_copy, prunable
from classical.pruning.schedules import CubicSchedule, MagnitudePruner
from classical.quantizers import quantizer, quantizer_names
from classical.storage.sharing import share_parameter
from qconv.binarization import reestimate
from qconv.compression_checks import SIGNS, check_inputs
from qconv.layouts import lay_out, pooling_fast
from qconv.train import fit

LEAST_STEPS = 1000
"""Training steps, at least, where the number of epochs is not given: small sets take more epochs."""

DISTILL = 0.7
"""Share of the loss that compares scores with the float model's, unless given."""

Progress = Callable[[str, int, int, float], None]
"""Called with (step of the method, epochs done, epochs of this step, mean training loss of the epoch)."""

_AFTER = {  # what may follow each kind of step
    "prune": ("share", "quantize", "huffman"),
    "share": ("huffman",),
    "quantize": ("huffman",),
    "dfq": ("huffman",),
    "float": (),
    "huffman": (),
}
_EPOCHS = {"prune": 30, "share": 5, "quantize": 4, "float": 4}
_AGAIN = 6  # a method that trains twice trains so many times shorter the second time
_RATES = {"prune": 2e-3, "share": 1e-3, "quantize": 1e-3, "float": 1e-3}
_SIGN_RATE = 2e-3  # latent weights that have to change sign take larger steps
_BITS = {"share": 4, "dfq": 8, "int": 8, "lsq": 2, "dorefa": 2, "rq": 4, "rq_st": 2, "lq": 2, "hwgq": 2}
_SPARSITY = 0.9
_WARMUP = 0.1
_PRUNING_ENDS = 0.6  # share of the steps; the rest is for recovering
_PRUNE_EVERY = 50  # steps
_CALIBRATION = 1024  # images
_SETTLING = 64  # batches
_TEMPERATURE = 3.0  # scores are divided by it before they are compared with the float model's


@dataclass(frozen=True)
class Recipe:
    """What a method does, every choice made; build one with `recipe`.

    Args:
        method: its full name, "lsq2" and not "lsq".
        weight, activation: quantizers of the layers; None where layers stay float.
        edges: quantizers (weight, activation) of the first and the last layer where they differ from the others'.
        bits: of shared values or of data-free quantization; else None.
        sparsity: share of the weights that becomes zero; None without pruning.
        epochs: passes over the images of the first step that trains; None for the method's own number.
        lr: highest learning rate of all steps that train; None for the method's own.
        distill: share of the loss that compares scores with the float model's; the rest compares with the labels.
    """

    method: str
    weight: str | None = None
    activation: str | None = None
    edges: tuple[str, str] | None = None
    bits: int | None = None
    sparsity: float | None = None
    epochs: int | None = None
    lr: float | None = None
    distill: float = 0.0

    @property
    def steps(self) -> tuple[str, ...]:
        """Kinds of its steps: "prune", "share", "quantize", "dfq", "float", "huffman"."""
        return tuple(_kind(step) for step in self.method.split("+"))

    @property
    def coding(self) -> str:
        """How its file is written, see `classical.storage.save`."""
        if "huffman" in self.steps:
            return "auto"
        return "packed" if self.sparsity is None else "sparse"

    def schedule(self, n_images: int, batch_size: int) -> dict[str, int]:
        """Epochs of each step that trains: at least `LEAST_STEPS` batches in the first unless epochs are given."""
        trained = [step for step in self.steps if step in _EPOCHS]
        if not trained:
            return {}
        first = self.epochs
        if first is None:
            calibrated = trained == ["quantize"] and _is_wide_integer(self.weight)
            first = 0 if calibrated else max(_EPOCHS[trained[0]], -(-LEAST_STEPS // -(-n_images // batch_size)))
        return {trained[0]: first} | {step: max(1, first // _AGAIN) for step in trained[1:]}

    def rate(self, step: str) -> float:
        """Highest learning rate of one step."""
        if self.lr is not None:
            return self.lr
        return _SIGN_RATE if step == "quantize" and self.activation in SIGNS else _RATES[step]


def recipe(
    method: str,
    *,
    bits: int | None = None,
    sparsity: float | None = None,
    epochs: int | None = None,
    lr: float | None = None,
    distill: float = DISTILL,
) -> Recipe:
    """The recipe of a method.

    Quantizers of weights that also quantize activations do both ("lsq2": both of 2 bits); those that do not (twn, ttq,
    naqN) run on 8-bit activations. hwgqN is of activations, its weights are XNOR-Net's, as in its paper. Except with
    intN, the first and the last layer take 8-bit weights and activations, the usual exception.

    Args:
        method: see the module; of a family the name alone will do ("lsq"), completed by `bits`.
        bits: of a quantizer's family, of shared values, or of data-free quantization.
        sparsity: share of the weights to prune, above 0 and below 1; 0.9 by default.
        epochs: passes over the images of the first step that trains, 0 for a quantizer that is only calibrated. By
            default 4 for a quantizer (none for intN of 8 bits and more) and float, 30 for pruning, 5 for sharing. A
            second step trains a sixth as long.
        lr: highest learning rate; by default 0.002 for pruning and signs, 0.001 otherwise.
        distill: share of the loss that compares scores with the float model's, 0 to 1.

    Raises:
        ValueError: unknown steps, steps in a wrong order, or arguments that do not fit the method.

    Source: hwgq: Cai et al., arXiv:1702.00953. prune+share+huffman: Han, Mao & Dally, arXiv:1510.00149. distill:
        Hinton, Vinyals & Dean, arXiv:1503.02531.
    """
    steps = _completed(method, bits)
    kinds = [_kind(step) for step in steps]
    for before, after in pairwise(kinds):
        if after not in _AFTER[before]:
            raise ValueError(
                f"method {method!r} has {after} after {before}: prune first, then share or a quantizer, then huffman; "
                "dfq comes alone or before huffman, float alone"
            )
    if kinds == ["huffman"]:
        raise ValueError("method 'huffman' alone changes nothing: put it behind another step, as in 'share+huffman'")
    if sparsity is not None and "prune" not in kinds:
        raise ValueError(f"sparsity is {sparsity} but method {method!r} prunes nothing: put 'prune+' before it")
    if sparsity is not None and not (real(sparsity) and 0 < sparsity < 1):
        raise ValueError(f"sparsity is {sparsity!r} but must be above 0 and below 1")
    least = 0 if kinds[0] == "quantize" else 1
    if epochs is not None and (not whole(epochs, least) or "dfq" in kinds):
        raise ValueError(
            f"epochs is {epochs!r} but method {method!r} takes "
            + ("none" if "dfq" in kinds else f"{least} or more, whole")
        )
    if lr is not None and not (real(lr) and lr > 0):
        raise ValueError(f"lr is {lr!r} but must be above 0")
    if not real(distill, 0, 1):
        raise ValueError(f"distill is {distill!r} but must be a share of the loss, from 0 to 1")
    name = next((step for step, kind in zip(steps, kinds, strict=True) if kind == "quantize"), None)
    weight, activation, edges = (None, None, None) if name is None else _quantizers(name)
    if epochs == 0 and activation is not None and not activation.startswith("int"):
        raise ValueError(f"epochs is 0 but {activation!r} learns its levels in training: give at least 1")
    if "prune" in kinds and weight is not None and not _keeps_zeros(weight):
        raise ValueError(
            f"method {method!r} prunes weights to 0 but {name!r} turns 0 into other weights: choose another quantizer"
        )
    own_bits = next((_BITS[kind] if bits is None else bits for kind in kinds if kind in ("share", "dfq")), None)
    fewest = 2 if "dfq" in kinds else 1
    if own_bits is not None and not fewest <= own_bits <= 16:
        raise ValueError(f"bits is {bits} but method {method!r} takes {fewest} to 16")
    pruned = (_SPARSITY if sparsity is None else sparsity) if "prune" in kinds else None
    return Recipe("+".join(steps), weight, activation, edges, own_bits, pruned, epochs, lr, distill)


def method_names() -> tuple[str, ...]:
    """Steps that a method may consist of."""
    weights, activations = (quantizer_names(role) for role in ("weight", "activation"))
    hwgq = [name for name in activations if name.startswith("hwgq")]
    return (*(name for name in weights if name != "float"), *hwgq, "dfq", "float", "prune", "share", "huffman")


def _kind(step: str) -> str:
    return step if step in _AFTER else "quantize"


def _completed(method: str, bits: int | None) -> list[str]:
    """Full names of the steps; what takes no bits, or lacks them, is refused."""
    names, steps = method_names(), []
    if not isinstance(method, str) or not all(part.strip() for part in method.split("+")):
        raise ValueError(f"method is {method!r} but must name a step, or several with a + between: 'int8', 'prune+twn'")
    if bits is not None and not whole(bits, 1):
        raise ValueError(f"bits is {bits!r} but must be a whole number from 1")
    used = bits is None
    for step in (part.strip() for part in method.split("+")):
        if step in _BITS and _kind(step) == "quantize" and step not in names:
            step, used = f"{step}{_BITS[step] if bits is None else bits}", True
        used |= step in ("share", "dfq")
        if step not in names:
            few = [name for name in names if not name.startswith("int") or name in ("int4", "int8", "int8_channel")]
            raise unknown("step of a method", step, few)
        steps.append(step)
    if not used:
        families = ", ".join(_BITS)
        raise ValueError(f"bits is {bits} but method {method!r} leaves no choice of bits: those that do are {families}")
    return steps


def _quantizers(name: str) -> tuple[str, str, tuple[str, str] | None]:
    """Quantizers of weights, of activations, and of the first and last layer."""
    if name.startswith("hwgq"):
        return "xnor", name, ("int8", "int8")
    if name.startswith("int"):
        return name, name.split("_")[0], None
    activation = name if name in quantizer_names("activation") else "int8"
    return name, activation, ("int8", "int8")


def _keeps_zeros(weight: str) -> bool:
    """Whether a weight of 0 stays 0, by what the quantizer does."""
    weights = torch.arange(-50.0, 51.0)[None]
    return not quantizer(weight).eval()(weights)[weights == 0].any()


def _is_wide_integer(weight: str | None) -> bool:
    """Whether rounding costs so little that calibration will do."""
    return weight is not None and weight.startswith("int") and quantizer(weight).bits >= 8


# --- carrying it out -------------------------------------------------------------------------------------------------


def structure(
    model: nn.Module,
    chosen: Recipe,
    *,
    skip: Collection[str] = (),
    input_range: tuple[float, float] | None = None,
    on_report: Callable[[Report], object] | None = None,
) -> nn.Module:
    """A copy of a float model with the layers that the recipe ends with, untrained: what its file is loaded into.

    In front of signs (bnn, xnor) nn.ReLU becomes nn.Hardtanh: the sign of what ReLU hands on is always +1.

    Args:
        model: a float model.
        chosen: the recipe.
        skip: names of layers to leave float.
        input_range: for data-free quantization, which trains nothing: smallest and largest number of the images; each
            image has its own range unless given.
        on_report: called with what data-free quantization did to which layers, and what it left out.
    """
    if "dfq" in chosen.steps:
        assert chosen.bits is not None
        found, report = data_free_quantize(model, bits=chosen.bits, skip=skip, input_range=input_range)
        if on_report is not None:
            on_report(report)
        return found
    if chosen.weight is None or chosen.activation is None:
        return private_copy(model)
    small: nn.Module = quantize(
        private_copy(model),
        weight=chosen.weight,
        activation=chosen.activation,
        first=chosen.edges,
        last=chosen.edges,
        skip=skip,
    )
    if chosen.activation in SIGNS:
        for module in list(small.modules()):
            for name, child in module.named_children():
                if type(child) is nn.ReLU:
                    setattr(module, name, nn.Hardtanh())
    return small


def carry_out(
    chosen: Recipe,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 128,
    seed: int = 0,
    skip: Collection[str] = (),
    progress: Progress | None = None,
    on_report: Callable[[Report], object] | None = None,
) -> nn.Module:
    """Compress a copy of a float model.

    Args:
        chosen: what to do.
        model: (B, C, H, W) -> (B, classes), trained; it stays as it is.
        images: (N, C, H, W), to train on and to calibrate ranges with; data-free quantization takes the smallest and
            the largest number alone.
        labels: (N,), int64.
        batch_size: images a step.
        seed: of the order of the images and of all else that is drawn.
        skip: names of layers to leave as they are.
        progress: called after each epoch.
        on_report: as for `structure`.

    Returns:
        The compressed model in eval mode; pruned weights are zeros, shared ones equal numbers.

    Raises:
        ValueError: a method that the model does not suit; batch_size or seed out of range.
    """
    for name, number, least in (("batch_size", batch_size, 1), ("seed", seed, 0)):
        if not whole(number, least):
            raise ValueError(f"{name} is {number!r} but must be a whole number from {least}")
    epochs = chosen.schedule(len(images), batch_size)
    small = private_copy(model)
    targets = _targets(model, images, labels) if chosen.distill and any(epochs.values()) else labels
    loss = partial(_distilled, share=chosen.distill) if targets is not labels else cross_entropy

    def train(step: str, on_step: Callable[[], object] | None = None) -> None:
        lay_out(small, images[:2])
        with _without_dropout(small):
            fit(
                small,
                images,
                targets,
                epochs=epochs[step],
                lr=chosen.rate(step),
                warmup=_WARMUP,
                batch_size=batch_size,
                seed=seed,
                loss=loss,
                on_step=on_step,
                on_epoch=None if progress is None else lambda done, mean: progress(step, done, epochs[step], mean),
            )
        small.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    devices = sorted({p.device.index or 0 for p in model.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # for what draws from the global generator: dropout, relaxed quantizers
        for step in chosen.steps:
            if step == "prune":
                _prune(small, chosen, epochs["prune"] * -(-len(images) // batch_size), skip, train)
            elif step == "share":
                _share(small, chosen, skip, train)
            elif step == "dfq":
                ends = (float(images.min()), float(images.max()))
                small = structure(small, chosen, skip=skip, input_range=ends, on_report=on_report)
            elif step == "float":
                train("float")
            elif step == "quantize":
                small = structure(small, chosen, skip=skip)
                check_inputs(small, images[:batch_size])
                if chosen.sparsity is not None:
                    keep_zeros(small, skip)
                if epochs["quantize"]:
                    train("quantize")
                    _settle(small, torch.split(images, batch_size)[:_SETTLING])
                else:
                    calibrate(small, torch.split(images[:_CALIBRATION], batch_size))
                finalize(small)
    return small.eval()


def _settle(small: nn.Module, batches: Sequence[Tensor]) -> None:
    """Average the statistics of batch norms again: codes that jumped till the end, or were noisy (RQ), had others."""
    if any(isinstance(module, _BatchNorm) and module.track_running_stats for module in small.modules()):
        reestimate(small, batches)


@torch.no_grad()
def _targets(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """For each image the model's scores, then a 1 for the true class and 0 for the others."""
    teacher = pooling_fast(model).eval()
    scores = torch.cat([teacher(batch) for batch in torch.split(images, _CALIBRATION)])
    return torch.cat((scores, one_hot(labels, scores.shape[1]).to(scores.dtype)), 1)


def _distilled(scores: Tensor, targets: Tensor, share: float) -> Tensor:
    """Cross-entropy with the labels, and T^2 times the divergence from the float model's softmax at temperature T.

    Source: Hinton, Vinyals & Dean, arXiv:1503.02531, section 2.
    """
    theirs, labels = targets.chunk(2, 1)
    ours, theirs = (log_softmax(each / _TEMPERATURE, 1) for each in (scores, theirs))
    far = kl_div(ours, theirs, log_target=True, reduction="batchmean")
    return (1 - share) * cross_entropy(scores, labels) + share * _TEMPERATURE**2 * far


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """A compressed network has no units to spare."""
    chances = {module: module.p for module in model.modules() if isinstance(module, _DropoutNd)}
    for module in chances:
        module.p = 0.0
    try:
        yield
    finally:
        for module, chance in chances.items():
            module.p = chance


def _prune(
    small: nn.Module,
    chosen: Recipe,
    steps: int,
    skip: Collection[str],
    train: Callable[[str, Callable[[], object]], None],
) -> None:
    """Prune over the first part of the steps, the weakest weights of the whole model first."""
    assert chosen.sparsity is not None
    every = max(1, min(_PRUNE_EVERY, steps // 10))
    begin = int(_WARMUP * steps / 2)
    times = max(1, int((_PRUNING_ENDS * steps - begin) / every))
    schedule = CubicSchedule(begin, every, times)
    pruner = MagnitudePruner(small, final=chosen.sparsity, schedule=schedule, scope="global", skip=skip)
    train("prune", pruner.step)
    finalize(small)


def _share(small: nn.Module, chosen: Recipe, skip: Collection[str], train: Callable[[str], None]) -> None:
    assert chosen.bits is not None
    layers = prunable(small, skip)
    for layer in layers.values():
        share_parameter(layer, bits=chosen.bits)
    train("share")
    for layer in layers.values():
        parametrize.remove_parametrizations(layer, "weight")
