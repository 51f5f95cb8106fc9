"""The user's own package: imported where it is named, and nothing beside it."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import run_command
from other_packages import write_project
from ranks import free_port, of_torchrun, run_forked, run_ranks

from esc_arch import project

MODULES = ("hat.archs", "hat.models", "hat.data")


@pytest.fixture
def command(run_basicsr: Any) -> Callable[..., Any]:
    """Runs `basicsr VERB -opt ...` in a process of its own, for which the current folder is not on the path."""
    return lambda verb, options, *arguments: run_forked(
        run_basicsr.folder, [*verb.split(), "-opt", run_basicsr.option_file(options), *arguments]
    )


@pytest.fixture
def console_command(run_basicsr: Any, tmp_path: Path) -> Callable[..., Any]:
    """The same by the console command in a new interpreter, which may import what a process forked here has already."""
    program = tmp_path / "bin" / "basicsr"
    program.parent.mkdir()
    program.write_text(
        "import sys\nfrom esc_arch.cli import main\n\nif __name__ == '__main__':\n    sys.exit(main())\n"
    )
    return lambda verb, options, *arguments: run_command(
        [sys.executable, str(program), verb, "-opt", run_basicsr.option_file(options), *arguments], run_basicsr.folder
    )


@pytest.fixture
def unlisted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forgets after a test what was imported."""
    monkeypatch.setattr(project, "_FOLDERS", {})
    monkeypatch.setenv("ESC_ARCH_PROJECT", "{}")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    for name in ("hat", "hat.archs", "plain", "plain.archs", "mine"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
        del sys.modules[name]


@pytest.fixture
def options(train_options: Any, work_folder: Path) -> Any:
    """A training of another project, whose package is in the current folder."""
    write_project(work_folder)
    train_options |= {"model_type": "HATModel", "network_g": {"type": "HAT", "upscale": 2}}
    train_options["datasets"]["train"]["type"] = "HATDataset"
    return train_options


def test_a_project_is_trained_from_its_folder(command: Any, options: Any) -> None:
    """With data that processes load which are not forked, and so have to find the package by themselves."""
    project = Path("hat/__init__.py")
    project.write_text("import torch.multiprocessing\ntorch.multiprocessing.set_start_method('spawn', force=True)\n")
    options["datasets"]["train"]["num_worker_per_gpu"] = 1
    run = command("train", options, "--import", *MODULES[:2], "--import", MODULES[2])
    assert run.status == 0, run.err
    assert "body.0.weight" in run.weights()
    assert "loaded in Process by spawn" in run.out
    for module in MODULES:
        path = Path(*module.split(".")).with_suffix(".py").absolute()
        assert run.err.count(f"Note: imported {module}, which ran the code of {path}.") == 1
    named = [line for line in run.err.splitlines() if "registry is hat." in line]
    assert len(named) == 5, run.err  # once each, and not by the workers


def test_modules_named_in_the_option_file(command: Any, options: Any) -> None:
    options = {"import": list(MODULES)} | options
    checked = command("check", options, "--json")
    assert checked.status == 0, checked.err
    (file,) = json.loads(checked.out)["files"]
    assert "network_g: HAT of hat.archs can be built, 556 parameters" in file["checked"]
    assert "Note: imported hat.archs, which ran the code of" in checked.err
    run = command("train", options)
    assert run.status == 0, run.err
    options["datasets"] = {"test_1": options["datasets"]["val"]}
    del options["train"]
    options["path"]["pretrain_network_g"] = "experiments/trial/models/net_g_latest.pth"
    tested = command("test", options, "--force_yml", "val:suffix=~")
    assert tested.status == 0, tested.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="with GPUs the processes would use them")
def test_every_process_of_a_distributed_training_knows_them(run_basicsr: Any, options: Any) -> None:
    options["datasets"]["train"]["num_worker_per_gpu"] = 1
    del options["num_gpu"]
    argv = ["train", "-opt", run_basicsr.option_file(options | {"import": list(MODULES)}), "--launcher", "pytorch"]
    runs = run_ranks(run_basicsr.folder, argv, of_torchrun(free_port()))
    for run in runs:
        assert run.status == 0, run.err
        assert "loaded in Process by spawn" in run.out
    assert "".join(run.err for run in runs).count("Note: imported hat.archs") == 1


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [
        ("check", ["--no-data"]),
        ("warmup", ["--size", "8x8", "--device", "cpu"]),
        ("benchmark cost", ["--output", "32x32"]),
        ("benchmark quality", ["--protocol", "srmodel"]),
        ("benchmark data", []),
        ("doctor", ["--no-test"]),
    ],
)
def test_every_verb_that_reads_option_files_takes_them(
    verb: str, arguments: list[str], command: Any, options: Any, test_options: Any
) -> None:
    if verb == "benchmark quality":
        test_options |= {"model_type": "HATModel", "network_g": options["network_g"]}
        options = test_options
    options["import"] = ["hat.models", "hat.data"]
    run = command(verb, options, "--import", "hat.archs", *arguments)
    if verb == "benchmark quality":
        assert run.status == 2 and "names no weights" in run.err  # of the package's network, which is known
    else:
        assert run.status in (0, 1), run.err  # the doctor may find problems, and the data are no benchmark's
    assert "not known" not in run.err and "Traceback" not in run.err
    for module in MODULES:
        assert f"Note: imported {module}, " in run.err
    if verb == "doctor":
        assert "arch of hat.archs" in run.out and "HAT" in run.out


@pytest.mark.parametrize("key", ["model_type", "network_g:type", "datasets:train:type", "train:pixel_opt:type"])
def test_an_unknown_name_says_how_to_name_its_module(key: str, run_basicsr: Any, train_options: Any) -> None:
    run = run_basicsr("check", train_options, "--force_yml", f"{key}=Own")
    assert run.status == 2
    assert f"{key}: 'Own' is not known. " in run.err
    assert "If it is of your own package, name the module: --import MODULE, or import: in the option file" in run.err


