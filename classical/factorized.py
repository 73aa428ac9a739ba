"""Factorized convolutions: one nn.Conv2d as a chain of cheaper ones, by a low-rank decomposition of its weight.

The weight (out, in, height, width) of each group is written as
    cp      sum_r O[o, r] I[i, r] H[h, r] W[w, r]: 1x1, then height x 1 and 1 x width on each channel, then 1x1;
    tucker  sum_ab O[o, a] C[a, b, h, w] I[i, b]: 1x1, height x width, 1x1;
    tt      sum_abc I[i, a] H[a, h, b] W[b, w, c] O[c, o]: 1x1, height x 1, 1 x width, 1x1.
Only the last convolution has a bias, so padding and stride, which act on rows and columns apart, stay exact.

Decompositions are tensorly's, an optional dependency (extra "tensor"); a layer trained from scratch needs none.

Source: Lebedev et al. (arXiv:1412.6553) for cp; Kim et al. (arXiv:1511.06530) for tucker over the two channel axes;
Oseledets, SIAM J. Sci. Comput. 33, 2295 (2011) for tt.
"""

import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import import_module
from math import prod, sqrt
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from classical.layers import QuantizedConv2d

Method = Literal["cp", "tucker", "tt"]
Rank = int | Sequence[int]
Real = NDArray[np.float64]
METHODS = ("cp", "tucker", "tt")
_RANKS = {"cp": 1, "tucker": 2, "tt": 3}
FULL = "full"
_TOLERANCE = 1e-10  # iterations end when the relative error changes by less


class FactorizedConv2d(nn.Module):
    """A convolution that is a chain of three or four nn.Conv2d; a drop-in for nn.Conv2d.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype:
            as for nn.Conv2d.
        method: "cp", "tucker" or "tt".
        rank: Of each group: one number for cp; (in, out) channels kept for tucker; the three ranks from in to out for
            tt. One number stands for all; ranks larger than an exact decomposition needs are lowered to it.

    Attributes:
        stages: The convolutions.
        rank: The ranks in use.
        error: Frobenius distance from the weight it was made of by `factorize`, over that weight's norm; None for a
            layer that was drawn.

    Raises:
        ValueError: Unknown method, rank below 1 or of the wrong length, groups that do not divide the channels.

    Source: see the module.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        method: Method = "tucker",
        rank: Rank,
    ) -> None:
        super().__init__()
        if groups < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}: "
                "choose a common divisor"
            )
        # On "meta": it checks the geometry and reads pairs, and draws nothing.
        plain = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta"
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = plain.kernel_size, plain.stride, plain.dilation
        self.padding, self.padding_mode = plain.padding, padding_mode
        self.method = method
        self.rank = _ranks(method, rank, plain.weight[: out_channels // groups].shape)
        self.error: float | None = None
        self.stages = nn.Sequential(*self._stages(bias, device, dtype))
        self.reset_parameters()

    def _stages(self, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None) -> list[nn.Conv2d]:
        (kh, kw), (sh, sw), (dh, dw), g = self.kernel_size, self.stride, self.dilation, self.groups
        ph, pw = (self.padding, self.padding) if isinstance(self.padding, str) else self.padding
        both: Any = self.padding if isinstance(self.padding, str) else (ph, pw)
        rows: Any = ph if isinstance(ph, str) else (ph, 0)
        columns: Any = pw if isinstance(pw, str) else (0, pw)
        last: dict[str, Any] = {"device": device, "dtype": dtype}
        options: dict[str, Any] = {**last, "bias": False, "padding_mode": self.padding_mode}
        first = nn.Conv2d(self.in_channels, g * self.rank[0], 1, groups=g, bias=False, **last)
        end = nn.Conv2d(g * self.rank[-1], self.out_channels, 1, groups=g, bias=bias, **last)
        if self.method == "tucker":
            a, b = (g * r for r in self.rank)
            middle = [nn.Conv2d(a, b, (kh, kw), (sh, sw), both, (dh, dw), g, **options)]
        else:
            a, b, c = (g * r for r in (self.rank * 3 if self.method == "cp" else self.rank))
            apart = a if self.method == "cp" else g
            middle = [
                nn.Conv2d(a, b, (kh, 1), (sh, 1), rows, (dh, 1), apart, **options),
                nn.Conv2d(b, c, (1, kw), (1, sw), columns, (1, dw), apart, **options),
            ]
        return [first, *middle, end]

    def reset_parameters(self) -> None:
        """Draw weights from torch's global generator, so that outputs start with the variance of nn.Conv2d's.

        Normal, of variance 1 / fan-in, which hands the variance of independent inputs on, and 1 / (3 fan-in) in the
        last stage, as nn.Conv2d's; the bias as nn.Conv2d's.
        """
        taps = self.in_channels // self.groups * prod(self.kernel_size)
        convolutions = self.convolutions()
        with torch.no_grad():
            for stage in convolutions:
                stage.weight.normal_(0, stage.weight[0].numel() ** -0.5)
            convolutions[-1].weight.div_(sqrt(3))
            if convolutions[-1].bias is not None:
                convolutions[-1].bias.uniform_(-(taps**-0.5), taps**-0.5)

    def convolutions(self) -> list[nn.Conv2d]:
        """The stages in order."""
        return [stage for stage in self.stages if isinstance(stage, nn.Conv2d)]

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W) or (C, H, W), as nn.Conv2d does."""
        output: Tensor = self.stages(input)
        return output

    def dense_weight(self) -> Tensor:
        """The weight (out_channels, in_channels / groups, height, width) of the one convolution that does the same."""
        return _dense(self.method, self.groups, [stage.weight for stage in self.convolutions()])

    def counts(self, input_shape: tuple[int, ...]) -> Counter[str]:
        """Operations, parameters and bits of one inference on one input of shape (in_channels, H, W), stage by stage.

        Raises:
            ValueError: input_shape does not fit the layer.
        """
        if len(input_shape) != 3 or input_shape[0] != self.in_channels:
            raise ValueError(
                f"input has shape {tuple(input_shape)} but the layer takes ({self.in_channels}, height, width)"
            )
        total: Counter[str] = Counter()
        x = torch.empty(input_shape, device="meta", dtype=self.convolutions()[0].weight.dtype)
        for stage in self.convolutions():
            seen = tuple(x.shape)
            try:
                x = stage._conv_forward(x, torch.empty_like(stage.weight, device="meta"), None)
            except RuntimeError as error:
                raise ValueError(f"input of shape {tuple(input_shape)} does not fit the layer: {error}") from error
            if isinstance(stage, QuantizedConv2d):
                total.update(stage.counts(seen))
                continue
            bits = 8 * stage.weight.dtype.itemsize
            stored = stage.weight.numel() + (0 if stage.bias is None else stage.bias.numel())
            total[f"mac:fp{bits}*fp{bits}"] += x.numel() * stage.weight[0].numel()
            total.update(units=x.numel(), activation_bits=bits * x.numel(), params=stored, weight_bits=bits * stored)
        return total

    def extra_repr(self) -> str:
        """Method, ranks and error."""
        error = "" if self.error is None else f", error={self.error:.3g}"
        return f"method={self.method!r}, rank={self.rank}{error}"


