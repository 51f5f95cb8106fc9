"""Networks and tools where BasicSR is not installed, or is hidden. Needs none of the other tests' files.

In an environment without BasicSR: `pytest --confcutdir tests/standalone tests/standalone`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What only training needs.
HIDDEN = ("basicsr", "lmdb")
HIDE = f"""
import sys

class Hide:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {HIDDEN}
        return None if hidden else self.finder.find_spec(name, path, target)

assert not set(sys.modules) & set({HIDDEN})
sys.meta_path[:] = map(Hide, sys.meta_path)
sys.path.insert(0, {str(ROOT)!r})
import torch
import esc_arch
"""
#: The doctor's self-tests run in processes from which nothing is hidden: they tell something where BasicSR is not.
NO_TEST = ["--no-test"] * (importlib.util.find_spec("basicsr") is not None)
SMALL = "dim=8, pdim=4, kernel_size=5, n_blocks=1, conv_blocks=1, window_size=4, num_heads=2, upscaling_factor=2"


#: One process for all, as each takes seconds to start.
CODE = f"""
import esc_arch.ops.dispatch, esc_arch.modules, esc_arch.archs, esc_arch.checkpoints
assert "cv2" not in sys.modules
import esc_arch.tools.upscale, esc_arch.tools.export

from esc_arch import ESC, ConvAttn, UserError
from esc_arch.cli import main

net = ESC({SMALL})
assert net(torch.rand(1, 3, 9, 7)).shape == (1, 3, 18, 14)
torch.save({{"params": net.state_dict()}}, "net.pth")
model = esc_arch.load("net.pth")
assert esc_arch.upscale(torch.rand(3, 5, 6), model).shape == (3, 10, 12)

from PIL import Image
Image.new("RGB", (7, 5), "red").save("small.png")
assert main(["upscale", "-i", "small.png", "-o", "large.png", "-m", "net.pth"]) == 0
assert Image.open("large.png").size == (14, 10)
assert main(["convert", "net.pth"]) == 0
try:
    from esc_arch import ESCModel
except ImportError as error:
    print(error)
assert main(["train", "-opt", "options.yml"]) == 2
assert main(["prepare", "demo"]) == 2
assert "basicsr" not in sys.modules
print("the doctor:")
main(["doctor", *{NO_TEST}])
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HIDE + CODE], cwd=tmp_path_factory.mktemp("without"), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def test_networks_and_pictures(done: subprocess.CompletedProcess[str]) -> None:
    """And parts that know nothing of BasicSR."""
    assert done.returncode == 0, done.stderr
    assert "ESCModel is for training. It needs BasicSR, which is not installed: run `basicsr" in done.stdout


@pytest.mark.parametrize("verb", ["train", "prepare"])
def test_what_needs_basicsr_says_so(verb: str, done: subprocess.CompletedProcess[str]) -> None:
    assert f"basicsr {verb}: It needs BasicSR, which is not installed: run `basicsr setup-training`" in done.stderr


def test_the_doctor(done: subprocess.CompletedProcess[str]) -> None:
    assert "basicsr" in done.stdout.partition("the doctor:")[2] and "Traceback" not in done.stderr
