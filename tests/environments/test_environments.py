"""Parts of the compatibility matrix that need no new environment: messages without extras, and how cells run."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import matrix
import pytest
import smoke

ROOT = Path(__file__).parents[2]
SETUP = (ROOT / "setup.py").read_text(encoding="utf-8")
#: Packages of each extra. The rest of an extra is needed for tests, or imported by these.
PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "plot": ("matplotlib",),
    "publish": ("huggingface_hub",),
    "spandrel": ("spandrel",),
    "video": ("av",),
    "lpips": ("lpips",),
    "wandb": ("wandb",),
}
#: A Python that starts with it finds none of the packages.
BLOCKER = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec


def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in {blocked!r} else find_spec(name, path, target)


PathFinder.find_spec = find_others
"""


def test_every_extra_has_steps() -> None:
    extras = re.search(r"extras_require=\{(.*?)\n    \},", SETUP, re.S)
    assert extras is not None
    others = {"completion", "docs", "flash-attn", "test", "train"}
    names = set(re.findall(r'^        "([\w-]+)":', extras[1], re.M)) - others
    assert names == set(matrix.EXTRAS) == set(PACKAGES)
    for extra in names:
        assert {f"with-{extra}", f"without-{extra}"} <= smoke.STEPS.keys()
    assert set(matrix.CORE) <= smoke.STEPS.keys()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the core steps leave it, with a checkpoint."""
    import torch
    from PIL import Image
    from skimage.data import astronaut

    import esc_arch

    folder = tmp_path_factory.mktemp("trained")
    (folder / "gt").mkdir()
    for index in range(4):
        Image.fromarray(astronaut()[60 * index : 60 * index + 48, 100:148]).save(folder / f"gt/{index}.png")
    net = esc_arch.ESC(**{key: value for key, value in smoke.NETWORK.items() if key != "type"})
    (folder / smoke.WEIGHTS).parent.mkdir(parents=True)
    torch.save({"params": net.state_dict()}, folder / smoke.WEIGHTS)
    return folder


@pytest.mark.parametrize("extra", PACKAGES)
def test_without_an_extra_its_name_is_said(
    extra: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocker = tmp_path / "sitecustomize.py"
    blocker.write_text(BLOCKER.format(blocked=PACKAGES[extra]), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    # The command of an installation may belong to another copy of the package
    monkeypatch.setattr(
        smoke, "basicsr", lambda *arguments, **more: smoke.command(sys.executable, "-m", "esc_arch", *arguments, **more)
    )
    monkeypatch.chdir(trained)
    assert smoke.STEPS[f"without-{extra}"]() == "named"


def test_a_failed_step_is_told_and_the_next_is_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps: dict[str, Callable[[], str]] = {"bad": lambda: smoke.python("raise SystemExit(3)"), "good": lambda: "fine"}
    monkeypatch.setattr(smoke, "STEPS", steps)
    smoke.main(["bad", "good"])
    bad, good = capsys.readouterr().out.splitlines()
    assert '"ok": false' in bad
    assert "ended with 3" in bad
    assert '"ok": true' in good


def test_the_table_names_what_failed() -> None:
    results = [
        matrix.Result("3.12/newest", "import", True, 6, "Python 3.12.1 torch 2.15.0"),
        matrix.Result("3.12/newest", "train", False, 54, "a traceback"),
        matrix.Result("3.11/2.7", "python", False, 0, "no python3.11"),
    ]
    assert list(matrix.table(results))[2:] == [
        "| 3.12/newest | Python 3.12.1 torch 2.15.0 | 2 | train | 1.0 |",
        "| 3.11/2.7 |  | 1 | python | 0.0 |",
    ]


def test_a_python_that_is_not_there_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (result,) = matrix.run_cell("3.99/newest", [], tmp_path)
    assert not result.ok
    assert "no python3.99" in result.said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["3.12"], "PYTHON/TORCH"), (["3.12/newest", "--extras", "onx"], "--extras onx: allowed are onnx, plot")],
)
def test_wrong_arguments(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["matrix.py", *arguments])
    with pytest.raises(SystemExit):
        matrix.main()
    assert message in capsys.readouterr().err
