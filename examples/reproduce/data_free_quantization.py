"""Data-free quantization (DFQ) of two pretrained networks to 8 bits, step by step. Run with --help for the options.

ResNet-20 (CIFAR-10) and MobileNetV2 (ImageNet) are quantized as published, and with every channel that can be rescaled
multiplied by a random factor from 1/100 to 100, which leaves the float function as it is. Each row of the tables adds
or leaves out a step; rows "calibrated" see 20 images, without labels, all others see none. No row is scored on these.

MobileNetV2's publishers folded its batch norm, so statistics are recorded on noise with the spectrum of photographs; it
says too little about deviations to absorb biases by, and that row repeats the one before.
Its photos are most likely training images, and one of them is more than a point: only differences mean anything.
ResNet-20 is tried on the CIFAR-10 test images; where they can neither be found nor fetched, on small crops of the
photos: how often it says what the float network says, of all crops and of those that the float network is 90 % sure of,
and how often it is right about photos of CIFAR-10's classes. Only the last is accuracy, and of few photos.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from protocol import markdown
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from classical.calibration import calibrate
from classical.convert import quantize
from classical.data_free import (
    correct_biases_on,
    data_free_quantize,
    equalize,
    fold_batch_norms,
    natural_noise,
    replace_relu6,
    rescale_randomly,
)
from qconv.analysis import t_interval
from qconv.pretrained import (
    MobileNetV2,
    ResNet20,
    cifar10_test,
    imagenet_photos,
    mobilenet_v2_imagenet,
    resnet20_cifar10,
)

CALIBRATION, NOISE = 20, 16  # images
CROPS = 10  # of a photo
CIFAR_IMAGES = 2000
SURE = 0.9
NOT_COUNTED = -1
# ImageNet's classes that are one of CIFAR-10's: airplane, automobile, bird, cat, dog, frog, horse, ship, truck.
# ImageNet has no deer, and CIFAR-10 no pickups.
CIFAR_CLASSES: dict[int, tuple[int, ...]] = {
    0: (404, 895),
    1: (436, 468, 511, 609, 627, 656, 661, 751, 817),
    2: (*range(7, 25), *range(80, 101), *range(127, 147)),
    3: tuple(range(281, 286)),
    5: tuple(range(151, 269)),
    6: (30, 31, 32),
    7: (339,),
    8: (403, 484, 510, 554, 628, 724, 780, 814, 871, 914),
    9: (555, 569, 675, 864, 867),
}
DFQ = "+ bias correction (all of DFQ)"

# Nagel et al. (arXiv:1906.04721, table 1), top-1 on ImageNet of a MobileNetV2 with batch norm, float and int8; second
# hand, not read from the paper. Its equalization is that with ReLU in place of ReLU6.
PUBLISHED = {
    "naive": "71.7 / 0.1",
    "equalized, ReLU6 by ReLU": "71.7 / 69.9",
    "+ absorption": "71.6 / 70.9",
    DFQ: "71.6 / 71.2",
}


class Trial(NamedTuple):
    """A network and what to try it on.

    Attributes:
        model: float, in eval().
        seen: what rows "calibrated" calibrate on, (CALIBRATION, C, H, W), none of it among the inputs.
        inputs: what all rows are scored on, (N, C, H, W).
        labels: for each column, named, what the network should say, (N,): NOT_COUNTED for inputs that do not count.
        truth: the column whose labels are true, if one is.
        photo: which photo each input is of, (N,); None where each is one of its own.
        goal: points of accuracy that DFQ may lose.
        facts: arguments of `data_free_quantize` that say what is known of the inputs.
    """

    model: nn.Module
    seen: Tensor
    inputs: Tensor
    labels: dict[str, Tensor]
    truth: str | None
    photo: Tensor | None
    goal: float
    facts: dict[str, Any]
    heading: str


# --- networks and images ---------------------------------------------------------------------------------------------


def crops(photos: Tensor) -> Tensor:
    """32x32 pixels: each photo whole, then nine parts of each at 48x48; CROPS times as many images."""
    whole, larger = (nn.functional.interpolate(photos, size=n, mode="bilinear", antialias=True) for n in (32, 48))
    return torch.cat([whole, *(larger[:, :, i : i + 32, j : j + 32] for i in (0, 8, 16) for j in (0, 8, 16))])


def held_out(count: int) -> tuple[Tensor, Tensor]:
    """Which of so many images to calibrate on, spread evenly, and which to score on."""
    if count <= CALIBRATION:
        raise ValueError(f"there are {count} images, but calibration alone takes {CALIBRATION}: add some")
    seen = torch.arange(CALIBRATION) * count // CALIBRATION
    scored = torch.ones(count, dtype=torch.bool)
    scored[seen] = False
    return seen, scored.nonzero()[:, 0]


def input_range(network: type[ResNet20 | MobileNetV2]) -> tuple[float, float]:
    ends = network.normalize(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    return float(ends.min()), float(ends.max())


def resnet20(data_dir: Path | None, images: int | None) -> Trial:
    model = resnet20_cifar10(data_dir)
    facts = {"input_range": input_range(ResNet20), "input_mean": 0.0}
    try:
        part = cifar10_test(data_dir)
    except ValueError as error:
        print(f"{error}\nResNet-20 is tried on crops of the photos instead.", file=sys.stderr)
    else:
        seen, scored = held_out(min(len(part.labels), (images or CIFAR_IMAGES) + CALIBRATION))
        heading = f"accuracy on {len(scored):,} CIFAR-10 test images"
        inputs = ResNet20.normalize(part.images)
        return Trial(model, inputs[seen], inputs[scored], {"": part.labels[scored]}, "", None, 0.5, facts, heading)
    part = imagenet_photos(data_dir)
    photos = ResNet20.normalize(part.images)
    seen, scored = held_out(len(photos))  # photos, not crops: those of one photo are alike
    known = torch.full_like(part.labels, NOT_COUNTED)
    for own, theirs in CIFAR_CLASSES.items():
        known[torch.isin(part.labels, torch.tensor(theirs))] = own
    named = scored[known[scored] != NOT_COUNTED]
    # Mirrored too, for few photos are of CIFAR-10's classes; what is mirrored counts in no other column.
    inputs = torch.cat([crops(photos[scored]), crops(photos[named].flip(3))])[:images]
    truth = torch.cat([known[scored].repeat(CROPS), known[named].repeat(CROPS)])[:images]
    photo = torch.cat([scored.repeat(CROPS), named.repeat(CROPS)])[:images]
    probabilities = scores(model, inputs).softmax(1)
    once = torch.arange(len(inputs)) < CROPS * len(scored)
    said = probabilities.argmax(1).where(once, NOT_COUNTED)
    sure = said.where(probabilities.amax(1) > SURE, NOT_COUNTED)
    labels = {"agrees": said, "agrees, sure": sure, "right": truth}
    labels = {name: column for name, column in labels.items() if (column != NOT_COUNTED).any()}
    columns = ", ".join(f"{int((column != NOT_COUNTED).sum()):,} ({name})" for name, column in labels.items())
    heading = f"crops of {len(scored)} photos, {len(named)} of them of CIFAR-10's classes; {columns}"
    right = "right" if "right" in labels else None
    return Trial(model, crops(photos[seen])[:CALIBRATION], inputs, labels, right, photo, 0.5, facts, heading)


def mobilenet_v2(data_dir: Path | None, images: int | None) -> Trial:
    part = imagenet_photos(data_dir)
    noise = MobileNetV2.normalize(natural_noise((NOISE, 3, 224, 224), torch.Generator().manual_seed(0)))
    facts = {"input_range": input_range(MobileNetV2), "input_mean": float(noise.mean()), "images": noise}
    seen, scored = held_out(len(part.labels))
    inputs, scored = MobileNetV2.normalize(part.images), scored[:images]
    heading = f"top-1 of {len(scored)} ImageNet photos"
    model = mobilenet_v2_imagenet(data_dir)
    return Trial(model, inputs[seen], inputs[scored], {"": part.labels[scored]}, "", None, 3.0, facts, heading)


@torch.no_grad()
def scores(model: nn.Module, inputs: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in inputs.split(50)])


# --- methods ---------------------------------------------------------------------------------------------------------

NONE: dict[str, Any] = {"equalization": False, "absorption": False, "correction": False}
EQUALIZED: dict[str, Any] = {"absorption": False, "correction": False}


def data_free(**options: Any) -> Callable[[nn.Module, Trial], nn.Module]:
    return lambda model, trial: data_free_quantize(model, **trial.facts, **options)[0]


def calibrated(equalized: bool, corrected: bool = False) -> Callable[[nn.Module, Trial], nn.Module]:
    """Ranges of least squared error on images instead of statistics."""

    def method(model: nn.Module, trial: Trial) -> nn.Module:
        graph = fold_batch_norms(model)[0]
        if equalized:
            graph = equalize(replace_relu6(graph)[0])[0]
        quantized = quantize(graph, weight="int8", activation="int8").eval()
        calibrate(quantized, [trial.seen], method="mse")
        return correct_biases_on(quantized, graph, trial.seen)[0] if corrected else quantized

    return method


METHODS: dict[str, Callable[[nn.Module, Trial], nn.Module]] = {
    "float": lambda model, trial: model,
    "naive": data_free(**NONE),
    "equalized, ReLU6 by ReLU": data_free(relu6="relu", **EQUALIZED),
    "equalized": data_free(**EQUALIZED),
    "+ absorption": data_free(correction=False),
    DFQ: data_free(),
    "all of DFQ, asymmetric weights": data_free(symmetric=False),
    "per channel, naive": data_free(per_channel=True, **NONE),
    "per channel, all of DFQ": data_free(per_channel=True),
    "calibrated": calibrated(False),
    "calibrated, equalized": calibrated(True),
    "calibrated, equalized, biases corrected on images": calibrated(True, True),
}
NETWORKS = {"resnet20": ("ResNet-20", resnet20), "mobilenet_v2": ("MobileNetV2", mobilenet_v2)}


def variants(model: nn.Module, seeds: int) -> list[nn.Module]:
    """The network as published, and rescaled with each seed."""
    ready = replace_relu6(fold_batch_norms(model)[0])[0]
    factors = [torch.Generator().manual_seed(seed) for seed in range(seeds)]
    return [model, *(rescale_randomly(ready, 0.01, 100, generator)[0] for generator in factors)]


def methods(name: str) -> list[str]:
    return [method for method in METHODS if name == "mobilenet_v2" or "ReLU6" not in method]


# --- the table -------------------------------------------------------------------------------------------------------


def hits(said: list[Tensor], labels: Tensor) -> list[float]:
    """Share of the inputs that count about which each variant says what it should."""
    counts = labels != NOT_COUNTED
    return [float((predicted[counts] == labels[counts]).double().mean()) for predicted in said]


def share(said: list[Tensor], labels: Tensor) -> str:
    """Points right: of one variant, or the mean of several with its interval over rescalings."""
    # Shares are whole images: equal ones claim no more certainty than one image gives.
    interval = t_interval(hits(said, labels), resolution=1 / max(1, int((labels != NOT_COUNTED).sum())))
    half = "" if math.isnan(interval.half) else f" ± {100 * interval.half:.2f}"
    return f"{100 * interval.mean:.2f}{half}"


def table(title: str, trial: Trial, found: dict[str, list[Tensor]]) -> str:
    names = [f": {name}" if name else "" for name in trial.labels]
    head = ["method", *(f"as published{n}" for n in names), *(f"rescaled{n}" for n in names)]
    lines = []
    for method, said in found.items():
        cells = [share(said[:1], labels) for labels in trial.labels.values()]
        cells += [share(said[1:], labels) if said[1:] else "" for labels in trial.labels.values()]
        lines.append([method, *cells, *([PUBLISHED.get(method, "")] if title == "MobileNetV2" else [])])
    if title == "MobileNetV2":
        head.append("published, float / int8")
    notes = f"{_intervals(trial, found[DFQ])}\n\n{_verdict(trial, found['float'], found[DFQ])}"
    return f"### {title}: {trial.heading}\n\n{markdown(head, lines)}\n\n{notes}"


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a probability of which `share` was seen in so many draws.

    Source: Wilson, J. Am. Stat. Assoc. 22 (1927), 209; it also holds where the share is 0 or 1.
    """
    z = 1.959964
    center, scale = share + z * z / (2 * count), 1 + z * z / count
    half = z * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, (center - half) / scale), min(1.0, (center + half) / scale)


