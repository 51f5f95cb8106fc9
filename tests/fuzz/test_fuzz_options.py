"""Option files changed at random: they are used, or refused with messages; nothing else happens, and nothing runs."""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import INTERESTING, TEXTS, Tally, fuzz, mutate_tree, mutated
from hypothesis import given
from hypothesis import strategies as st

from esc_arch import UserError
from esc_arch.options import apply_force_yml, checked_options, load_yaml

ROOT = Path(__file__).parents[2]
SHIPPED = [file.read_bytes() for file in sorted((ROOT / "options").glob("*.yml"))]
#: What YAML can say and option files do not: tags, aliases, merges, keys that are no text, several documents.
SNIPPETS = (
    *("<<: *a", "a: &a [*a]", "b: &b {b: *b}", "!!python/object/apply:os.system ['touch mark']", "x: !!binary aGk="),
    *("? [a, b]\n: c", "? {a: b}\n: c", "1: 2", "~: 3", "2024-01-01: 4", "x: 2024-99-99", "x: !!set {a, b}", "---"),
    *("...", "%YAML 9.9", "\t", "- x", "  x: 1", "x: 0b12", "x: 0o9", "x: 1_000", "x: 1:30:00", "x: .nan"),
    *("x: !!int z", "x: !!float ''", "x: !!omap [a: 1]", "x: &a 1\ny: *b", "x: '", 'x: "\\ud800"', "x: |\n  y", "x: @"),
    *("x: `", "x: %", "x: !!bool z", "x: !!timestamp z", "x: !!binary z", "x: !!int ''"),
    *("x: " + "[" * 3000, "x: " + "{a: " * 2000, "x: " + "9" * 5000, "x: 1e" + "9" * 30, "\ufeff", "# " + "é" * 50),
    "a1: &a1 [x, x]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(2, 60)),
)
VALUES = [
    *(None, True, False, -1, 0.5, -0.0, 1e300, float("nan"), float("inf"), 10**30, 10**400, *INTERESTING),
    *TEXTS,
    *([], [[]], [None], [1, "a"], {}, {"type": None}, {"type": "ESC"}, {"a": {"b": {}}}, {1: 2}, b"\xff", [1] * 100),
]
#: More work than a test can do, and right to ask for.
LIMITED = {"total_iter": 8, "num_worker_per_gpu": 1, "batch_size_per_gpu": 8, "val_freq": 10**9, "n_blocks": 4}


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """A shipped option file with lines taken out, repeated, moved, indented or put in."""
    lines = draw(st.sampled_from(SHIPPED)).decode().splitlines()
    for _ in range(draw(st.integers(0, 4))):
        at, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        kind = draw(st.sampled_from(("delete", "repeat", "move", "indent", "snippet", "snippet", "value")))
        if kind == "delete" and len(lines) > 1:
            del lines[at]
        elif kind == "repeat":
            lines.insert(other, lines[at])
        elif kind == "move":
            lines.insert(other, lines.pop(at))
        elif kind == "indent":
            lines[at] = " " * draw(st.integers(0, 5)) + lines[at].lstrip()
        elif kind == "snippet":
            lines.insert(at, draw(st.sampled_from(SNIPPETS)))
        elif kind == "value":
            lines[at] = f"{lines[at].partition(':')[0]}: {draw(st.sampled_from(SNIPPETS)).partition(': ')[2]}"
    return "\n".join(lines).encode("utf-8", "surrogatepass")


@st.composite
def trees(draw: st.DrawFn, sources: list[dict[str, Any]]) -> dict[str, Any]:
    """Options with entries taken out, renamed, replaced, copied or nested."""
    options = copy.deepcopy(draw(st.sampled_from(sources)))
    mutate_tree(draw, options, VALUES)
    return options


def arguments(file: Path, **given: Any) -> argparse.Namespace:
    return argparse.Namespace(
        **{"opt": str(file), "launcher": "none", "auto_resume": False, "debug": False, "force_yml": None} | given
    )


def write(file: Path, options: dict[str, Any]) -> None:
    try:
        text = yaml.safe_dump(options, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError:  # surrogates
        text = repr(options)
    file.write_bytes(text.encode("utf-8", "surrogatepass"))


def test_files_are_read_or_refused(work_folder: Path) -> None:
    tally, file = Tally(), work_folder / "options.yml"

    @fuzz(150, 4000)
    @given(st.one_of(texts(), mutated(SHIPPED)))
    def run(text: bytes) -> None:
        file.write_bytes(text)
        with tally.example():
            assert isinstance(load_yaml(file), dict)

    run()
    tally.check("option files read")
    assert os.listdir(work_folder) == [file.name]


def test_options_are_right_or_refused(work_folder: Path, train_options: Any, test_options: Any) -> None:
    tally, file = Tally(), work_folder / "options.yml"
    shipped = [load_yaml(name) for name in sorted((ROOT / "options").glob("*.yml"))]

    @fuzz(150, 4000)
    @given(
        st.one_of(trees([train_options]), trees([test_options]), trees(shipped)),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    )
    def run(options: dict[str, Any], is_train: bool, resume: bool, debug: bool) -> None:
        write(file, options)
        with tally.example():
            checked_options(str(work_folder), is_train, arguments(file, auto_resume=resume, debug=debug))

    run()
    tally.check("option files checked")
    assert os.listdir(work_folder) == [file.name]


def test_forced_options_are_set_or_refused(work_folder: Path, train_options: Any) -> None:
    tally = Tally()
    keys = ["name", "scale", "train:total_iter", "train:optim_g:type", "network_g", "x:y:z", "", ":", "a::b"]
    made = st.builds(
        lambda key, sign, value: f"{key}{sign}{value}",
        st.sampled_from(keys),
        st.sampled_from(("=", "=", "=", "==", ":", "")),
        st.one_of(st.sampled_from([*TEXTS, *SNIPPETS, *map(str, VALUES)]), st.text(max_size=20)),
    )

    @fuzz(100, 4000)
    @given(st.lists(made, min_size=1, max_size=3))
    def run(entries: list[str]) -> None:
        with tally.example():
            apply_force_yml(copy.deepcopy(train_options), entries)

    run()
    tally.check("--force_yml")
    assert not os.listdir(work_folder)


def limit(tree: Any) -> None:
    """Numbers that ask for much work, and have a right to, become small."""
    if isinstance(tree, dict):
        for key, most in LIMITED.items():
            if isinstance(tree.get(key), int | float) and tree[key] > most:
                tree[key] = most
    for value in tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else ():
        limit(value)


@pytest.mark.parametrize("verb", ["train", "test"])
def test_runs_succeed_or_are_refused(run_basicsr: Any, train_options: Any, test_options: Any, verb: str) -> None:
    tally = Tally()
    source = {"train": train_options, "test": test_options}[verb]
    if verb == "train":
        source["train"]["total_iter"] = 2

    @fuzz(10, 300)
    @given(trees([source]))
    def run(options: dict[str, Any]) -> None:
        limit(options)
        file = run_basicsr.folder / "options.yml"
        write(file, options)
        with tally.example():
            done = run_basicsr(verb, file.name)
            assert done.status in (0, 2), done.err
            if done.status:
                raise UserError(done.err)

    run()
    tally.check(f"basicsr {verb}")
