"""Quantization of trained networks without their data."""

from classical.data_free.biases import absorb_biases, correct_biases, correct_biases_on
from classical.data_free.clips import ChannelClip
from classical.data_free.equalization import equalize, rescale_randomly
from classical.data_free.folding import fold_batch_norms, natural_noise, output_moments, record_moments, replace_relu6
from classical.data_free.moments import Moments, clipped_normal, propagate
from classical.data_free.ranges import set_ranges
from classical.data_free.recipe import data_free_quantize
from classical.data_free.report import Entry, Report

__all__ = [
    "ChannelClip",
    "Entry",
    "Moments",
    "Report",
    "absorb_biases",
    "clipped_normal",
    "correct_biases",
    "correct_biases_on",
    "data_free_quantize",
    "equalize",
    "fold_batch_norms",
    "natural_noise",
    "output_moments",
    "propagate",
    "record_moments",
    "replace_relu6",
    "rescale_randomly",
    "set_ranges",
]