def factorize(
    conv: nn.Conv2d,
    method: Method = "tucker",
    rank: Rank | Literal["full"] | None = None,
    *,
    iterations: int = 500,
    seed: int = 0,
) -> FactorizedConv2d:
    """A trained convolution as a chain of cheaper ones, with the same geometry and bias.

    Args:
        conv: An nn.Conv2d; its groups are decomposed one by one.
        method: "cp" (alternating least squares), "tucker" (higher-order orthogonal iteration over the two channel
            axes) or "tt" (one singular value decomposition a rank).
        rank: As for FactorizedConv2d. None for the largest single number at which the chain has fewer weights than
            conv and, where padding is small beside the image, fewer multiplications: `.rank` and `.error` say what came
            of it. "full" for full rank, which is exact, and in general larger than conv (for cp, as for any rank from
            there on, a trivial sum of one-hot terms).
        iterations: At most so many, of cp and tucker.
        seed: Of the columns that cp draws to start from where the rank exceeds a size.

    Returns:
        A layer of conv's dtype and device, decomposed in float64. `.error` is its relative Frobenius error, that of
        the weights as stored.

    Raises:
        ImportError: Without tensorly.
        ValueError: For a layer that is no plain nn.Conv2d, a weight that is not finite, ranks out of range, or None
            where every rank makes the layer larger.

    Warns:
        UserWarning: Where the chain of the ranks given has as many weights as conv, or more.

    Source: Kolda & Bader, SIAM Review 51, 455 (2009), figures 3.3 and 4.4, for the two iterations; see the module.
    """
    if not isinstance(conv, nn.Conv2d) or type(conv).forward is not nn.Conv2d.forward:
        raise ValueError(
            f"conv is a {type(conv).__name__}, which computes otherwise than nn.Conv2d: copy its weights into an "
            "nn.Conv2d first"
        )
    weight = conv.weight.detach().double().cpu().numpy()
    if not np.isfinite(weight).all():
        raise ValueError(f"weight of shape {weight.shape} has entries that are not finite: train again")
    g = conv.groups
    parts = np.split(weight, g)
    ranks = _smaller(conv, method, rank)
    # On "meta" nothing is drawn, so torch's generator stays where it was.
    layer = FactorizedConv2d(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        g,
        conv.bias is not None,
        conv.padding_mode,
        "meta",
        conv.weight.dtype,
        method=method,
        rank=ranks,
    ).to_empty(device=conv.weight.device)
    tensorly = _tensorly()
    with tensorly.backend_context("numpy", local_threadsafe=True):
        found = [_decomposed(part, method, layer.rank, iterations, seed) for part in parts]
    stages = layer.convolutions()
    with torch.no_grad():
        for stage, arrays in zip(stages, zip(*found, strict=True), strict=True):
            stage.weight.copy_(torch.from_numpy(np.concatenate(arrays)))
        if conv.bias is not None and stages[-1].bias is not None:
            stages[-1].bias.copy_(conv.bias)
        stored = _dense(method, g, [stage.weight.double().cpu() for stage in stages]).numpy()
    norm = float(np.linalg.norm(weight))
    layer.error = float(np.linalg.norm(stored - weight)) / norm if norm else 0.0
    return layer.train(conv.training)


