"""Where problems are said to be: the file's lines and columns, or the entry of --force_yml."""

from __future__ import annotations

from pathlib import Path

import pytest

from esc_arch.options.files import apply_force_yml, load_with_positions
from esc_arch.options.positions import Positions
from esc_arch.problems import Problem

TEXT = """\
# a comment

name: no
scale: 0123
base: &base
  lr: 1:30
  type: Adam
train:
  optim_g: {<<: *base, lr: 1_000, betas: [0.9, 0.99]}
  optim_d:
    <<: *base
  "total:iter": 3
network_g: {type: ESC, num_heads: 3}
val: {name: 2024-01-02, quoted: 'no', flag: false, number: 10}
"""


@pytest.fixture
def positions(tmp_path: Path) -> Positions:
    file = tmp_path / "a.yml"
    file.write_text(TEXT)
    return load_with_positions(file)[1]


def line_and_column(positions: Positions, *keys: str) -> tuple[int | None, int | None]:
    place = positions.place(":".join(keys))
    return place.line, place.column


@pytest.mark.parametrize(
    ("keys", "place"),
    [
        (["name"], (3, 1)),
        (["train", "optim_g"], (9, 3)),
        (["train", "optim_g", "betas"], (9, 35)),
        (["train", "optim_g", "lr"], (9, 24)),
        (["train", "optim_g", "type"], (7, 3)),
        (["train", "optim_d", "lr"], (6, 3)),
        (["network_g", "num_heads"], (13, 24)),
        # what is missing is in the section that lacks it
        (["train", "optim_g", "weight_decay"], (9, 3)),
        (["train", "scheduler", "type"], (8, 1)),
        (["nothing"], (3, 1)),
        (["name", "x"], (3, 1)),
    ],
)
def test_places(positions: Positions, keys: list[str], place: tuple[int, int]) -> None:
    assert line_and_column(positions, *keys) == place


@pytest.mark.parametrize(
    ("path", "message", "place"),
    [
        ("train:optim_g:betas", "3 given; must be small", (9, 35)),
        ("network_g", "num_heads is 3 and must divide dim", (13, 24)),
        ("train", "has no loss", (8, 1)),
        ("val", "flag: is odd", (14, TEXT.splitlines()[13].index("flag") + 1)),
    ],
)
def test_places_of_problems(positions: Positions, path: str, message: str, place: tuple[int, int]) -> None:
    located = positions.locate(Problem(path, message))
    assert located.place is not None and (located.place.line, located.place.column) == place
    assert str(located) == f"{positions.file}:{place[0]}:{place[1]}: {path}: {message}"
    assert str(Problem(path, message)) == f"{path}: {message}"


def test_entries_of_force_yml(tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    file.write_text(TEXT)
    opt, positions = load_with_positions(file)
    apply_force_yml(opt, ["train:optim_g:lr=1", "train:optim_g:lr=2", "new:a:b=3", "val={name: x}"], positions)
    assert str(positions.place("train:optim_g:lr")) == "--force_yml train:optim_g:lr=2"
    assert str(positions.place("new:a")) == "--force_yml new:a:b=3"
    assert str(positions.place("val:name")) == "--force_yml val={name: x}"
    assert str(positions.place("train:optim_g:betas")) == f"{file}:9:35"
    assert str(positions.place("train:optim_g")) == f"{file}:9:3"


@pytest.mark.parametrize(
    ("key", "reading"),
    [
        ("name", "YAML reads no as false: write 'no', in quotes, if it is text"),
        ("scale", "YAML reads 0123 as 83: write '0123', in quotes, if it is text"),
        ("base:lr", "YAML reads 1:30 as 90: write '1:30', in quotes, if it is text"),
        ("train:optim_g:lr", "YAML reads 1_000 as 1000: write '1_000', in quotes, if it is text"),
        ("val:name", "YAML reads 2024-01-02 as a date: write '2024-01-02', in quotes, if it is text"),
        ("val:quoted", None),
        ("val:flag", None),
        ("val:number", None),
        ("val", None),
        ("val:missing", None),
    ],
)
def test_readings_that_surprise(positions: Positions, key: str, reading: str | None) -> None:
    assert positions.readings.get(key) == reading


def test_odd_numbers(positions: Positions) -> None:
    assert [problem.path for problem in positions.odd_numbers()] == ["scale", "base:lr"]
