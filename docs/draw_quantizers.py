"""Write quantizers.md and quantizers.png beside this file: every quantizer's equation, levels, gradient and source.

Run `python docs/draw_quantizers.py` after a change. Levels and curves are computed by the quantizers themselves.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from classical.quantizers import Float, Quantizer, Role, quantizer, quantizer_names

HERE = Path(__file__).parent


class Entry(NamedTuple):
    """What the page says about one quantizer; `shown` is the name that is drawn."""

    title: str
    names: Sequence[str]
    role: Role
    shown: str
    equation: str
    gradient: str
    learned: str
    source: str


def _numbered(pattern: str, *numbers: int) -> list[str]:
    return [pattern.format(n) for n in numbers]


_BITS, _LEARNED_BITS = range(2, 17), range(2, 9)
ENTRIES = (
    Entry(
        "Integers, symmetric",
        [*_numbered("int{}", *_BITS), *_numbered("int{}_channel", *_BITS)],
        "weight",
        "int3",
        "Q(w) = s round(w / s), s = max\\|w\\| / (2^(b-1) - 1), of the tensor or of each output channel",
        "dQ/dw = 1",
        "",
        "Jacob et al. [1712.05877](https://arxiv.org/abs/1712.05877), Krishnamoorthi "
        "[1806.08342](https://arxiv.org/abs/1806.08342)",
    ),
    Entry(
        "Integers, asymmetric",
        [*_numbered("int{}_affine", *_BITS), *_numbered("int{}_channel_affine", *_BITS)],
        "weight",
        "int3_affine",
        "Q(w) = s (clip(round(w / s) + Z) - Z), s = (max(w, 0) - min(w, 0)) / (2^b - 1), "
        "Z = round(-2^(b-1) - min(w, 0) / s)",
        "dQ/dw = 1",
        "",
        "Jacob et al. [1712.05877](https://arxiv.org/abs/1712.05877), equation 1",
    ),
    Entry(
        "Integers",
        _numbered("int{}", *_BITS),
        "activation",
        "int3",
        "as asymmetric weights, with a moving average of each batch's smallest and largest value for the range",
        "dQ/dx = 1 for what rounds to a level without being clipped, else 0",
        "the range, in train()",
        "Jacob et al. [1712.05877](https://arxiv.org/abs/1712.05877), section 3.1",
    ),
    Entry(
        "LSQ",
        _numbered("lsq{}", *_LEARNED_BITS),
        "weight",
        "lsq3",
        "Q(w) = s round(clip(w / s, -2^(b-1), 2^(b-1) - 1)); s starts as 2 E\\|w\\| / sqrt(2^(b-1) - 1)",
        "dQ/dw = 1 inside, 0 outside; dQ/ds = round(w / s) - w / s inside, the end's code outside, "
        "times 1 / sqrt(N (2^(b-1) - 1)) for N weights",
        "s",
        "Esser et al. [1902.08153](https://arxiv.org/abs/1902.08153), equations 1 to 5",
    ),
    Entry(
        "LSQ",
        _numbered("lsq{}", *_LEARNED_BITS),
        "activation",
        "lsq3",
        "Q(x) = s round(clip(x / s, 0, 2^b - 1)); s starts as 2 E\\|x\\| / sqrt(2^b - 1) of the first batch",
        "as for weights, with N the features of one sample",
        "s",
        "Esser et al. [1902.08153](https://arxiv.org/abs/1902.08153), equations 1 to 5",
    ),
    Entry(
        "RQ and RQ-ST",
        [*_numbered("rq{}", *_LEARNED_BITS), *_numbered("rq_st{}", *_LEARNED_BITS)],
        "weight",
        "rq3",
        "in train(), g a random grid point with P(g) ~ sigmoid((g + a/2 - w) / s) - sigmoid((g - a/2 - w) / s), "
        "relaxed (RQ) or drawn hard (RQ-ST); in eval() the nearest point, as LSQ with step a",
        "that of the Gumbel-softmax choice, with respect to w, a and s",
        "a (starts as LSQ's step), s (starts as a / 3)",
        "Louizos et al. [1810.01875](https://arxiv.org/abs/1810.01875)",
    ),
    Entry(
        "RQ and RQ-ST",
        [*_numbered("rq{}", *_LEARNED_BITS), *_numbered("rq_st{}", *_LEARNED_BITS)],
        "activation",
        "rq3",
        "as for weights, on the grid 0, a ... (2^b - 1) a",
        "as for weights",
        "a, s",
        "Louizos et al. [1810.01875](https://arxiv.org/abs/1810.01875)",
    ),
    Entry(
        "DoReFa-Net",
        _numbered("dorefa{}", *range(1, 9)),
        "weight",
        "dorefa2",
        "Q(w) = 2 q(tanh w / (2 max\\|tanh w\\|) + 1/2) - 1, q(a) = round((2^b - 1) a) / (2^b - 1); "
        "one bit: sign(w) E\\|w\\|",
        "dq/da = 1, the rest as it is (tanh and the maximum); one bit: dQ/dw = 1",
        "",
        "Zhou et al. [1606.06160](https://arxiv.org/abs/1606.06160), equations 5 to 9",
    ),
    Entry(
        "DoReFa-Net",
        _numbered("dorefa{}", *range(1, 9)),
        "activation",
        "dorefa2",
        "Q(x) = q(clip(x, 0, 1))",
        "dQ/dx = 1 for 0 <= x <= 1, else 0",
        "",
        "Zhou et al. [1606.06160](https://arxiv.org/abs/1606.06160), equation 11",
    ),
    Entry(
        "HWGQ",
        _numbered("hwgq{}", *range(1, 5)),
        "activation",
        "hwgq2",
        "Q(x) = 0 for x <= 0, else the nearest of D, 2D ... (2^b - 1) D, with the D that is best for N(0, 1)",
        "dQ/dx = 1 for 0 < x <= (2^b - 1) D, else 0",
        "",
        "Cai et al. [1702.00953](https://arxiv.org/abs/1702.00953)",
    ),
    Entry(
        "LQ-Nets",
        _numbered("lq{}", *range(1, 5)),
        "weight",
        "lq2",
        "Q(w) = the nearest v.e, e in {-1, 1}^b, v of each output channel moving towards (B^T B)^-1 B^T w",
        "dQ/dw = 1",
        "v, by least squares in train()",
        "Zhang et al. [1807.10029](https://arxiv.org/abs/1807.10029)",
    ),
    Entry(
        "LQ-Nets",
        _numbered("lq{}", *range(1, 5)),
        "activation",
        "lq2",
        "Q(x) = the nearest v.e, e in {0, 1}^b",
        "dQ/dx = 1 up to the top level, else 0",
        "v, by least squares in train()",
        "Zhang et al. [1807.10029](https://arxiv.org/abs/1807.10029)",
    ),
    Entry(
        "NAQ",
        _numbered("naq{}", 3, 5, 7, 9),
        "weight",
        "naq5",
        "Q(w) = 0, W_k for w above the k-th nested mean of the positive weights, -W'_k likewise below 0",
        "dQ/dw = 1; dQ/dW_k = 1 for the weights that have it, dQ/dW'_k = -1",
        "W_k, W'_k (start as the means of their weights)",
        "Schindler et al. 2018 ([openreview](https://openreview.net/forum?id=HylDpoActX))",
    ),
    Entry(
        "TTQ",
        ["ttq"],
        "weight",
        "ttq",
        "Q(w) = W_p for w > t, -W_n for w < -t, else 0, t = 0.05 max\\|w\\|",
        "dQ/dw = W_p, W_n, else 1; dQ/dW_p = 1 above t, dQ/dW_n = -1 below -t",
        "W_p, W_n (start as the means of their weights)",
        "Zhu et al. [1612.01064](https://arxiv.org/abs/1612.01064), equations 6 to 9",
    ),
    Entry(
        "TWN",
        ["twn"],
        "weight",
        "twn",
        "Q(w) = a sign(w) for \\|w\\| > t, else 0, t = 0.7 E\\|w\\|, a = the mean \\|w\\| above t",
        "dQ/dw = 1",
        "",
        "Li, Liu [1605.04711](https://arxiv.org/abs/1605.04711), equations 5 and 6",
    ),
    Entry(
        "XNOR-Net",
        ["xnor"],
        "weight",
        "xnor",
        "Q(w) = a sign(w), a = E\\|w\\| of the output channel, sign(0) = 1",
        "dsign/dw = 1 for \\|w\\| <= 1, else 0; da/dw = sign(w) / n",
        "",
        "Rastegari et al. [1603.05279](https://arxiv.org/abs/1603.05279), equations 5 and 6",
    ),
    Entry(
        "XNOR-Net",
        ["xnor"],
        "activation",
        "xnor",
        "Q(x) = sign(x); the layer multiplies each output by the mean \\|x\\| of its patch",
        "dQ/dx = 1 for \\|x\\| <= 1, else 0",
        "",
        "Rastegari et al. [1603.05279](https://arxiv.org/abs/1603.05279), equation 11",
    ),
    Entry(
        "BNN",
        ["bnn"],
        "weight",
        "bnn",
        "Q(w) = sign(w), sign(0) = 1",
        "dQ/dw = 1 for \\|w\\| <= 1, else 0",
        "",
        "Hubara et al. [1602.02830](https://arxiv.org/abs/1602.02830), equations 1 and 4",
    ),
    Entry(
        "BNN",
        ["bnn"],
        "activation",
        "bnn",
        "Q(x) = sign(x), sign(0) = 1",
        "dQ/dx = 1 for \\|x\\| <= 1, else 0",
        "",
        "Hubara et al. [1602.02830](https://arxiv.org/abs/1602.02830), equations 1 and 4",
    ),
)

INTRODUCTION = """\
<!-- Written by `python docs/draw_quantizers.py`: change that, not this. -->

