"""The flags of all verbs: they wait for nothing heavy, and their choices are those of what does the work."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from networks import SMALL, randomise

from esc_arch import ESC
from esc_arch.checkpoints.conversion import CHECKPOINT_FORMATS
from esc_arch.cli import VERBS, arguments, check, export, main
from esc_arch.models.esc_model import PROTOCOLS
from esc_arch.ops.compiling import constant_when_compiled
from esc_arch.tools.benchmark.data import KNOWN_SETS
from esc_arch.tools.benchmark.latency import LATENCY_PRECISIONS
from esc_arch.tools.benchmark.paper import PAPER_ROWS
from esc_arch.tools.benchmark.tables import TABLE_FORMATS
from esc_arch.tools.upscale.batch import EXTENSIONS
from esc_arch.tools.upscale.upscaling import ALPHAS


@pytest.mark.parametrize(
    ("words", "flag", "choices"),
    [
        ("convert", "--to", CHECKPOINT_FORMATS),
        ("export", "--format", export.FORMATS),
        ("upscale", "--ext", EXTENSIONS),
        ("upscale", "--alpha_upsampler", ALPHAS),
        ("benchmark cost", "--precision", LATENCY_PRECISIONS),
        ("benchmark cost", "--format", TABLE_FORMATS),
        ("benchmark quality", "--protocol", PROTOCOLS),
        ("benchmark quality", "--paper", (*PAPER_ROWS, "none")),
        ("benchmark data", "--sets", KNOWN_SETS),
        ("check", "--for", check.PURPOSES),
    ],
)
def test_choices(words: str, flag: str, choices: Iterable[str]) -> None:
    verb, *part = words.split()
    parser = argparse.ArgumentParser()
    arguments.add_arguments(parser, verb)
    for name in part:
        (of_parts,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
        parser = of_parts.choices[name]
    (action,) = (action for action in parser._actions if flag in action.option_strings)
    assert action.choices is not None and [*action.choices] == [*choices]


def test_help_and_mistakes_load_nothing_heavy() -> None:
    program = (
        "import contextlib, sys\n"
        "from esc_arch.cli import VERBS, main\n"
        "for argv in [['--help'], ['--version'], ['upscale', '--bogus'], *([verb, '-h'] for verb in VERBS)]:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        main(argv)\n"
        "heavy = {'numpy', 'torch', 'cv2', 'basicsr', 'PIL', 'scipy', 'yaml', 'tqdm'} & {*sys.modules}\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_picture_is_enlarged_without_pytorchs_compiler_and_basicsr(work_folder: Path) -> None:
    """Their imports take longer than all the rest."""
    torch.save({"params": randomise(ESC(**SMALL)).state_dict()}, "net.pth")
    cv2.imwrite("a.png", np.zeros((9, 7, 3), np.uint8))
    program = (
        "import sys\nfrom esc_arch.cli import main\nmain('upscale -i a.png -o b.png -m net.pth'.split())\n"
        "slow = {'torch._dynamo', 'sympy', 'triton', 'basicsr', 'torchvision', 'scipy'} & {*sys.modules}\n"
        "sys.exit(f'imported {slow}' if slow else 0)\n"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.returncode == 0 and Path("b.png").is_file(), run.stderr


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([verb, "--help"])
    assert ended.value.code == 0 and f"usage: basicsr {verb}" in capsys.readouterr().out


def test_shells_complete_verbs_and_flags() -> None:
    pytest.importorskip("argcomplete")
    line = "basicsr upscale --max"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_SUPPRESS_SPACE": "1"}
    program = "import os; os.dup2(1, 8); from esc_arch.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", program], env={**os.environ, **asked}, capture_output=True, text=True)
    assert run.stdout.strip() == "--max-memory", run.stderr


def test_constants_of_compiled_functions_are_marked_as_pytorch_marks_them() -> None:
    def by_us() -> bool:
        return True

    def by_pytorch() -> bool:
        return True

    mark: Callable[..., object] = torch.compiler.assume_constant_result
    mark(by_pytorch)
    assert vars(constant_when_compiled(by_us)) == vars(by_pytorch) != {}