def losses(trial: Trial, name: str, exact: list[Tensor], said: list[Tensor]) -> list[float]:
    """Points that each variant loses against the float network in a column."""
    labels = trial.labels[name]
    return [100 * (a - b) for a, b in zip(hits(exact, labels), hits(said, labels), strict=True)]


def over_photos(trial: Trial, labels: Tensor, said: Tensor) -> Tensor:
    """Share of each photo's crops about which a variant says what it should, of all photos that count."""
    assert trial.photo is not None
    counts = labels != NOT_COUNTED
    photos = trial.photo[counts]
    right = (said == labels)[counts].double()
    return torch.stack([right[photos == photo].mean() for photo in photos.unique()])


def _intervals(trial: Trial, said: list[Tensor]) -> str:
    """What the intervals cover, and what they leave out."""
    over = "Intervals: 95 %, over the rescalings alone (Student's t). " if len(said) > 2 else ""
    name = next(iter(trial.labels)) if trial.truth is None else trial.truth
    drawn = hits(said, trial.labels[name])[0]
    if trial.photo is None:
        count = len(trial.inputs)
        low, high = wilson(drawn, count)
        by = f"{count:,} right, by all of DFQ as published, bound"
        how = "Wilson"
    else:
        photos = over_photos(trial, trial.labels[name], said[0])
        interval = t_interval(photos.tolist(), resolution=0.5 / CROPS)
        low, high = max(0.0, interval.mean - interval.half), min(1.0, interval.mean + interval.half)
        by = f"crops ({name}), by all of DFQ as published, of {len(photos)} photos, bound"
        how = "Student's t over photos, since crops of one are alike"
    return (
        f"{over}Other images would move every figure too: {100 * drawn:.1f} % of {by} the share among all such images "
        f"to {100 * low:.1f} to {100 * high:.1f} % (95 %, {how})."
    )


