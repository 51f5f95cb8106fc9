"""What documents name is there: commands, which the verbs' parsers accept, files and links. The site, the notebook."""

from __future__ import annotations

import argparse
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esc_arch.cli import VERBS
from esc_arch.cli.arguments import add_arguments

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOK = ROOT / "docs" / "first_steps.ipynb"


def commands(document: Path) -> Iterator[list[str]]:
    """What follows `basicsr` or `-m esc_arch` in the blocks of commands."""
    for block in re.findall(r"```bash\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for command in line.split(" && "):
                words = shlex.split(command, comments=True)
                if words[:1] == ["basicsr"]:
                    yield words[1:]
                elif "basicsr" in words and words[0] in ("srun", "torchrun"):
                    yield words[words.index("basicsr") + 1 :]
                elif "esc_arch" in words and words[0] == "torchrun":
                    yield words[words.index("esc_arch") + 1 :]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_are_understood(document: Path) -> None:
    for verb, *words in commands(document):
        assert verb in VERBS
        parser = argparse.ArgumentParser(exit_on_error=False)
        add_arguments(parser, verb)
        try:
            parser.parse_args(words)
        except (argparse.ArgumentError, SystemExit) as error:
            pytest.fail(f"{document.name}: basicsr {shlex.join([verb, *words])}: {error}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_are_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = set(re.findall(r"\b(?:options|benchmarks|tests|docs)/[\w/]+\.(?:yml|py|md)\b", text))
    assert [name for name in sorted(named) if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_links_lead_to_files(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text(encoding="utf-8"))
    assert [link for link in links if not (document.parent / link).is_file()] == []


def test_the_readme_is_short_and_has_the_two_lines() -> None:
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert sum(line.startswith("python3 -m venv .venv && ") for line in lines) == 2


def test_links_of_the_package_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """README.md as it is; once pyproject.toml has the repository's address, with links and pictures that lead there."""
    setuptools = pytest.importorskip("setuptools")
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: given.append(arguments))
    for name in ("setup.py", "pyproject.toml", "requirements.txt", "README.md", "esc_arch/version.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    runpy.run_path(str(tmp_path / "setup.py"))
    with (tmp_path / "pyproject.toml").open("a", encoding="utf-8") as file:
        file.write('\n[project.urls]\nRepository = "https://example.org/esc/"\n')
    runpy.run_path(str(tmp_path / "setup.py"))
    before, after = (arguments["long_description"] for arguments in given)
    assert before == README.read_text(encoding="utf-8")
    assert "](https://example.org/esc/raw/HEAD/docs/images/esc.svg)" in after
    assert "[All flags](https://example.org/esc/blob/HEAD/docs/upscale.md)" in after
    assert re.findall(r"\]\((?!https?:)", after) == []


def test_the_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Built with every warning an error: dead links, pages out of the menu, unreadable docstrings. Search has all."""
    for package in ("mkdocs", "material", "mkdocstrings", "mkdocs_jupyter"):
        pytest.importorskip(package)
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    pages = {entry["location"] for entry in json.loads((tmp_path / "search/search_index.json").read_text())["docs"]}
    assert {"finetune/", "coming_from/", "api/networks/#esc_arch.archs.ESC", "first_steps/"} <= pages
    assert "not in the nav" not in done.stderr


def test_the_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is committed without outputs, and runs: the loss falls, and the last cell draws."""
    nbformat = pytest.importorskip("nbformat")
    preprocessors = pytest.importorskip("nbconvert.preprocessors")
    pytest.importorskip("ipykernel")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    preprocessors.ExecutePreprocessor(timeout=200, kernel_name="python3").preprocess(notebook)
    text = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    losses = [float(number) for number in re.findall(r"loss (\S+)", text)]
    assert len(losses) == 5 and losses[-1] < losses[0]
    assert "image/png" in code[-1].outputs[-1].data


def test_the_way_to_every_table_is_told() -> None:
    text = (ROOT / "docs/reproduce.md").read_text(encoding="utf-8")
    named = set(re.findall(r"options/(\w+\.yml)", text))
    networks = ("ESC", "ESC_light", "ESC_FP", "ESC_DFLIP")
    wanted = {f"{verb}_{net}_x{scale}.yml" for verb in ("train", "test") for net in networks for scale in (2, 3, 4)}
    assert wanted | {"train_ESCLTE.yml", "test_ESCLTE.yml", "test_ESC_Real_x4.yml"} <= named
    verbs = {tuple(words[:2]) for words in commands(ROOT / "docs/reproduce.md")}
    assert {("prepare", "train"), ("prepare", "benchmark")} <= verbs
    assert {("benchmark", part) for part in ("data", "quality", "cost")} <= verbs
    per_gpu = {int(size) for size in re.findall(r"batch_size_per_gpu=(\d+)", text)}
    assert per_gpu == {64 // gpus for gpus in (1, 8)}