# Quantizers

A quantizer maps real weights or inputs to few values. `QuantizedConv2d(..., weight="lsq4", activation="lsq4")` uses one
of each by name, `quantize(model, weight=..., activation=...)` turns a whole network, and `quantizer(name, role)` is an
nn.Module by itself, which `torch.nn.utils.parametrize` takes as well.

```python
import torch
from torch import nn
from classical import QuantizedConv2d, quantize, quantizer

torch.manual_seed(0)
images = torch.rand(8, 1, 8, 8)
layer = QuantizedConv2d(1, 4, 3, weight="lsq4", activation="int8")
network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10))
small = quantize(network, weight="twn", activation="lsq4", first=("int8", "int8"), last=("int8", "int8"))
small(images).sum().backward()  # in train(): ranges and steps of the inputs start, learned ones get gradients
print(small[3].quantized_weight().unique().numel())  # 3
book = quantizer("naq5").codebook(network[3].weight)
print(torch.equal(book.levels[book.codes], quantizer("naq5")(network[3].weight)))  # True
```

Below, Q is the forward pass, and the gradient is what stands for its derivative in training. Levels are those for a
million numbers that follow N(0, 1) exactly (inputs: after a ReLU). The picture draws both for the same numbers, in
eval(): levels in color, the gradient with respect to the input in gray. Axes are as wide as the levels.

