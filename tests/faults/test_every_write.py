"""Every write of every verb, failing and killed one after the other: what was there stays, or the new one is whole."""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import _fresh_basicsr_logger
from networks import SMALL, randomise
from ranks import SERVER

from esc_arch import ESC
from esc_arch.checkpoints import read_checkpoint
from esc_arch.cli import main
from esc_arch.data.lmdb_check import lmdb_problem

LONG = "ESC_ARCH_LONG" in os.environ
#: Moments of a verb that are tried; a training has hundreds.
TRIED = 1000 if LONG else 8
KILLED = 137

pytestmark = pytest.mark.timeout(3000 if LONG else 300)


class _Written:
    """A file whose writes are counted."""

    def __init__(self, file: Any, count: Callable[[str], None]) -> None:
        self._file, self._count = file, count

    def write(self, data: Any) -> int:
        self._count("write")
        return int(self._file.write(data))

    def __enter__(self) -> _Written:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def counted(folder: Path, act: Callable[[str], None]) -> Iterator[list[str]]:
    """Each write, fsync, rename and new folder below `folder` is listed, after `act` was told of it."""
    events: list[str] = []
    originals = {(os, name): getattr(os, name) for name in ("fsync", "replace", "rename", "mkdir")}
    originals |= {(builtins, "open"): builtins.open, (io, "open"): io.open}

    def happens(what: str) -> None:
        events.append(what)
        act(what)

    def patched(name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            if name == "fsync" or str(Path(os.fsdecode(args[0])).absolute()).startswith(str(folder)):
                happens(name)
            return originals[os, name](*args, **more)

        return call

    def opened(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        made = originals[builtins, "open"](file, mode, *args, **more)
        inside = isinstance(file, str | os.PathLike) and str(Path(file).absolute()).startswith(str(folder))
        return _Written(made, happens) if inside and set(mode) & set("wxa+") else made

    try:
        for owner, name in originals:
            setattr(owner, name, opened if name == "open" else patched(name))
        yield events
    finally:
        for (owner, name), original in originals.items():
            setattr(owner, name, original)


def fail_at(number: int) -> Callable[[str], None]:
    left = [number]

    def act(what: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")

    return act


def die_at(folder: Path, number: int, argv: list[str]) -> None:
    """In a process of its own."""
    left = [number]

    def act(what: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            os._exit(KILLED)

    os.chdir(folder)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    torch.set_num_threads(1)
    with counted(folder, act):
        status = main(argv)
    os._exit(status)


def require_whole(path: Path) -> None:
    """A file under its final name can be read to its end."""
    if path.suffix in (".pth", ".state", ".safetensors"):
        read_checkpoint(path)
    elif path.suffix == ".png":
        assert cv2.imread(str(path)) is not None, path
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".yml":
        assert yaml.safe_load(path.read_text()), path
    elif path.suffix == ".jsonl":
        for line in path.read_text().splitlines()[:-1]:  # the last one is written on
            json.loads(line)
    elif path.name == "data.mdb":
        assert lmdb_problem(path.parent) is None, path
    elif path.suffix == ".md":
        assert path.read_text().endswith("\n"), path


def visible(folder: Path) -> list[Path]:
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    hidden = (".", "run_2026", "train_run", "test_run", "events.")  # and logs, whose names have the time
    return [path for path in found if not any(part.startswith(hidden) for part in path.relative_to(folder).parts)]


@pytest.fixture
def material(work_folder: Path, photographs: Any, train_options: Any, test_options: Any) -> Path:
    """What all verbs read, in folder `in`."""
    torch.manual_seed(0)
    Path("in").mkdir()
    torch.save({"params": randomise(ESC(**SMALL)).state_dict()}, "in/net.pth")
    image = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    for name in ("a", "b"):
        cv2.imwrite(f"in/{name}.png", image)
    train_options["train"]["total_iter"] = 2
    train_options["logger"]["save_checkpoint_freq"] = 1
    for name, options in (("train", train_options), ("test", test_options)):
        options["name"] = "run"
        Path(f"in/{name}.yml").write_text(yaml.safe_dump(options))
    return work_folder


VERBS = {
    "upscale": "upscale -i in/a.png in/b.png -o out -m in/net.pth --overwrite",
    "convert pth": "convert in/net.pth -o out/net.pth --overwrite",
    "convert safetensors": "convert in/net.pth -o out/net.safetensors --overwrite",
    "prepare benchmark": "prepare benchmark -i in -o out --scales 2 -j 1",
    "prepare train": "prepare train -i in -o out --name T --scales 2 --crop-size 12 --overlap 4 -j 1",
    "train": "train -opt in/train.yml",
    "test": "test -opt in/test.yml",
    "check": "check -opt in/train.yml",
}


def moments(count: int) -> list[int]:
    return sorted({1 + index * (count - 1) // max(TRIED - 1, 1) for index in range(TRIED)} if count else set())


@pytest.mark.parametrize("verb", VERBS)
def test_every_write(verb: str, material: Path, capsys: pytest.CaptureFixture[str], run_basicsr: Any) -> None:
    argv = VERBS[verb].split()
    results = ("out", "experiments", "results")

    def start() -> None:
        for name in results:
            shutil.rmtree(name, ignore_errors=True)
        Path("out").mkdir()
        if verb == "upscale":
            shutil.copy("in/a.png", "out/a_out.png")

    def run(act: Callable[[str], None]) -> tuple[int, list[str]]:
        with _fresh_basicsr_logger(), counted(material, act) as events:
            return main(argv), events

    def require_all_whole() -> None:
        for name in results:
            for path in visible(Path(name)):
                require_whole(path)

    start()
    status, events = run(lambda _: None)
    assert status == 0, capsys.readouterr().err
    complete = [path for name in results for path in visible(Path(name))]
    for number in moments(len(events)):
        start()
        status, _ = run(fail_at(number))
        said = capsys.readouterr()
        assert "Traceback" not in said.err, (number, events[number - 1], said.err)
        told = status or "was not saved, and the one before is untouched" in said.err  # a training goes on
        assert told or [path for name in results for path in visible(Path(name))] == complete, (number, said.err)
        require_all_whole()
        assert not [path for name in results for path in Path(name).rglob(".*.partial") if path.is_file()], number
    for number in moments(len(events)):
        start()
        process = SERVER.Process(target=die_at, args=(material, number, argv))
        process.start()
        process.join()
        assert process.exitcode in (KILLED, 0), (number, process.exitcode)
        require_all_whole()
