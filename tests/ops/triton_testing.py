"""What tests of Triton kernels share: a quicker interpreter, and compiling without a GPU.

Whether kernels are interpreted is settled when triton is imported. So tests for the interpreter are skipped in an
ordinary process, and `test_triton_support.py` runs those of all files in a process of their own.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
from networks import needs_cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
#: The id is what tests in the interpreter are chosen by.
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(not INTERPRETED, reason="run by another test"), id="interpreter"),
    pytest.param("cuda", marks=needs_cuda),
]


#: Keywords of a launch that are no arguments of the kernel.
LAUNCH_OPTIONS = {"num_warps", "num_stages", "num_ctas", "maxnreg", "ir_override", "enable_fp_fusion", "warmup"}


def interpret_quickly_and_strictly(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter patches triton.language for milliseconds at every call of a helper, though it stays patched.

    And it ignores keywords that the kernel has no argument for, which compiled kernels refuse.
    """
    from triton.runtime import interpreter

    patched = set()
    launch = interpreter.GridExecutor.__call__

    def launch_strictly(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert set(kwargs) <= {*self.arg_names, *LAUNCH_OPTIONS}
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        modules = frozenset(id(value) for value in self.fn.__globals__.values() if value in (language, language.core))
        if modules not in patched:
            patched.add(modules)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    language = interpreter.tl
    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_strictly)


def skip_without_assembler() -> Iterator[None]:
    """For a fixture of tests that compile."""
    pytest.importorskip("triton")
    if INTERPRETED:
        pytest.skip("interpreted kernels are not compiled")
    try:
        from triton.backends.nvidia import compiler

        compiler.get_ptxas(90)
    except Exception as error:
        pytest.skip(f"no ptxas: {error}")
    yield


def compile_for_a_gpu(
    kernel: Any, constants: Mapping[str, Any], pointers: Mapping[str, str], capability: int, config: Any
) -> Any:
    """A kernel's assembly for a GPU of this compute capability (90 is 9.0), with its metadata.

    Args:
        kernel: a jitted function, tuned or not.
        constants: its constexpr arguments, beside those of `config`; others may be among them.
        pointers: the type behind each argument that is a pointer, such as bf16; the rest are 32-bit integers.
        config: triton.Config.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    function = kernel.fn if hasattr(kernel, "configs") else kernel
    names = function.arg_names
    constants = {name: value for name, value in {**constants, **config.kwargs}.items() if name in names}
    types = {name: f"*{kind}" for name, kind in pointers.items()}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in types}
    return compile(
        ASTSource(function, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages, "enable_fp_fusion": True},
    )
