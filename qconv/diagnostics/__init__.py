"""Diagnostics of a kernel, before and after training: what it can express, whether it trains, what its data see."""

from qconv.diagnostics.entanglement import EntanglingCapability, entangling_capability, meyer_wallach
from qconv.diagnostics.expressibility import Expressibility, expressibility, fidelities
from qconv.diagnostics.fisher import EffectiveDimension, effective_dimension, fisher_information
from qconv.diagnostics.gradients import GradientVariance, Plateau, Slope, barren_plateau, gradient_variance
from qconv.diagnostics.kernels import (
    GeometricDifference,
    gaussian_kernel,
    geometric_difference,
    kernel_matrix,
    target_alignment,
)
from qconv.diagnostics.spectrum import FourierSpectrum, fourier_spectrum
from qconv.diagnostics.states import states

__all__ = [
    "EffectiveDimension",
    "EntanglingCapability",
    "Expressibility",
    "FourierSpectrum",
    "GeometricDifference",
    "GradientVariance",
    "Plateau",
    "Slope",
    "barren_plateau",
    "effective_dimension",
    "entangling_capability",
    "expressibility",
    "fidelities",
    "fisher_information",
    "fourier_spectrum",
    "gaussian_kernel",
    "geometric_difference",
    "gradient_variance",
    "kernel_matrix",
    "meyer_wallach",
    "states",
    "target_alignment",
]
