"""Batch norm into the layer before it, and ReLU6 into clips that follow their channels."""

from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from classical.data_free.clips import ChannelClip
from classical.data_free.graph import LAYERS, Layer, calls, label, layer_at, replace_by_module, traced
from classical.data_free.report import Entry, Report

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fold_batch_norms(model: nn.Module) -> tuple[fx.GraphModule, Report]:
    """Make each batch norm part of the convolution or linear layer whose only reader it is.

    Its statistics stay with the layer, whose output has mean beta and standard deviation |gamma| sqrt(v / (v + eps))
    over the training images: see `output_moments`. A linear layer is taken to read (batch, features).

    Args:
        model: any module that torch.fx traces; it stays as it is.

    Returns:
        The traced copy in eval(), of the same function, and which batch norms were folded.

    Raises:
        ValueError: torch.fx cannot trace the model.

    Source: Jacob et al., arXiv:1712.05877, section 3.2, equation 14.
    """
    graph = traced(model)
    entries = []
    for node in list(graph.graph.nodes):
        norm = graph.get_submodule(node.target) if node.op == "call_module" else None
        if not isinstance(norm, _NORMS):
            continue
        source = node.args[0]
        reason = _obstacle(graph, source, node, norm)
        note = reason or f"{norm.num_features} channels"
        entries.append(Entry("fold", f"{label(source)} -> {label(node)}", reason is None, note))
        if reason is None:
            layer = layer_at(graph, source.target)
            folded = (
                fuse_linear_bn_eval(layer, norm) if isinstance(layer, nn.Linear) else fuse_conv_bn_eval(layer, norm)
            )
            set_output_moments(folded, *_moments(norm))
            graph.set_submodule(source.target, folded)
            node.replace_all_uses_with(source)
            graph.graph.erase_node(node)
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph, Report(tuple(entries))


def _obstacle(graph: fx.GraphModule, source: fx.Node, node: fx.Node, norm: _BatchNorm) -> str | None:
    """Why a batch norm that reads `source` cannot be folded into it, or None."""
    layer = graph.get_submodule(str(source.target)) if source.op == "call_module" else None
    if isinstance(layer, _TRANSPOSED):
        return f"{source.target} is a transposed convolution, which no later step knows"
    if not isinstance(layer, LAYERS):
        return f"it reads {label(source)}, no convolution or linear layer"
    for what in (source, node):
        calls = sum(other.op == "call_module" and other.target == what.target for other in graph.graph.nodes)
        if calls > 1:
            return f"{what.target} is called {calls} times"
    if len(source.users) > 1:
        return f"{source.target} is also read by {', '.join(label(user) for user in source.users if user is not node)}"
    if norm.running_mean is None:
        return "it keeps no running statistics"
    if norm.num_features != layer.weight.shape[0]:
        return f"its {norm.num_features} features are not the layer's {layer.weight.shape[0]} outputs"
    return None


