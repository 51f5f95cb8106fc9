"""`basicsr doctor` as a command, where everything works and where nothing does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, run_command

import esc_arch
from esc_arch.cli import main
from esc_arch.tools.doctor import command
from esc_arch.tools.doctor.report import PROBLEM, WARNING, Finding

ROOT = Path(esc_arch.__file__).parents[1]
SECTIONS = [
    "versions", "installation", "registered names", "machine", "GPUs", "operators", "backends", "environment",
    "option file",
]  # fmt: skip


def by_key(report: dict[str, Any], section: str) -> dict[str, Any]:
    return {finding["key"]: finding for finding in report["sections"][section]}


def run_beside(stubs: Path, *arguments: str, start: tuple[str, ...] = ("-m", "esc_arch", "doctor")) -> Run:
    """The command in a process that finds the modules of a folder first."""
    path = os.pathsep.join([str(stubs), str(ROOT)])
    return run_command([sys.executable, *start, *arguments], stubs, PYTHONPATH=path)


def stub(folder: Path, package: str, code: str) -> Path:
    (folder / package).mkdir()
    (folder / package / "__init__.py").write_text(code)
    return folder


def test_a_whole_report(run_basicsr: Any, train_options: Any) -> None:
    run = run_basicsr("doctor", train_options, "--json", "--no-test")
    report = json.loads(run.out)
    assert list(report["sections"]) == SECTIONS
    assert run.status == (report["status"] == "problem")
    assert by_key(report, "installation")["import"]["status"] == "ok"
    assert by_key(report, "option file")["basicsr check"]["text"] == "ready for basicsr train"
    assert by_key(report, "backends")["window attention, cpu float32: naive"]["text"] == "can run"


def one_section(monkeypatch: pytest.MonkeyPatch, *findings: Finding | Exception) -> None:
    def examine(_: object) -> Any:
        for finding in findings:
            if isinstance(finding, Exception):
                raise finding
            yield finding

    monkeypatch.setattr(command, "SECTIONS", {"only": examine})
    monkeypatch.setattr(command.installation, "basicsr_failure", lambda _: "")  # else a process is started for it


@pytest.mark.parametrize(("status", "expected"), [("ok", 0), (WARNING, 0), (PROBLEM, 1)])
def test_exit_status(
    status: str, expected: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_section(monkeypatch, Finding("a", "b", status), Finding("c", "d", status))
    assert main(["doctor"]) == expected
    assert capsys.readouterr().out.splitlines()[-1] == (f"2 {status}s." if status != "ok" else "Nothing is wrong.")


def test_a_fault_in_a_section_is_its_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one_section(monkeypatch, Finding("a", "b"), KeyError("c"))
    assert main(["doctor"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "[only]",
        "- a        b",
        "PROBLEM section  could not be examined further: KeyError: 'c'",
        "    -> Report this.",
        "",
        "1 problem.",
    ]


@pytest.mark.parametrize("given", ["0", "-1", "x", "nan", "inf"])
def test_a_time_that_is_none(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["doctor", "--timeout", given])
    assert f"'{given}' given; must be a number of seconds above 0" in capsys.readouterr().err


# --- where it cannot be imported ----------------------------------------------------------------------------------


def test_basicsr_is_broken(tmp_path: Path) -> None:
    (tmp_path / "trial.yml").write_text("name: trial\n")
    run = run_beside(
        stub(tmp_path, "basicsr", "raise ImportError('it is broken')"), "-opt", "trial.yml", "--json", "--no-test"
    )
    report = json.loads(run.out)
    assert run.status == 1, run.err
    failure = by_key(report, "installation")["import"]
    assert failure["status"] == "problem"
    assert failure["text"] == "BasicSR cannot be imported: ImportError: it is broken"
    assert by_key(report, "installation")["copies of basicsr"]["status"] == "warning"
    assert by_key(report, "installation")["basicsr"]["text"].startswith(str((tmp_path / "basicsr").resolve()))
    naive = by_key(report, "backends")["window attention, cpu float32: naive"]
    assert naive["text"] == "can run"
    option_file = by_key(report, "option file")
    assert option_file["basicsr check"]["text"] == "not known: BasicSR cannot be imported"


@pytest.mark.parametrize(("package", "error"), [("torchvision", "undefined symbol"), ("torch", "libc10.so is missing")])
def test_a_library_is_broken(tmp_path: Path, package: str, error: str) -> None:
    run = run_beside(stub(tmp_path, package, f"raise OSError({error!r})"), "--no-test")
    assert run.status == 1, run.err
    assert "Traceback" not in run.out + run.err
    assert f"BasicSR cannot be imported: OSError: {error}" in run.out
    assert f"{package} " in run.out.partition(f", cannot be imported: OSError: {error}")[0].splitlines()[-1]
    assert [line for line in run.out.splitlines() if line.startswith("[")] == [f"[{name}]" for name in SECTIONS]


def test_another_command_ends_with_the_error(tmp_path: Path) -> None:
    run = run_beside(stub(tmp_path, "torch", "raise ImportError('it is broken')"), start=("-m", "esc_arch", "warmup"))
    assert run.status == 1
    assert run.err.splitlines()[-1] == "ImportError: it is broken"
    assert run.out == ""


def test_an_import_that_ends_the_process(tmp_path: Path) -> None:
    stubs = stub(tmp_path, "torch", "import os; os.abort()")
    run = run_beside(stubs, "--no-test")
    assert run.status == 1, run.err
    assert "BasicSR cannot be imported: the process ended with signal SIGABRT" in run.out
    assert "cannot be imported: the process ended with signal SIGABRT" in run.out
    assert "[option file]" in run.out
