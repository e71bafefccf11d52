"""Fits the stacked committee to labels, data-parallel over structures."""
