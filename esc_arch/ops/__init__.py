"""Arithmetic without parameters: a package per operation, reference first, faster ones beside it.

Nothing here knows of BasicSR. Shapes use one legend of letters:
B batch, C channels, H and W height and width, h heads, d head dimension, w window side,
N = w * w tokens of a window, G windows of an image.
"""
