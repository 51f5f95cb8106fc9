"""How PyTorch multiplies numbers in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from esc_arch.ops.compiling import constant_when_compiled

__all__ = ["float32_products", "tf32_in_convolutions", "tf32_in_products"]


@contextmanager
def float32_products(*, tf32: bool) -> Iterator[None]:
    """Enable or disable TF32 for float32 matrix products and convolutions in this block."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


@constant_when_compiled
def tf32_in_products() -> bool:
    """True if PyTorch has been told to multiply float32 in matrix products as TF32."""
    matmul = torch.backends.cuda.matmul
    return (getattr(matmul, "fp32_precision", None) or ("tf32" if matmul.allow_tf32 else "ieee")) == "tf32"


@constant_when_compiled
def tf32_in_convolutions() -> bool:
    """True if PyTorch has been told to multiply float32 in convolutions as TF32."""
    convolutions = torch.backends.cudnn
    if hasattr(convolutions, "conv"):  # from 2.9 on; asking the older flag may raise there
        return convolutions.conv.fp32_precision == "tf32"
    return convolutions.allow_tf32