@pytest.mark.parametrize("key", ["train:optim_g:type", "train:scheduler:type"])
def test_names_that_no_package_adds_do_not(key: str, run_basicsr: Any, train_options: Any) -> None:
    run = run_basicsr("check", train_options, "--force_yml", f"{key}=Own")
    assert f"{key}: 'Own' is not known. " in run.err and "--import" not in run.err


def test_what_modules_print_is_not_in_the_json(command: Any, options: Any, work_folder: Path) -> None:
    with (work_folder / "hat" / "archs.py").open("a") as file:
        file.write("\nprint('hello')\n")
    checked = command("check", options, "--json", "--import", *MODULES)
    assert json.loads(checked.out)["files"][0]["ok"]
    assert "hello" in checked.err


def test_nothing_in_the_current_folder_is_imported_unasked(
    console_command: Any, command: Any, options: Any, work_folder: Path
) -> None:
    """Neither by this program nor by the modules that are named: they say what else is to be named."""
    for name in ("helper", "triton", "wandb", "sitecustomize"):
        Path(f"{name}.py").write_text(f"import pathlib\npathlib.Path('mark_{name}').touch()\n")
    options["import"] = list(MODULES)
    run = console_command("check", options)
    assert run.status == 0, run.err
    Path("hat/__init__.py").write_text("import helper\n")
    run = command("check", options)
    assert run.status == 2
    (line,) = [line for line in run.err.splitlines() if "cannot be imported" in line]
    assert line.endswith(
        f"import: hat.archs cannot be imported: ModuleNotFoundError: No module named 'helper' "
        f"({work_folder / 'hat' / '__init__.py'}, line 1). It is in the current folder, of which only named modules "
        "are imported: name helper, too"
    )
    assert not list(work_folder.glob("mark_*"))
    run = command("check", options, "--import", "helper")
    assert run.status == 0, run.err
    assert [path.name for path in work_folder.glob("mark_*")] == ["mark_helper"]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import not_installed", "ModuleNotFoundError: No module named 'not_installed' (FILE, line 1)"),
        ("x = 1\nraise ValueError('two\\nlines')", "ValueError: two lines (FILE, line 2)"),
        ("import sys\nsys.exit(0)", "SystemExit: 0 (FILE, line 2)"),
        ("from basicsr.utils.registry import ARCH_REGISTRY as R\n\nR.register()(type('EDSR', (), {}))",
         "AssertionError: An object named 'EDSR' was already registered in 'arch' registry! (FILE, line 3)"),
        ("def f(:", "SyntaxError: invalid syntax (archs.py, line 1)"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("unlisted")
def test_a_module_that_fails_is_one_clear_line(
    code: str, reason: str, run_basicsr: Any, train_options: Any, work_folder: Path
) -> None:
    file = write_project(work_folder) / "archs.py"
    file.write_text(code)
    line = f"hat.archs cannot be imported: {reason.replace('FILE', str(file))}"
    run = run_basicsr("train", {"import": "hat.archs"} | train_options)
    assert (run.status, run.out) == (2, "")
    assert run.err.splitlines() == ["basicsr train: trial.yml: 1 problem(s):", f"trial.yml:1:1: import: {line}"]
    run = run_basicsr("train", train_options, "--import", "hat.archs")
    assert (run.status, run.err.splitlines()) == (2, [f"basicsr train: --import: {line}"])
    assert not Path("experiments").exists()


@pytest.mark.usefixtures("unlisted")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[json, mine]", "mine cannot be imported: there is no module mine, neither in the current"),
        ("json.nothing", "json.nothing cannot be imported: there is no module json.nothing, neither in the current"),
        ("5", "5 given; must be a module, such as hat.archs, or a list of modules"),
        ("false", "False given; must be a module"),
        ("[../hat]", "['../hat'] given; must be a module"),
        ("[hat, 5]", "['hat', 5] given; must be a module"),
    ],
)
def test_names_that_cannot_be(value: str, message: str, run_basicsr: Any, train_options: Any) -> None:
    run = run_basicsr("check", train_options, "--force_yml", f"import={value}")
    assert run.status == 2
    assert f"--force_yml import={value}: import: {message}" in run.err


@pytest.mark.usefixtures("unlisted")
def test_a_folder_without_init_gives_way_to_a_package_elsewhere(work_folder: Path) -> None:
    """And is imported itself where there is none."""
    for name in ("plain", "this"):
        Path(name).mkdir()
        Path(name, "archs.py").touch()
    project.import_modules(["plain.archs", "this"], "--import")
    assert sys.modules["plain.archs"].__file__ == str(work_folder / "plain" / "archs.py")
    assert not str(sys.modules["this"].__file__).startswith(str(work_folder))


def test_child_processes_import_nothing_from_the_current_folder(
    work_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    for name in ("socket", "uuid"):
        Path(f"{name}.py").write_text(f"import pathlib\npathlib.Path('mark_{name}').touch()\n")
    project.leave_current_folder()
    child = multiprocessing.get_context("spawn").Process(target=print)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert not list(work_folder.glob("mark_*"))


def test_the_module_goes_on_without_the_current_folder(work_folder: Path) -> None:
    """With -m Python itself begins there."""
    for name in ("typing", "argparse", "yaml"):
        Path(f"{name}.py").write_text("open('ran', 'w')\n", encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    run = subprocess.run(
        [sys.executable, "-m", "esc_arch", "--version"], env=environment, capture_output=True, text=True
    )
    assert run.stdout.startswith("esc_arch ") and not Path("ran").exists(), run.stderr
