"""Tensor networks as tools: structures that layers contract, trains, spectra, and conversions from and to circuits."""
