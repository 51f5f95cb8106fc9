"""Window attention: check the inputs, choose a backend, call it."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from . import flex, naive, sdpa

__all__ = ["BACKENDS", "resolve_backend", "window_attention"]

#: Every backend by name: a module with `reasons_against` (why not, empty when it can) and `forward`.
BACKENDS: dict[str, ModuleType] = {"naive": naive, "sdpa": sdpa, "flex": flex}

#: What `auto` tries, in this order; the first one with no reason against it is taken. Flex attention is left to
#: those who ask for it by name: its first call compiles for a minute or more.
AUTO_ORDER = ("sdpa", "naive")


def resolve_backend(name: str) -> str:
    """The backend that a spelling from an option file means: case does not matter (`Naive`, `SDPA`, `Flex`).

    Raises:
        ValueError: there is none of this name; the message lists those there are.
    """
    key = str(name).lower()
    if key != "auto" and key not in BACKENDS:
        raise ValueError(f"attn_type {name!r} is not known; allowed: auto, {', '.join(BACKENDS)} (in any case).")
    return key


def window_attention(qkv: Tensor, table: Tensor, *, window: int, heads: int, backend: str = "auto") -> Tensor:
    """Attention within non-overlapping windows, with a relative position bias (paper, section 3.2).

    The map is padded at the bottom and the right by reflection to whole windows and cropped again after. The
    projection comes before the padding here: a 1 x 1 convolution works on each pixel alone, so that equals
    padding the features first, and saves projecting the padding.

    Args:
        qkv: (B, 3C, H, W), channels in the order q, k, v, inside each heads, then head dimension. H, W >= 1.
        table: (h, (2w - 1)^2), the bias by relative position, see `dense_bias`.
        window: w, the side of a window in pixels.
        heads: h.
        backend: a key of `BACKENDS`, or auto.

    Returns:
        (B, C, H, W).

    Raises:
        ValueError: shapes that do not fit each other, or an unknown backend.
        RuntimeError: the backend asked for by name cannot take these inputs; the message lists every reason.
    """
    _check_shapes(qkv, table, window, heads)
    backend = resolve_backend(backend)
    candidates = AUTO_ORDER if backend == "auto" else (backend,)
    refusals = {}
    for name in candidates:
        reasons = BACKENDS[name].reasons_against(qkv, table, window, heads)
        if not reasons:
            return BACKENDS[name].forward(qkv, table, window, heads)
        refusals[name] = "; ".join(reasons)
    details = ". ".join(f"{name}: {reasons}" for name, reasons in refusals.items())
    raise RuntimeError(f"attn_type {backend} cannot run here. {details}. Use attn_type: auto to have one chosen.")


def _check_shapes(qkv: Tensor, table: Tensor, window: int, heads: int) -> None:
    if window < 1 or heads < 1:
        raise ValueError(f"window is {window} and heads is {heads}; both must be at least 1.")
    if qkv.dim() != 4 or qkv.shape[1] % (3 * heads):
        raise ValueError(f"qkv has shape {tuple(qkv.shape)}; it must be (B, 3C, H, W), C a multiple of {heads} heads.")
    if tuple(table.shape) != (heads, (2 * window - 1) ** 2):
        raise ValueError(
            f"the bias table has shape {tuple(table.shape)}; for {heads} heads and window {window} it must be "
            f"({heads}, {(2 * window - 1) ** 2})."
        )