![Levels and gradients of every quantizer](quantizers.png)

* `integers(x)` gives codes, scale and zero point of the quantizers whose levels are evenly spaced, `codebook(x)` the
  indices and levels of all with at most 8 bits: each is exactly what the forward pass gives.
* Learned scales are stored and start from the weights when a layer is built, or from the first batch in train(). They
  are used by their absolute value, so no step of an optimizer makes them negative. Leave them out of weight decay,
  which would shrink the grid.
* eval() is deterministic; in train() RQ draws noise, and ranges and bases (integers, LQ-Nets) move. Batch norms behind
  RQ average noisy values: `qconv.reestimate` averages again without the noise, as `qconv.compress` does by itself.
* Inputs in eval() that have seen no batch in train() and no `calibrate` take a range, step or basis from each sample:
  fine for a first look, and slower. `integer_network` and `export_onnx` refuse such layers, which have no constants
  (see [deployment](deployment.md)).
* Inputs of DoReFa-Net, HWGQ, LQ-Nets, LSQ and RQ are taken to follow a ReLU: negative ones become 0. A first layer
  that sees signed inputs wants `int8`, or `LSQ(8, role="activation", signed=True)`. Signs (BNN, XNOR-Net) want the
  opposite: directly behind a ReLU they would all be +1.
* DoReFa-Net's weights and HWGQ's inputs have fixed scales: put a normalization behind or before them.
"""


def gaussian(role: Role, count: int = 2**20) -> Tensor:
    """Numbers that follow N(0, 1) exactly, one row; those of activations after a ReLU."""
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    row = (2**0.5 * torch.erfinv(2 * places - 1))[None]
    return row.relu() if role == "activation" else row


def fitted(name: str, role: Role) -> Quantizer:
    """A quantizer that has seen the Gaussian numbers."""
    built = quantizer(name, role).double()
    x = gaussian(role)
    built.fit(x)
    if not built.calibrated:
        built(x)
    return built.eval()


def levels(entry: Entry) -> str:
    """The levels of the drawn quantizer, in words."""
    found = fitted(entry.shown, entry.role).codebook(gaussian(entry.role)).levels.flatten().tolist()
    return ", ".join(f"{level:.3f}".rstrip("0").rstrip(".").replace("-0.000", "0") for level in found)


def error(entry: Entry) -> float:
    """Mean squared error of the drawn quantizer on the Gaussian numbers."""
    x = gaussian(entry.role)
    return float((fitted(entry.shown, entry.role)(x).detach() - x).square().mean())


def families(names: Sequence[str]) -> str:
    """Names for a table, runs of numbers shortened."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault("".join(c for c in name if not c.isdigit()), []).append(name)
    return ", ".join(_run(kind) for kind in kinds.values())


