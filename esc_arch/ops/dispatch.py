"""The table of all operations that have a choice of backends; autotune, doctor and the benchmarks read it."""

from __future__ import annotations

from .conv3x3.api import CONV3X3
from .conv_attn.api import CONV_ATTN
from .conv_ffn.api import CONV_FFN
from .layer_norm.api import LAYER_NORM
from .operation import Operation
from .window_attention.api import WINDOW_ATTENTION

__all__ = ["OPERATIONS"]

#: By name.
OPERATIONS: dict[str, Operation] = {
    operation.name: operation for operation in (WINDOW_ATTENTION, CONV_ATTN, CONV_FFN, LAYER_NORM, CONV3X3)
}
