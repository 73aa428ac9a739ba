"""Two values: signs, with and without a scale."""

from torch import Tensor

from classical.quantizers.base import Codes, Quantizer, passing, sign, straight_through, wide

_SIGNS = range(-1, 2, 2)


class BNN(Quantizer):
    """sign(x) with sign(0) = +1 and no scale; the gradient passes where |x| <= 1.

    Source: Hubara et al., arXiv:1602.02830, equations 1 and 4.
    """

    scales = 0

    def __init__(self) -> None:
        super().__init__("bnn", "binary", _SIGNS)
        self.coding = {"cmp": 1}

    def encode(self, x: Tensor) -> Codes:
        """Codes -1 and 1, scale 1."""
        codes = sign(x)
        return Codes(codes, codes.new_ones(()), codes.new_zeros(()))

    def surrogate(self, x: Tensor, stated: Codes) -> Tensor:
        """x clipped to [-1, 1]."""
        return passing(x, -1, 1)

    def constants(self, weight: Tensor) -> int:
        """None are stored."""
        return 0


class XNORWeight(Quantizer):
    """sign(w) times the mean |w| of its output channel; both factors are differentiated.

    Source: Rastegari et al., arXiv:1603.05279, equations 5 and 6; sign(w) as in BNN.
    """

    roles = ("weight",)

    def __init__(self) -> None:
        super().__init__("xnor", "binary", _SIGNS)

    def encode(self, x: Tensor) -> Codes:
        """Codes -1 and 1, scale of shape (outputs, 1, ...)."""
        codes = sign(x)
        return Codes(codes, wide(x).abs().mean(tuple(range(1, x.dim())), keepdim=True), codes.new_zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Quantize x; the gradient reaches x through its sign and through its channel's mean."""
        signs, scale, _ = self.encode(x)
        return (straight_through(signs, passing(wide(x), -1, 1)) * scale).to(x.dtype)

    def constants(self, weight: Tensor) -> int:
        """One scale for each output channel."""
        return weight.shape[0]


class XNORActivation(BNN):
    """sign(x), scaled by the layer with XNOR-Net's map K, one factor for each output position.

    K = A * k is the mean of |x| over the patch that an output sees (A: mean over channels, k: box filter). It is
    constant within a patch, so it leaves the convolution as a factor: output = K (sign(x) * W) + bias, and the layer
    multiplies. K needs the real inputs, not the signs alone.

    Source: Rastegari et al., arXiv:1603.05279, section 3.2, equation 11.
    """

    roles = ("activation",)
    patch_scale = True

    def __init__(self) -> None:
        super().__init__()
        self.name = "xnor"
