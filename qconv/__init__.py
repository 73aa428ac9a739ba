"""Quantum-inspired convolution: circuits as kernels, cheap classical kernels beside them, one ledger of energy."""

import circuits as _circuits
import classical as _classical

for _module in (_circuits, _classical):
    if getattr(_module, "QCONV_SENTINEL", None) != "qconv":
        raise ImportError(
            f"qconv needs its own package {_module.__name__!r} but Python found another at {_module.__file__}: "
            "remove that one, or move it behind qconv on sys.path"
        )

from qconv.backends import Backend, Compiled, JobFailed, Unsupported, backend_names, load_backend  # noqa: E402
from qconv.binarization import Ensemble, binarize, ensemble, reestimate  # noqa: E402
from qconv.binary_laws import Moments  # noqa: E402
from qconv.binary_modules import (  # noqa: E402
    BinaryActivation,
    PixelBits,
    ProbabilisticMaxPool2d,
    StochasticBatchNorm1d,
    StochasticBatchNorm2d,
)
from qconv.compression import compress  # noqa: E402
from qconv.deformed import QuantumDeformedConv2d, QuantumDeformedLinear  # noqa: E402
from qconv.layers import FourierConv2d, QuantumConv2d  # noqa: E402
from qconv.probabilistic import ProbabilisticBinaryConv2d, ProbabilisticBinaryLinear  # noqa: E402
from qconv.simulation import simulate  # noqa: E402
from qconv.surrogates import Surrogate, surrogate  # noqa: E402
from qconv.tensor_layers import TensorNetworkConv2d  # noqa: E402
from qconv.version import __version__  # noqa: E402

__all__ = [
    "Backend",
    "BinaryActivation",
    "Compiled",
    "Ensemble",
    "FourierConv2d",
    "JobFailed",
    "Moments",
    "PixelBits",
    "ProbabilisticBinaryConv2d",
    "ProbabilisticBinaryLinear",
    "ProbabilisticMaxPool2d",
    "QuantumConv2d",
    "QuantumDeformedConv2d",
    "QuantumDeformedLinear",
    "StochasticBatchNorm1d",
    "StochasticBatchNorm2d",
    "Surrogate",
    "TensorNetworkConv2d",
    "Unsupported",
    "__version__",
    "backend_names",
    "binarize",
    "compress",
    "ensemble",
    "load_backend",
    "reestimate",
    "simulate",
    "surrogate",
]
