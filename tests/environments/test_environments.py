"""Parts of the compatibility matrix that need no new environment: messages without extras, and how cells run."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matrix
import pytest
import smoke
from ranks import finish, start_forked

from esc_arch.cli import main

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


def without_packages(blocked: tuple[str, ...], argv: list[str]) -> int:
    """Do what a command of `smoke.py` would start, as a Python that finds none of these packages."""
    find_spec = PathFinder.find_spec

    def find_others(name: str, *more: Any) -> Any:
        return None if name.partition(".")[0] in blocked else find_spec(name, *more)

    PathFinder.find_spec = find_others  # type: ignore[method-assign]
    for name in [name for name in sys.modules if name.partition(".")[0] in blocked]:
        del sys.modules[name]
    if argv[0] == "-c":
        exec(argv[1], {})
        return 0
    return main(argv)


@pytest.mark.parametrize("extra", PACKAGES)
def test_without_an_extra_its_name_is_said(extra: str, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: Any) -> Any:
        (done,) = finish(trained, [start_forked(trained, without_packages, PACKAGES[extra], command[1:])])
        return subprocess.CompletedProcess(command, done.status, done.out + done.err, done.err)

    monkeypatch.setattr(smoke, "subprocess", SimpleNamespace(run=run, PIPE=None, STDOUT=None))
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