def _moments(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    assert norm.running_var is not None
    unit = (norm.running_var / (norm.running_var + norm.eps)).sqrt()
    if not norm.affine:
        return torch.zeros_like(unit), unit
    return norm.bias.detach().clone(), norm.weight.detach().abs() * unit


def output_moments(layer: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of each of a layer's output channels, (channels,) each; None if unknown."""
    if not hasattr(layer, "output_mean"):
        return None
    return layer.get_buffer("output_mean"), layer.get_buffer("output_std")


def set_output_moments(layer: nn.Module, mean: Tensor, std: Tensor) -> None:
    """Keep a layer's output moments with it, as buffers that its state_dict leaves out."""
    layer.register_buffer("output_mean", mean, persistent=False)
    layer.register_buffer("output_std", std, persistent=False)


@torch.no_grad()
def record_moments(model: nn.Module, images: Tensor) -> tuple[fx.GraphModule, Report]:
    """Give the layers without a folded batch norm the output moments that they have on images.

    Some trained networks have no batch norm left. A few images, or none but noise with the spectrum of images
    (`natural_noise`), then take the place of its statistics: well enough for ranges and corrected biases, not for
    `absorb_biases`, since deviations on noise come out several times too small. A layer that is called several times
    keeps none: each call's outputs then follow from its inputs.

    Args:
        model: any module that torch.fx traces; it stays as it is.
        images: its input, (batch, channels, ...), all at once.

    Raises:
        ValueError: torch.fx cannot trace the model; images that are no tensor of finite numbers.
    """
    if not isinstance(images, Tensor) or not bool(images.isfinite().all()):
        raise ValueError("images must be a tensor of finite numbers: a NaN or infinity would be in all statistics")
    graph = traced(model)
    called = {name: len(sources) for name, sources in calls(graph).items()}
    lacking = {name: m for name, m in graph.named_modules() if isinstance(m, LAYERS) and output_moments(m) is None}
    layers = {name: layer for name, layer in lacking.items() if called.get(name, 1) == 1}

    def record(layer: Layer, _: object, output: Tensor) -> None:
        axis = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
        others = [i for i in range(output.dim()) if i != axis]
        set_output_moments(layer, output.mean(others), output.std(others, correction=0))

    handles = [layer.register_forward_hook(record) for layer in layers.values()]
    graph(images)
    for handle in handles:
        handle.remove()
    entries = []
    for name in lacking:
        note = f"on {len(images)} images" if name in layers else f"called {called[name]} times"
        entries.append(Entry("record", name, name in layers, note))
    return graph, Report(tuple(entries))


def replace_relu6(model: nn.Module, by: Literal["clip", "relu"] = "clip") -> tuple[fx.GraphModule, Report]:
    """Replace each ReLU6, whose bound does not follow rescaled channels.

    Args:
        model: any module that torch.fx traces; it stays as it is.
        by: "clip", a ChannelClip of the same function; or "relu", as the paper does, which changes the function: by
            little where few values reach 6, by much in other networks. It takes the place of clips too.

    Raises:
        ValueError: another `by`.

    Source: Nagel et al., arXiv:1906.04721, section 5.1.1, for ReLU; the clip is this library's.
    """
    if by not in ("clip", "relu"):
        raise ValueError(f"by is {by!r} but must be 'clip' or 'relu'")
    graph = traced(model)
    like = next((p for p in graph.parameters() if p.is_floating_point()), torch.empty(0))
    entries = []
    for node in list(graph.graph.nodes):
        old = graph.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(old, nn.Hardtanh):  # ReLU6 is one
            old = ChannelClip(like.new_tensor(old.min_val), like.new_tensor(old.max_val))
        elif not isinstance(old, ChannelClip) or by == "clip":
            continue
        name = str(node.target)
        if by == "relu" and bool((old.low != 0).any()):
            entries.append(Entry("relu6", name, False, f"{old!r} is no ReLU6"))
        else:
            replace_by_module(graph, node, old if by == "clip" else nn.ReLU())
            entries.append(Entry("relu6", name, True, f"by {old!r}" if by == "clip" else "by ReLU()"))
    graph.delete_all_unused_submodules()
    graph.recompile()
    return graph, Report(tuple(entries))


def natural_noise(shape: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
    """Noise images with the power spectrum of photographs, 1 / f^2, in [0, 1].

    Mean 0.45, standard deviation 0.27 before clipping; the channels correlate at 0.9, as in photographs.

    Args:
        shape: (images, channels, height, width).
        generator: where the noise comes from.

    Source: Field, J. Opt. Soc. Am. A 4 (1987), 2379, for the spectrum.
    """
    height, width = shape[-2:]
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)
    frequency = (rows**2 + columns**2).sqrt()
    frequency[0, 0] = 1 / max(height, width)  # the mean varies as much as the slowest wave
    own = torch.randn(shape, generator=generator)
    common = torch.randn(shape[0], 1, height, width, generator=generator)
    white = 0.9**0.5 * common + 0.1**0.5 * own
    noise = torch.fft.ifft2(torch.fft.fft2(white) / frequency).real
    images: Tensor = (0.45 + 0.27 * noise / noise.std()).clamp(0, 1)
    return images
