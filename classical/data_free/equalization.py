"""Cross-layer equalization: channels rescaled so that a layer's weights have about one range in all its channels.

One scale for a whole weight tensor serves a channel of small weights badly. But a channel between two layers has no
scale of its own: rows of the first layer divided by s and columns of the next multiplied by s leave the network's
function as it is.
"""

import math
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn

from classical.data_free.clips import ChannelClip
from classical.data_free.flow import Flow, Group
from classical.data_free.folding import output_moments
from classical.data_free.graph import Layer, traced
from classical.data_free.report import Entry, Report, names

Reals = NDArray[np.float64]

_WEAK = 1e-3  # of the median range: eight bits round all weights of such a channel to 0


class _Ranges:
    """max|w| of a layer's channels under given scales."""

    def __init__(self, layer: Layer, written: NDArray[np.int64], read: NDArray[np.int64]) -> None:
        self.ids = {"written": written, "read": read}
        groups = getattr(layer, "groups", 1)
        shape = (groups, layer.weight.shape[0] // groups, len(read) // groups, -1)
        self.pairs: Reals = layer.weight.detach().double().abs().reshape(shape).amax(-1).cpu().numpy()

    def of(self, side: str, scales: Reals) -> Reals:
        """Range of each output channel (side "written") or input channel ("read")."""
        rows = scales[self.ids["written"]].reshape(len(self.pairs), -1, 1)
        columns = scales[self.ids["read"]].reshape(len(self.pairs), 1, -1)
        found: Reals = (self.pairs * columns).max(2) / rows[:, :, 0]
        if side == "read":
            found = (self.pairs / rows).max(1) * columns[:, 0]
        return found.ravel()


def equalize(model: nn.Module, *, tolerance: float = 0.05, sweeps: int = 100) -> tuple[fx.GraphModule, Report]:
    """Rescale channels until each has the same range in the layer that writes it and in the layer that reads it.

    For one writer of range r1 and one reader of range r2, the scale is s = sqrt(r1 / r2), and both ranges become
    sqrt(r1 r2). Pairs are swept until no scale moves, since a layer reads the channels of one pair and writes those of
    the next; a depthwise layer between two others ends with the range (r1 r2 r3)^(1/3) of all three. Of several writers
    or readers of one tensor (residual additions), the largest range relative to its layer's counts. A channel that is
    (all but) never written or never read has no range to balance. Where it is read it gets the median range: equalized,
    the weights of its readers would dominate theirs, or its bias all activations.

    Args:
        model: any module that torch.fx traces, batch norm folded and ReLU6 replaced; it stays as it is.
        tolerance: largest |log s| of the last sweep.
        sweeps: at most so many.

    Returns:
        The traced copy, of the same function, and what was equalized.

    Source: Nagel et al., arXiv:1906.04721, section 4.1 and appendix A.
    """
    graph = traced(model)
    flow = Flow(graph)
    ranges = {name: _Ranges(layer, flow.written[name], flow.read[name]) for name, layer in flow.layers.items()}
    scales, free = np.ones(flow.n_variables), flow.free()
    groups = [group for group in flow.groups if group.writers and group.readers and free[group.variables].any()]
    before = [_unevenness(group, ranges, scales) for group in groups]
    swept, moved = 0, math.inf
    while swept < sweeps and moved > tolerance:
        moved = max((_balance(group, ranges, scales, free) for group in groups), default=0.0)
        swept += 1
    rescale(graph, flow, scales)
    after = [_unevenness(group, ranges, scales) for group in groups]
    notes = {
        group.writers: f"{int(free[group.variables].sum())} channels, largest / median range {b:.3g} to {a:.3g}"
        for group, b, a in zip(groups, before, after, strict=True)
    }
    entries = [
        _entry(flow, group, notes.get(group.writers))
        for group in flow.groups
        if group.writers and {flow.reasons.get(v) for v in group.variables.tolist()} != {"it is the network's output"}
    ]
    still = f"the last of {swept} sweeps moved scales by up to {100 * math.expm1(moved):.2g} %"
    return graph, Report((*entries, *([Entry("equalize", "all", moved <= tolerance, still)] if groups else [])))


def _balance(group: Group, ranges: dict[str, _Ranges], scales: Reals, free: NDArray[np.bool_]) -> float:
    """Equalize one group of tied tensors; the largest |log s|."""
    mine = group.variables[free[group.variables]]
    first = _combined("written", group.writers, ranges, scales)[mine]
    second = _combined("read", group.readers, ranges, scales)[mine]
    equal = np.sqrt(first * second)
    if not equal.any():
        return 0.0
    steps = np.ones(len(mine))
    live = equal > _WEAK * np.median(equal[equal > 0])
    typical = np.median(equal[live])
    steps[live] = np.sqrt(first[live] / second[live])
    read = (second > 0) & ~live
    steps[read] = typical / second[read]
    unread = (first > 0) & ~live & ~read
    steps[unread] = first[unread] / typical
    scales[mine] *= steps
    return float(np.abs(np.log(steps)).max())


def _combined(side: str, layers: tuple[str, ...], ranges: dict[str, _Ranges], scales: Reals) -> Reals:
    """Range of each variable over several layers: the largest relative range, times the layers' typical one."""
    found = []
    for name in layers:
        each = np.zeros(len(scales))
        np.maximum.at(each, ranges[name].ids[side], ranges[name].of(side, scales))
        found.append(each)
    tops = np.array([each.max() for each in found])
    if not tops.any():
        return np.zeros(len(scales))
    typical = np.exp(np.log(tops[tops > 0]).mean())
    relative = np.max([each / top for each, top in zip(found, tops, strict=True) if top > 0], axis=0)
    combined: Reals = relative * typical
    return combined


def _unevenness(group: Group, ranges: dict[str, _Ranges], scales: Reals) -> float:
    """Largest range of a channel over the median one, in the worst layer."""
    values = [ranges[name].of("written", scales) for name in group.writers]
    values += [ranges[name].of("read", scales) for name in group.readers]
    return max((float(v.max() / np.median(v[v > 0])) for v in values if v.any()), default=1.0)


def _entry(flow: Flow, group: Group, note: str | None) -> Entry:
    pair = names(group.writers) + (f" -> {names(group.readers)}" if group.readers else "")
    fixed = [flow.reasons[variable] for variable in group.variables.tolist() if variable in flow.reasons]
    if note is None:
        return Entry("equalize", pair, False, fixed[0] if fixed else "read by no layer")
    return Entry("equalize", pair, True, note + (f"; {len(fixed)} are fixed: {fixed[0]}" if fixed else ""))


@torch.no_grad()
def rescale(graph: fx.GraphModule, flow: Flow, scales: Reals) -> None:
    """Divide the channels of each variable by its scale: in weights, biases, clips and output moments, in place."""
    factors = torch.from_numpy(scales)

    def divided(tensor: Tensor, by: Tensor) -> Tensor:
        return (tensor.double() / by.to(tensor.device)).to(tensor.dtype)

    for name, layer in flow.layers.items():
        rows, columns = factors[flow.written[name]], factors[flow.read[name]]
        groups = getattr(layer, "groups", 1)
        blocks = layer.weight.reshape(groups, len(rows) // groups, len(columns) // groups, -1)
        ratio = rows.view(groups, -1, 1, 1) / columns.view(groups, 1, -1, 1)
        layer.weight.copy_(divided(blocks, ratio).reshape(layer.weight.shape))
        for tensor in (layer.bias, *(output_moments(layer) or ())):
            if tensor is not None:
                tensor.copy_(divided(tensor, rows))
    for name, value in flow.clips.items():
        clip = cast(ChannelClip, graph.get_submodule(name))
        by = factors[value.ids]
        low, high = (divided(bound, by) for bound in (clip.low, clip.high))
        graph.set_submodule(name, ChannelClip(low, high, -1 if value.form == "last" else 1).eval())


def rescale_randomly(
    model: nn.Module, low: float, high: float, generator: torch.Generator
) -> tuple[fx.GraphModule, Report]:
    """Rescale every channel that can be by a random factor, which leaves the function as it is.

    It makes networks that are hard to quantize out of easy ones, to try methods on.

    Args:
        model: as for `equalize`.
        low, high: factors are drawn log-uniformly from [low, high].
        generator: where the draws come from.

    Raises:
        ValueError: unless 0 < low <= high.
    """
    if not 0 < low <= high < math.inf:
        raise ValueError(f"low is {low} and high is {high}: factors need 0 < low <= high")
    graph = traced(model)
    flow = Flow(graph)
    draws = torch.rand(flow.n_variables, generator=generator, dtype=torch.float64).numpy()
    free = flow.free()
    rescale(graph, flow, np.where(free, np.exp(-math.log(low) - draws * math.log(high / low)), 1.0))
    entry = Entry("rescale", names(tuple(flow.layers)), bool(free.any()), f"{int(free.sum())} channels")
    return graph, Report((entry,))
