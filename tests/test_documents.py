"""Commands and files that the documents name are there: each command is parsed by the verb it is for."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from esc_arch.cli import VERBS
from esc_arch.cli.arguments import add_arguments

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