def _run(names: Sequence[str]) -> str:
    """Names that differ in a number: the first and the last where no number between them is left out."""
    numbers = [int("".join(c for c in name if c.isdigit()) or 0) for name in names]
    whole = len(names) > 2 and numbers == list(range(numbers[0], numbers[-1] + 1))
    return f"`{names[0]}` ... `{names[-1]}`" if whole else ", ".join(f"`{name}`" for name in names)


def page() -> str:
    """The text of quantizers.md."""
    lines = [INTRODUCTION]
    for role in ("weight", "activation"):
        lines += [f"## {'Weights' if role == 'weight' else 'Inputs'}", ""]
        for entry in (entry for entry in ENTRIES if entry.role == role):
            q = quantizer(entry.shown, entry.role)
            lines += [
                f"### {entry.title}: {families(entry.names)}",
                "",
                "| | |",
                "| --- | --- |",
                f"| equation | {entry.equation} |",
                f"| gradient | {entry.gradient} |",
                f"| levels of `{entry.shown}` | {levels(entry)} |",
                f"| mean squared error | {error(entry):.3g} |",
                f"| stored | {q.bits} bit{'s' * (q.bits > 1)} a value |",
                f"| learned | {entry.learned or 'nothing'} |",
                f"| source | {entry.source} |",
                "",
            ]
    return "\n".join(lines).rstrip() + "\n"


def missing() -> list[tuple[str, Role]]:
    """Quantizers that the page does not mention."""
    roles: tuple[Role, ...] = ("weight", "activation")
    known = {(name, entry.role) for entry in ENTRIES for name in entry.names}
    every = [(name, role) for role in roles for name in quantizer_names(role)]
    return [pair for pair in every if pair not in known and not isinstance(quantizer(*pair), Float)]


def curve(entry: Entry, x: Tensor) -> tuple[Tensor, Tensor]:
    """Q(x) of the drawn quantizer among the Gaussian numbers, and the gradient of each value with respect to x."""
    joined = torch.cat([x, gaussian(entry.role)[0]])[None].requires_grad_()
    values = fitted(entry.shown, entry.role)(joined)[0, : len(x)]
    # What a value owes to the other points, through a common scale, is next to nothing among so many.
    (slopes,) = torch.autograd.grad(values.sum(), joined)
    return values.detach(), slopes[0, : len(x)]


def draw(path: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    columns, colors = 5, {"weight": "tab:blue", "activation": "tab:orange"}
    rows = -(-len(ENTRIES) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(2.6 * columns, 2.4 * rows))
    for axis, entry in zip(axes.flat, ENTRIES, strict=False):
        levels = fitted(entry.shown, entry.role).codebook(gaussian(entry.role)).levels
        reach = max(2.5, 1.15 * float(levels.abs().max()))  # so that the outer levels are in the picture
        end = min(reach, float(gaussian("weight").max()))  # numbers beyond would move the range of the integers
        x = torch.linspace(-end, end, 801, dtype=torch.float64)
        values, slopes = curve(entry, x)
        axis.plot(x, slopes, color="0.6", linewidth=1)
        axis.plot(x, values, color=colors[entry.role], linewidth=1.5)
        axis.set_title(f"{entry.shown} ({'weights' if entry.role == 'weight' else 'inputs'})", fontsize=9)
        axis.set(xlim=(-reach, reach), ylim=(-reach, reach))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(ENTRIES) :]:
        axis.axis("off")
    lines = [Line2D([], [], color=color) for color in (*colors.values(), "0.6")]
    labels = ["Q(w), weights", "Q(x), inputs", "gradient dQ/dw, dQ/dx"]
    figure.legend(lines, labels, loc="lower right", frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    (HERE / "quantizers.md").write_text(page())
    draw(HERE / "quantizers.png")
