"""Uneven levels that are learned: trained one by one (NAQ), or sums of a few basis numbers (LQ-Nets)."""

import math

import torch
from torch import Tensor, nn

from classical.checks import whole
from classical.quantizers.affine import require_batch
from classical.quantizers.base import Codebook, Codes, Learned, Role, passing, straight_through, usable, wide


class Uneven(Learned):
    """A quantizer whose levels are no multiples of one scale: it has a codebook and no integers."""

    def encode(self, x: Tensor) -> Codes:
        """Refuse.

        Raises:
            ValueError: the levels are no multiples of one scale.
        """
        raise ValueError(f"the levels of {self.name!r} are no multiples of one scale: use codebook() for its codes")


class TrainedLevels(Uneven):
    """Weights as 0 or one of h trained positive and h trained negative levels, chosen by thresholds on |w|.

    A level starts as the mean of the weights that it stands for, which is the best for them. It gets the sum of the
    gradients of those weights, with the sign that it has in them.

    Args:
        name: as for Quantizer.
        levels: 2 h + 1, odd.

    Attributes:
        positive, negative: (h,), sizes of the levels from 0 outwards.
    """

    roles = ("weight",)
    marker = "positive"

    def __init__(self, name: str, levels: int) -> None:
        super().__init__(name, "ternary", range(levels))
        self.scales = levels - 1  # inputs are added up level by level, and each sum is multiplied once
        self.positive = nn.Parameter(torch.zeros(levels // 2))
        self.negative = nn.Parameter(torch.zeros(levels // 2))

    def thresholds(self, side: Tensor) -> list[Tensor]:
        """Where the levels of one side begin, h ascending sizes.

        Args:
            side: all weights, their sign turned so that the side's are positive.
        """
        raise NotImplementedError

    def slope(self, levels: Tensor) -> Tensor:
        """What the gradient of each weight is multiplied by, given the level it has."""
        raise NotImplementedError

    def _cells(self, real: Tensor) -> Tensor:
        """Which level each weight has: -h to h from the outermost negative to the outermost positive one."""
        above, below = (_above(side, self.thresholds(side)) for side in (real, -real))
        return (_total(above, real) - _total(below, real)).int()

    def _levels(self, real: Tensor) -> Tensor:
        if not self._fitted:
            return _cell_means(real, self._cells(real), len(self.positive))
        positive, negative = wide(self.positive).abs(), wide(self.negative).abs()
        return torch.cat([-negative.flip(0), positive.new_zeros(1), positive])

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Set each level to the mean of its weights."""
        real = wide(x)
        side = len(self.positive)
        levels = _cell_means(real, self._cells(real), side)
        self.positive.copy_(levels[side + 1 :])
        self.negative.copy_(-levels[:side].flip(0))

    @torch.no_grad()
    def codebook(self, x: Tensor) -> Codebook:
        """The quantized x as indices into the ascending levels, shape (2 h + 1,)."""
        real = wide(x)
        levels, order = self._levels(real).sort()  # trained apart, levels may have changed places
        return Codebook(order.argsort()[self._cells(real) + len(self.positive)].int(), levels)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x, in train() after fitting if nothing was fitted yet; the gradient reaches x and the levels."""
        if self.training and not self._fitted:
            self.fit(x)
        real = wide(x)
        with torch.no_grad():
            cells = self._cells(real) + len(self.positive)
        value = self._levels(real.detach())[cells]
        path = self.slope(value.detach()) * real
        return (value + (path - path.detach())).to(x.dtype)

    def constants(self, weight: Tensor) -> int:
        """Every level but 0."""
        return len(self.grid) - 1


class NAQ(TrainedLevels):
    """N-ary quantization: nested means split the weights, and every level but 0 is trained.

    On either side of 0, the first threshold is the mean of the side's weights, the next one the mean of those beyond
    the first, and so on outwards. The gradient passes to w unchanged.

    Args:
        levels: 3, 5, 7 or 9.

    Raises:
        ValueError: another number of levels.

    Source: Schindler et al., N-ary quantization for CNN model compression and inference acceleration, 2018
    (openreview.net/forum?id=HylDpoActX). The split outwards, which gives every odd number of levels, and the gradient
    of w are our reading.
    """

    def __init__(self, levels: int = 5) -> None:
        if not whole(levels, 3, 9) or levels % 2 == 0:
            raise ValueError(f"n-ary quantization has 3, 5, 7 or 9 levels, not {levels!r}")
        super().__init__(f"naq{levels}", levels)

    def thresholds(self, side: Tensor) -> list[Tensor]:
        """Nested means."""
        found = [side.new_zeros(())]
        for _ in range(len(self.positive)):
            # Where nothing lies beyond a threshold, the next one is the same.
            found.append(torch.maximum(found[-1], mean_where(side > found[-1], side)))
        return found[1:]

    def slope(self, levels: Tensor) -> Tensor:
        """1."""
        return torch.ones_like(levels)


class LQ(Uneven):
    """LQ-Nets: levels v . e for all e in {-1, 1}^K (weights) or {0, 1}^K (activations), v learned from the data.

    Values go to the nearest level. Each forward pass in train() quantizes with the stored basis v and then takes one
    step of the quantization error minimization: for the codes B that the values x had, v' = (B^T B)^-1 B^T x, the
    least squares, and v moves towards v'. Fitting alternates codes and least squares instead. Weights have a basis
    for each output channel and an unchanged gradient; activations have one, and no gradient above the top level.

    Args:
        bits: K, 1 to 4.
        role: "weight" or "activation"; activations are taken to follow a ReLU.
        momentum: share of v' in the moving basis, in (0, 1].

    Attributes:
        basis: (outputs, K) or (1, K), in no order.

    Raises:
        ValueError: bits or momentum out of range.

    Source: Zhang et al., arXiv:1807.10029, section 3; the small ridge that keeps v where B^T B is
    singular is that of the authors' code.
    """

    marker = "basis"
    basis: Tensor

    def __init__(self, bits: int = 2, role: Role = "weight", momentum: float = 0.1) -> None:
        if not whole(bits, 1, 4):
            raise ValueError(f"LQ-Nets has 1 to 4 bits, not {bits!r}: choose a name such as 'lq2'")
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum is {momentum} but must be above 0 and at most 1")
        super().__init__(f"lq{bits}", "binary", range(2**bits))
        self.roles = (role,)
        self.planes = self.scales = bits
        self.coding = {"cmp": bits}  # a binary search among the thresholds
        self.momentum = momentum
        self.register_buffer("basis", torch.zeros(1, bits))

    def _dims(self, x: Tensor) -> tuple[int, ...]:
        """The axes that share a basis."""
        apart = self.roles == ("weight",) or not self._fitted
        return tuple(range(1 if apart else 0, x.dim()))

    def _levels(self, basis: Tensor) -> tuple[Tensor, Tensor]:
        """Ascending levels (rows, 2^K), and their digits (rows, 2^K, K)."""
        places = torch.arange(self.bits, device=basis.device)
        digits = torch.arange(2**self.bits, device=basis.device)[:, None] >> places & 1
        digits = (2 * digits - 1 if self.roles == ("weight",) else digits).to(basis.dtype)
        # Contiguous, for a product that is the same to the last bit after the basis was saved and loaded.
        levels, order = (basis.contiguous() @ digits.t()).sort(1)
        return levels, digits[order]

    def _least_squares(self, real: Tensor, above: list[Tensor], basis: Tensor, dims: tuple[int, ...]) -> Tensor:
        """The best basis for the codes that `real` has with this one, given what is above which threshold."""
        digits = self._levels(basis)[1].double()
        # Differences of the sums over all values above a threshold are the sums over the values of one level.
        sums = [real.sum(dims), *((real * mask).sum(dims) for mask in above), real.new_zeros(())]
        counts = [
            real.new_tensor(math.prod([real.shape[dim] for dim in dims])),
            *(mask.sum(dims) for mask in above),
            real.new_zeros(()),
        ]
        total, count = (
            -torch.stack([part.double().expand(len(basis)) for part in parts], 1).diff() for parts in (sums, counts)
        )
        ridge = 1e-4
        gram = torch.einsum("rlk,rl,rlm->rkm", digits, count, digits)
        gram = gram + ridge * torch.eye(self.bits, dtype=gram.dtype, device=gram.device)
        moment = torch.einsum("rlk,rl->rk", digits, total) + ridge * basis.double()
        found: Tensor = torch.linalg.solve(gram, moment)
        return found.to(basis.dtype)

    def _fit(self, real: Tensor, dims: tuple[int, ...]) -> Tensor:
        """Alternate, from evenly spaced levels in proportion to the root mean square."""
        size = real.square().mean(dims).sqrt().reshape(-1, 1)
        basis = size * torch.exp2(torch.arange(self.bits, dtype=real.dtype, device=real.device) + 1 - self.bits)
        for _ in range(_ROUNDS):
            basis = self._least_squares(real, _above(real, _between(self._levels(basis)[0], real)), basis, dims)
        return basis

    def fit(self, x: Tensor) -> None:
        """Start the basis from x, unless x is all 0: no size is in that, and a basis of 0 stands for not fitted."""
        if x.is_meta or x.any():
            super().fit(x)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Minimize the squared error of x."""
        dims = tuple(range(1 if self.roles == ("weight",) else 0, x.dim()))
        self.basis = self._fit(wide(x), dims).to(self.basis.dtype)

    def select(self, outputs: Tensor) -> None:
        """Keep the rows of the basis that belong to some output channels."""
        if self._fitted and self.roles == ("weight",):
            self.basis = self.basis[outputs]

    def _basis(self, real: Tensor) -> Tensor:
        if self._fitted:
            return wide(self.basis)
        if self.roles == ("activation",):
            require_batch(real)
        return self._fit(real, self._dims(real))

    def _assign(self, real: Tensor, basis: Tensor) -> tuple[Codebook, list[Tensor]]:
        """The nearest levels, and what is above which threshold between them."""
        levels, _ = self._levels(basis)
        above = _above(real, _between(levels, real))
        whole = len(self._dims(real)) == real.dim()
        return Codebook(_total(above, real).int(), levels[0] if whole else levels), above

    @torch.no_grad()
    def codebook(self, x: Tensor) -> Codebook:
        """The quantized x as indices into ascending levels, of shape (2^K,) for activations once fitted."""
        real = wide(x)
        return self._assign(real, self._basis(real))[0]

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x, in train() moving the stored basis afterwards."""
        if self.training and not self._fitted:
            self.fit(x)
        with torch.no_grad():
            real = wide(x)
            basis = self._basis(real)
            book, above = self._assign(real, basis)
            value = book.values().to(x.dtype)
            if self.training and self._fitted and x.numel():
                moved = basis.lerp(self._least_squares(real, above, basis, self._dims(real)), self.momentum)
                # A batch with NaN or infinity moves nothing.
                self.basis.copy_(torch.where(moved.isfinite(), moved, basis))
        if self.roles == ("weight",):
            return straight_through(value, x)
        top = usable(_column(book.levels[..., -1], x)).to(x.dtype)
        return straight_through(value, passing(x / top, -math.inf, 1) * top)

    def constants(self, weight: Tensor) -> int:
        """The basis of every output channel, or of the activations."""
        return self.bits * (weight.shape[0] if self.roles == ("weight",) else 1)


_ROUNDS = 20  # of alternation: enough to stop moving in practice


def mean_where(mask: Tensor, values: Tensor) -> Tensor:
    """Mean of the values that a mask keeps, 0 if it keeps none."""
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def _above(real: Tensor, thresholds: list[Tensor]) -> list[Tensor]:
    """1 where a value exceeds a threshold, else 0, in real's type."""
    # For the few levels there are, faster than a search; and comparisons keep the memory format.
    return [(real > threshold).to(real.dtype) for threshold in thresholds]


def _total(masks: list[Tensor], real: Tensor) -> Tensor:
    total = torch.zeros_like(real)
    for mask in masks:
        total += mask
    return total


def _between(levels: Tensor, real: Tensor) -> list[Tensor]:
    """Thresholds half way between ascending levels (rows, L), each shaped to broadcast against real."""
    return [_column(threshold, real) for threshold in ((levels[:, 1:] + levels[:, :-1]) / 2).unbind(1)]


def _column(values: Tensor, real: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (real.dim() - 1))


def _cell_means(real: Tensor, cells: Tensor, side: int) -> Tensor:
    """Levels from -side to side: the mean of each cell, for an empty one the largest size; 0 in the middle."""
    kept = [cells == cell for cell in range(-side, side + 1)]
    means = torch.stack([mean_where(mask, real) for mask in kept])
    filled = torch.stack([mask.any() for mask in kept])
    signs = torch.arange(-side, side + 1, device=real.device).sign()
    return torch.where(filled, means, signs * usable(real.abs().amax())) * signs.abs()
