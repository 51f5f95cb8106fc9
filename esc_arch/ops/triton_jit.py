"""What kernels in Triton share. This imports triton: import it only where that is known to be there."""

# What Triton compiles are its own types, which annotations cannot say
# mypy: disallow_untyped_defs=False, check_untyped_defs=False

from __future__ import annotations

import inspect

import triton
import triton.language as tl

from esc_arch.ops.triton_support import INTERPRETED

__all__ = ["dot", "tuned"]

#: Where Triton can (from 3.4 on), the choice is kept on disk with the compiled kernels.
_CACHED = {"cache_results": True} if "cache_results" in inspect.signature(triton.autotune).parameters else {}


def tuned(configs, *, interpreted, key, fitting=None):
    """`triton.autotune` among the configurations that `fitting` leaves; the interpreter has others of its own."""
    chosen = interpreted if INTERPRETED else configs
    return triton.autotune(chosen, key=key, prune_configs_by=fitting and {"early_config_prune": fitting}, **_CACHED)


@triton.jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b summed in float32."""
    if PRECISION == "widened":  # the interpreter multiplies the bit patterns of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    elif PRECISION == "half":
        return tl.dot(a, b)
    else:
        return tl.dot(a, b, input_precision=PRECISION)
