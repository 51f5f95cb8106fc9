"""Numerical tests again with the kernels of other processors: a bound must not be one machine's rounding.

PyTorch, oneDNN and MKL take the widest vectors that the processor has, and sum in other orders with narrower ones.
Variables of the environment limit them for a process, and the C++ operators follow.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esc_arch.ops.cpu import building

TESTS = Path(__file__).parents[1]
OPERATIONS = [
    "test_golden.py::test_output",
    "test_golden.py::test_training_output_and_gradients",
    "ops/test_conv_attn_ops.py",
    "ops/test_flash_attention.py::test_against_the_reference",
    "ops/test_window_attention.py::test_backend_against_loops",
    "ops/test_window_attention.py::test_backend_in_half_precision",
    "ops/test_window_attention.py::test_backend_under_autocast",
]
CONV3X3 = [
    "ops/test_cpu_conv3x3.py::test_the_formula",
    "ops/test_cpu_conv3x3.py::test_any_number_of_channels",
    "ops/test_cpu_conv3x3.py::test_gradients_and_their_gradients",
]
ATTENTION = [
    "ops/test_cpu_attention.py::test_output_and_gradients",
    "ops/test_cpu_attention.py::test_a_map_of_one_pixel",
    "ops/test_cpu_attention_layer.py::test_against_float64",
]
OTHER_OPERATORS = [
    "ops/test_cpu_conv3x3.py::test_gradients_of_a_step",
    "ops/test_layer_norm.py::test_output_and_gradients",
    "ops/test_cpu_conv_attn.py::test_other_kernel_sizes",
    "ops/test_cpu_conv_attn.py::test_step_against_float64",
    "ops/test_cpu_conv_attn.py::test_layer_against_float64",
    "ops/test_cpu_conv_ffn.py::test_gradients_of_a_step",
    "ops/test_cpu_depthwise.py::test_against_float64",
]
#: Of oneDNN and MKL, by the name that PyTorch has for its own width.
LIBRARIES = {
    "default": {"ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
}

OWN = torch.backends.cpu.get_cpu_capability()
needs_avx2 = pytest.mark.skipif(OWN == "DEFAULT", reason="all tests run with these kernels")
needs_avx512 = pytest.mark.skipif(OWN != "AVX512", reason="there is no AVX-512 to do without")
needs_compiler = pytest.mark.skipif(building.find_compiler() is None, reason="the operators need g++ or clang++")


def run_again(tests: list[str], **environment: str) -> None:
    """Run tests in a new process; all pass, some of them at least, and with the vectors that are asked for."""
    width = environment.get("ATEN_CPU_CAPABILITY", OWN).upper()
    code = (
        "import sys, pytest, torch\n"
        f"assert torch.backends.cpu.get_cpu_capability() == {width!r}\n"
        "sys.exit(pytest.main(['-q', '-x', '-rN', '-p', 'no:cacheprovider', '-k', sys.argv[1], *sys.argv[2:]]))"
    )
    # (What inductor generates for flex attention does not compile below AVX2; large windows take most of the time)
    left_out = "not flex and not case6 and not case7 and not case8"
    command = [sys.executable, "-c", code, left_out, *(str(TESTS / test) for test in tests)]
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment = inherited | {"OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and re.search(r"\d{2,} passed", done.stdout), done.stdout[-6000:] + done.stderr[-3000:]


@needs_avx2
@pytest.mark.parametrize("width", ["default", pytest.param("avx2", marks=needs_avx512)])
def test_pytorchs_kernels(width: str) -> None:
    run_again(OPERATIONS, ATEN_CPU_CAPABILITY=width, ESC_ARCH_NATIVE="0", **LIBRARIES[width])


@needs_avx512
@needs_compiler
@pytest.mark.timeout(900)
def test_the_operators_with_avx2() -> None:
    """Those of two files: all of them would take a minute to compile."""
    files = {"ESC_ARCH_NATIVE_SOURCES": "conv3x3.cpp,window_attention.cpp"}
    # A cache of its own, as the build for some sources forgets what was compiled of them for another
    cache = {"XDG_CACHE_HOME": str(building.cache_folder() / "tests")}
    run_again([*CONV3X3, *ATTENTION], ATEN_CPU_CAPABILITY="avx2", **LIBRARIES["avx2"], **files, **cache)


@needs_compiler
@pytest.mark.usefixtures("native")
def test_the_operators_beside_older_libraries() -> None:
    """These sum in blocks, which is several times nearer than the sums of newer ones."""
    run_again([*CONV3X3, *OTHER_OPERATORS], **LIBRARIES["default"])
