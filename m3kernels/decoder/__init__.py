"""Layers of a decoder: products of rows with dense weights, bitwise the same for a row in every batch."""

from m3kernels.decoder.ops import linear

__all__ = ["linear"]