def _tensorly() -> Any:
    try:
        # Its parts are loaded with it; it has no type stubs.
        import_module("tensorly.decomposition")
        return import_module("tensorly")
    except ImportError as error:
        raise ImportError(
            "factorize needs tensorly, which is not installed: pip install 'qconv[tensor]'; FactorizedConv2d trained "
            "from scratch does without"
        ) from error


def _ranks(method: str, rank: Rank, shape: Sequence[int]) -> tuple[int, ...]:
    """Ranks for the weight (out, in, height, width) of one group, no larger than an exact decomposition needs."""
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}: valid names are {', '.join(METHODS)}")
    plain = rank.tolist() if isinstance(rank, np.ndarray | np.generic) else rank
    given = tuple(plain) if isinstance(plain, Iterable) else (plain,) * _RANKS[method]
    wanted = [int(r) for r in given if isinstance(r, int | np.integer) and not isinstance(r, bool) and r >= 1]
    if not len(given) == len(wanted) == _RANKS[method]:
        raise ValueError(
            f"rank is {rank!r} but method {method!r} takes {_RANKS[method]} whole numbers of at least 1, or one for all"
        )
    out, in_, height, width = shape
    if method == "cp":
        return (min(wanted[0], prod(shape) // max(shape)),)
    if method == "tucker":
        return min(wanted[0], in_, out * height * width), min(wanted[1], out, in_ * height * width)
    first = min(wanted[0], in_, height * width * out)
    second = min(wanted[1], first * height, width * out)
    return first, second, min(wanted[2], second * width, out)


def _sizes(conv: nn.Conv2d, method: str, ranks: tuple[int, ...]) -> tuple[int, int]:
    """Weights of one group's chain, and its multiplications for one pixel of the output of a large image."""
    (height, width), (down, right) = conv.kernel_size, conv.stride
    first, last = conv.in_channels // conv.groups * ranks[0], ranks[-1] * conv.out_channels // conv.groups
    # Stages before the stride see more pixels.
    if method == "tucker":
        middle = ranks[0] * ranks[1] * height * width
        return first + middle + last, down * right * first + middle + last
    if method == "cp":
        rows, columns = ranks[0] * height, ranks[0] * width
    else:
        rows, columns = ranks[0] * height * ranks[1], ranks[1] * width * ranks[2]
    return first + rows + columns + last, down * right * first + right * rows + columns + last


def _smaller(conv: nn.Conv2d, method: str, rank: Rank | str | None) -> tuple[int, ...]:
    """The ranks that `factorize` uses; it never makes a layer larger unless told to."""
    shape = (conv.out_channels // conv.groups, conv.in_channels // conv.groups, *conv.kernel_size)
    plain = prod(shape)
    if rank == FULL:
        return _ranks(method, plain, shape)
    if rank is None:
        tried = _ranks(method, 1, shape)
        if max(_sizes(conv, method, tried)) >= plain:
            weights, products = _sizes(conv, method, tried)
            raise ValueError(
                f"conv has {plain} weights a group and as many multiplications a pixel, but its chain of rank 1, "
                f"method {method!r}, has {weights} weights and {products} multiplications: keep the convolution, or "
                "name a rank"
            )
        # Both sizes grow with the rank.
        low, high = 1, plain
        while high - low > 1:
            middle = (low + high) // 2
            if max(_sizes(conv, method, _ranks(method, middle, shape))) < plain:
                low = middle
            else:
                high = middle
        return _ranks(method, low, shape)
    if isinstance(rank, str):
        raise ValueError(f'rank is {rank!r}: give "full", None, one whole number, or one a rank')
    ranks = _ranks(method, rank, shape)
    weights, _ = _sizes(conv, method, ranks)
    if weights >= plain:
        warnings.warn(
            f"rank is {rank!r}: the chain, method {method!r} of ranks {ranks}, has {weights} weights a group but conv "
            f'has {plain}; use smaller ranks, or None for the largest that saves weights ("full" does not warn)',
            stacklevel=3,
        )
    return ranks


def _dense(method: str, groups: int, weights: Sequence[Tensor]) -> Tensor:
    """The stages' weights multiplied out."""
    parts = [weight.reshape(groups, -1, *weight.shape[1:]) for weight in weights]
    first, last = parts[0][..., 0, 0], parts[-1][..., 0, 0]
    if method == "tucker":
        return torch.einsum("gai,gbahw,gob->goihw", first, parts[1], last).flatten(0, 1)
    rows, columns = parts[1][..., 0], parts[2][..., 0, :]
    if method == "cp":
        equation, rows, columns = "gri,grh,grw,gor->goihw", rows[..., 0, :], columns[..., 0, :]
    else:
        equation = "gai,gbah,gcbw,goc->goihw"
    return torch.einsum(equation, first, rows, columns, last).flatten(0, 1)


def _decomposed(weight: Real, method: str, rank: tuple[int, ...], iterations: int, seed: int) -> list[Real]:
    """Weights of the stages of one group, from (out, in, height, width) and ranks as `_ranks` gives them."""
    decomposition = import_module("tensorly.decomposition")
    if method == "cp":
        out, in_, rows, columns = _cp(weight, rank[0], iterations, seed)
        return [in_.T[:, :, None, None], rows.T[:, None, :, None], columns.T[:, None, None, :], out[:, :, None, None]]
    if method == "tucker":
        (core, (out, in_)), _ = decomposition.partial_tucker(
            weight, rank=rank[::-1], modes=[0, 1], n_iter_max=iterations, tol=_TOLERANCE
        )
        return [in_.T[:, :, None, None], core, out[:, :, None, None]]
    in_, rows, columns, out = decomposition.tensor_train(weight.transpose(1, 2, 3, 0), rank=(1, *rank, 1)).factors
    return [
        in_[0].T[:, :, None, None],
        rows.transpose(2, 0, 1)[..., None],
        columns.transpose(2, 0, 1)[:, :, None],
        out[..., 0].T[:, :, None, None],
    ]


def _cp(weight: Real, rank: int, iterations: int, seed: int) -> list[Real]:
    """One factor (size, rank) an axis; every term's columns have equal norms, so that all stages train alike."""
    largest = int(np.argmax(weight.shape))
    if rank * weight.shape[largest] >= weight.size:
        # One term for each index of all other axes.
        others = [size for axis, size in enumerate(weight.shape) if axis != largest]
        index = list(np.indices(others).reshape(len(others), -1))
        factors = [np.eye(size)[:, own] for size, own in zip(others, index, strict=True)]
        factors.insert(largest, np.moveaxis(weight, largest, 0).reshape(weight.shape[largest], -1))
    else:
        decomposition = import_module("tensorly.decomposition")
        found = decomposition.parafac(
            weight, rank, n_iter_max=iterations, tol=_TOLERANCE, init=(np.ones(rank), _start(weight, rank, seed))
        )
        factors = list(found.factors)
        factors[0] = factors[0] * found.weights
    norms = np.stack([np.linalg.norm(factor, axis=0) for factor in factors])
    mean = norms.prod(0) ** (1 / len(factors))
    return [factor * (mean / np.where(norm > 0, norm, 1)) for factor, norm in zip(factors, norms, strict=True)]


def _start(weight: Real, rank: int, seed: int) -> list[Real]:
    """Leading left singular vectors of every unfolding, and random columns where an axis is shorter than the rank."""
    rng, factors = np.random.default_rng(seed), []
    for axis, size in enumerate(weight.shape):
        vectors = np.linalg.svd(np.moveaxis(weight, axis, 0).reshape(size, -1), full_matrices=False)[0][:, :rank]
        factors.append(np.concatenate([vectors, rng.normal(size=(size, rank - vectors.shape[1]))], axis=1))
    return factors