def _verdict(trial: Trial, exact: list[Tensor], said: list[Tensor]) -> str:
    """What DFQ loses, and whether that is what the goal asks for."""
    lost = {name: losses(trial, name, exact, said) for name in trial.labels}
    points = {name: ", ".join(f"{each:+.2f}" for each in values) for name, values in lost.items()}
    every = "(as published, then each seed)"
    if trial.photo is None and trial.truth is not None:
        met = "met" if max(lost[trial.truth]) <= trial.goal else "missed"
        return f"All of DFQ loses {points[trial.truth]} points {every}; goal {trial.goal} at most: {met}."
    agreement = " and ".join(f"{points[name]} ({name})" for name in points if name != trial.truth)
    parts = [f"All of DFQ loses {agreement} points of agreement {every}."]
    if trial.truth is not None:
        labels = trial.labels[trial.truth]
        each = over_photos(trial, labels, exact[0]) - over_photos(trial, labels, said[0])
        half = 100 * t_interval(each.tolist(), resolution=0.5 / CROPS).half
        parts.append(
            f"Of accuracy on {len(each)} photos it loses {points[trial.truth]} points; as published ± {half:.2f} over "
            "photos (95 %, Student's t, paired)."
        )
    parts.append(
        f"The goal, at most {trial.goal} points of accuracy on CIFAR-10's test images, is unverified without them."
    )
    return " ".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS), help=f"comma-separated, of {', '.join(NETWORKS)}")
    parser.add_argument("--seeds", type=int, default=3, help="random rescalings of each network (default: 3)")
    parser.add_argument("--images", type=int, help="so many of the images (default: 2000 of CIFAR-10, all others)")
    parser.add_argument("--data-dir", type=Path, help="folder of weights and photos (default: QCONV_DATA)")
    given = parser.parse_args()
    chosen = [name.strip() for name in given.networks.split(",") if name.strip()]
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
    try:
        if given.seeds < 0 or (given.images is not None and given.images < 1):
            raise ValueError(f"--seeds is {given.seeds}, --images {given.images}: give at least 0 and 1")
        for name in chosen:
            if name not in NETWORKS:
                raise ValueError(f"unknown --networks {name!r}: valid are {', '.join(NETWORKS)}")
            title, load = NETWORKS[name]
            trial = load(given.data_dir, given.images)
            models = variants(trial.model, given.seeds)
            found: dict[str, list[Tensor]] = {method: [] for method in methods(name)}
            with bar:
                shown = bar.add_task(title, total=len(found) * len(models))
                for method, said in found.items():
                    for model in models:
                        quantized = METHODS[method](model, trial)
                        said.append(scores(quantized, trial.inputs).argmax(1))
                        bar.advance(shown)
            print(table(title, trial, found) + "\n", flush=True)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
