"""Flex attention on flash-attn's kernels: which backend PyTorch is asked for, and when it is not asked."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as torch_flex
from networks import max_error, needs_cuda, normal
from torch import Tensor

from esc_arch.ops.window_attention import flash, flex, flex_flash, window_attention

HEADS, WINDOW = 2, 8


def inputs() -> tuple[Tensor, Tensor]:
    return normal(1, 3 * HEADS * 16, 20, 11), normal(HEADS, (2 * WINDOW - 1) ** 2, seed=1)


def reasons(
    capability: int = 9, installed: bool = True, dtype: torch.dtype = torch.float16, train: bool = False
) -> str:
    """Against a map that is on a GPU of this capability."""
    table = inputs()[1].requires_grad_(train)
    qkv: Any = SimpleNamespace(shape=(1, 96, 20, 11), dtype=dtype, device=torch.device("cuda", 0), requires_grad=train)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "_capability", lambda device: (capability, 0))
        patch.setattr(flash, "_installed", lambda name: installed and name == "flash_attn.cute")
        return "; ".join(flex_flash.unsupported_reasons(qkv, table, WINDOW, HEADS))


def test_what_it_needs() -> None:
    lacking = "it needs flash-attn 4 (`flash_attn.cute`), and a GPU of compute capability 9 to 11"
    assert reasons() == reasons(capability=10, dtype=torch.bfloat16) == ""
    assert reasons(capability=8) == reasons(capability=12) == reasons(installed=False) == lacking
    assert reasons(dtype=torch.float32) == "its kernels take bfloat16 and float16, not torch.float32"
    assert reasons(train=True) == "it has no gradient of the bias, so it is for inference: `flex` has one"
    with torch.no_grad():
        assert reasons(train=True) == ""


def test_an_old_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch_flex, "FlexKernelOptions")
    assert reasons() == f"flex attention's flash backend comes with PyTorch 2.10, and this is {torch.__version__}"


def test_the_cpu_is_refused() -> None:
    qkv, table = inputs()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"flex_flash cannot run here.*runs on cuda, not on cpu"):
        window_attention(qkv, table, window=WINDOW, heads=HEADS, backend="flex_flash")


@pytest.mark.parametrize(("module", "options"), [(flex_flash, {"BACKEND": "FLASH"}), (flex, None)])
def test_what_flex_attention_is_asked_for(module: Any, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, original = [], torch_flex.flex_attention

    def attention(*tensors: Tensor, kernel_options: Any, **others: Any) -> Any:
        asked.append(kernel_options)
        return original(*tensors, **others)

    monkeypatch.setattr(torch_flex, "flex_attention", attention)
    monkeypatch.setattr(flex, "_compiled", lambda: flex._attend)
    qkv, table = inputs()
    with torch.no_grad():
        out = module.forward(qkv, table, WINDOW, HEADS)
        assert max_error(out, window_attention(qkv, table, window=WINDOW, heads=HEADS, backend="naive")) < 1e-5
    assert asked == [options]


@needs_cuda
def test_on_a_gpu() -> None:
    qkv, table = (value.cuda().half() for value in inputs())
    if flex_flash.unsupported_reasons(qkv, table, WINDOW, HEADS):
        pytest.skip("no flash-attn 4 for this GPU")
    with torch.no_grad():
        fast, plain, exact = (
            window_attention(qkv.to(dtype), table.to(dtype), window=WINDOW, heads=HEADS, backend=backend)
            for backend, dtype in (("flex_flash", qkv.dtype), ("naive", qkv.dtype), ("naive", torch.float64))
        )
    assert max_error(fast, exact) <= 2 * max_error(plain, exact) + 1e-5
