"""Every write of every verb, failing, killed or met by a second process: what was there stays, or the new is whole."""

from __future__ import annotations

import builtins
import errno
import fcntl
import hashlib
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
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
from esc_arch.cli import main, warmup
from esc_arch.data import photographs as demo
from esc_arch.data.lmdb_check import lmdb_problem
from esc_arch.ops import cpu
from esc_arch.ops.cpu import building
from esc_arch.tools.benchmark import cost
from esc_arch.tools.export.checking import Export
from esc_arch.tools.video import upscaling

LONG = "ESC_ARCH_LONG" in os.environ
#: Moments of a verb that are tried; a training has hundreds.
TRIED = 1000 if LONG else 5
#: And of those at which a second process comes.
MET = 1000 if LONG else 3
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
def counted(folder: Path, act: Callable[[str], None], more: tuple[tuple[Any, str], ...] = ()) -> Iterator[list[str]]:
    """Each write, fsync, rename and new folder below `folder`, and call of `more`, is listed, after `act` knows it."""
    events: list[str] = []
    calls = [*((os, name) for name in ("fsync", "replace", "rename", "mkdir")), *more]
    originals = {(owner, name): getattr(owner, name) for owner, name in calls}
    originals |= {(builtins, "open"): builtins.open, (io, "open"): io.open}

    def happens(what: str) -> None:
        events.append(what)
        act(what)

    def patched(owner: Any, name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            by_name = isinstance(args[0], str | bytes | os.PathLike)
            if not by_name or str(Path(os.fsdecode(args[0])).absolute()).startswith(str(folder)):
                happens(name)
            return originals[owner, name](*args, **more)

        return call

    def opened(file: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
        made = originals[builtins, "open"](file, mode, *args, **more)
        inside = isinstance(file, str | os.PathLike) and str(Path(file).absolute()).startswith(str(folder))
        return _Written(made, happens) if inside and set(mode) & set("wxa+") else made

    try:
        for owner, name in originals:
            setattr(owner, name, opened if name == "open" else patched(owner, name))
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


class Meeting:
    """Stops a process at a moment until another has ended, or waits for it."""

    def __init__(self) -> None:
        self.reached, self.over = SERVER.Event(), SERVER.Event()

    def __call__(self) -> None:
        self.reached.set()
        self.over.wait(1)


def die() -> None:
    os._exit(KILLED)


def run_apart(folder: Path, verb: str, number: int, act: Callable[[], None], more: tuple[str, ...] = ()) -> None:
    """In a process of its own: the verb, in which `act` is called at a moment."""
    left = [number]

    def count(what: str) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    os.chdir(folder)
    for descriptor, name in ((1, os.devnull), (2, "apart.err")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__
    torch.set_num_threads(1)
    stand_in(verb, pytest.MonkeyPatch())
    with counted(folder, count, LOCKS if isinstance(act, Meeting) else ()):
        status = main(VERBS[verb].split())
    sys.stderr.flush()
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
    elif path.suffix == ".mkv":
        with av.open(str(path)) as video:
            assert len(list(video.decode(video=0))) == 3, path
    elif path.suffix == ".pt2":
        assert zipfile.ZipFile(path).testzip() is None, path
    elif path.name == "SHA256SUMS":
        listed = dict(reversed(line.split("  ")) for line in path.read_text().splitlines())
        there = {str(each.relative_to(path.parent)): each for each in visible(path.parent) if each != path}
        assert listed == {name: hashlib.sha256(each.read_bytes()).hexdigest() for name, each in there.items()}
    elif path.suffix in (".o", ".so"):
        assert path.read_text() == "compiled\n", path
    elif path.suffix == ".sha256":
        assert len(path.read_text()) == 64, path
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
    of_files = {key: value for key, value in test_options["network_g"].items() if key != "type"}
    torch.save({"params": ESC(**of_files).state_dict()}, "in/test.pth")
    image = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    for name in ("a", "b"):
        cv2.imwrite(f"in/{name}.png", image)
    with av.open("in/v.mkv", "w") as video:
        stream = video.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 20, 24, "yuv420p"
        for _ in range(3):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(image)))
        video.mux(stream.encode(None))
    Path("in/compiler").write_text('#!/bin/sh\nfor last; do :; done\necho compiled > "$last"\n')
    Path("in/compiler").chmod(0o755)
    train_options["train"]["total_iter"] = 2
    train_options["logger"]["save_checkpoint_freq"] = 1
    for name, options in (("train", train_options), ("test", test_options)):
        options["name"] = "run"
        Path(f"in/{name}.yml").write_text(yaml.safe_dump(options))
    return work_folder


VERBS = {
    "upscale": "upscale -i in/a.png in/b.png -o out -m in/net.pth --overwrite",
    "upscale video": "upscale -i in/v.mkv -o out/v.mkv -m in/net.pth --overwrite",
    "convert pth": "convert in/net.pth -o out/net.pth --overwrite",
    "convert safetensors": "convert in/net.pth -o out/net.safetensors --overwrite",
    "export": "export -m in/net.pth -o out/net.pt2 --batch 1 --size 16x16 --no-check --overwrite",
    "publish": "publish -m in/net.pth -o out/net --name N --author me --license MIT --dataset D --description text "
    "--tags photo --purpose text --date 2026-01-01 --images in/a.png --no-onnx --overwrite",
    "prepare benchmark": "prepare benchmark -i in -o out --scales 2 -j 1",
    "prepare train": "prepare train -i in -o out --name T --scales 2 --crop-size 12 --overlap 4 -j 1",
    "prepare demo": "prepare demo -o out -j 1",
    "train": "train -opt in/train.yml",
    "test": "test -opt in/test.yml",
    "check": "check -opt in/train.yml",
    "benchmark data": "benchmark data -opt in/test.yml --format json -o out/data.json",
    "benchmark cost": "benchmark cost --networks ESC-FP --scales 4 --output 64x64 --no-latency --format json "
    "-o out/cost.json",
    "benchmark quality": "benchmark quality -opt in/test.yml -m in/test.pth --baseline bicubic -o out/quality "
    "--no-figures",
    "warmup": "warmup --device cpu",
}
RESULTS = ("out", "experiments", "results")
#: Verbs that replace a result.
REPLACING = [verb for verb, argv in VERBS.items() if "--overwrite" in argv or ".json" in argv]
LOCKS = ((fcntl, "flock"), (os, "unlink"))


def stand_in(verb: str, patch: pytest.MonkeyPatch) -> None:
    """What takes long and writes nothing, by something short."""
    if verb == "upscale video":
        patch.setitem(upscaling.SEGMENT, "cpu", 2)
    elif verb == "export":
        patch.setattr(Export, "trace", lambda *_: torch.export.export(torch.nn.Identity(), (torch.zeros(1),)))
    elif verb == "prepare demo":
        patch.setattr(demo, "read_photograph", lambda name: np.full((24, 24, 3), len(name), np.uint8))
        patch.setattr(demo, "TRAIN", demo.TRAIN[:2])
    elif verb == "benchmark cost":
        patch.setattr(cost, "network_cost", lambda network, *_: {"network": network.name})
    elif verb == "warmup":
        patch.setenv("XDG_CACHE_HOME", os.path.abspath("out"))
        patch.setenv("CXX", os.path.abspath("in/compiler"))
        patch.setenv("ESC_ARCH_NATIVE_SOURCES", "conv_attn.cpp")
        patch.delenv("ESC_ARCH_NATIVE", raising=False)
        building._version_of.cache_clear()
        patch.setattr(cpu._State, "reasons", None)
        patch.setattr(cpu, "_load", lambda library: setattr(cpu._State, "reasons", []))
        patch.setattr(warmup, "_warm_up", lambda *_: None)


def moments(count: int, tried: int = TRIED) -> list[int]:
    return sorted({1 + index * (count - 1) // max(tried - 1, 1) for index in range(tried)} if count else set())


class Verb:
    """Runs a verb again and again, each time from where it was at first."""

    def __init__(self, name: str, folder: Path, capture: pytest.CaptureFixture[str]) -> None:
        self.name, self.folder, self.capture = name, folder, capture
        self.clear()
        Path("out").mkdir()
        status, _ = self.run(lambda _: None)
        assert status == 0, capture.readouterr().err
        self.complete = self.files()
        shutil.copytree("out", "old", symlinks=True)

    def clear(self) -> None:
        for name in RESULTS:
            shutil.rmtree(name, ignore_errors=True)

    def start(self) -> None:
        self.clear()
        if self.name in REPLACING:
            shutil.copytree("old", "out", symlinks=True)
        else:
            Path("out").mkdir()

    def run(self, act: Callable[[str], None], more: Any = ()) -> tuple[int, list[str]]:
        with (
            pytest.MonkeyPatch.context() as patch,
            _fresh_basicsr_logger(),
            counted(self.folder, act, more) as events,
        ):
            stand_in(self.name, patch)
            return main(VERBS[self.name].split()), events

    def apart(self, number: int, act: Callable[[], None]) -> Any:
        process = SERVER.Process(target=run_apart, args=(self.folder, self.name, number, act))
        process.start()
        return process

    def files(self) -> list[Path]:
        return [path for name in RESULTS for path in visible(Path(name))]

    def require_whole(self) -> None:
        """All that is there, and what was there before."""
        found = self.files()
        for path in found:
            require_whole(path)
        assert self.name not in REPLACING or set(found) >= set(self.complete)

    def require_complete(self) -> None:
        self.require_whole()
        assert set(self.files()) >= set(self.complete)
        assert not [path for name in RESULTS for path in Path(name).rglob(".*.partial")]


@pytest.fixture(params=VERBS)
def verb(request: Any, material: Path, capsys: pytest.CaptureFixture[str], run_basicsr: Any) -> Verb:
    return Verb(request.param, material, capsys)


def test_every_write_fails_or_is_killed(verb: Verb) -> None:
    verb.start()
    status, events = verb.run(lambda _: None)
    assert status == 0, verb.capture.readouterr().err
    for number in moments(len(events)):
        verb.start()
        status, _ = verb.run(fail_at(number))
        said = verb.capture.readouterr()
        assert "Traceback" not in said.err, (number, events[number - 1], said.err)
        told = status or "was not saved, and the one before is untouched" in said.err  # a training goes on
        assert told or verb.files() == verb.complete, (number, said.err)
        verb.require_whole()
        assert not [path for name in RESULTS for path in Path(name).rglob(".*.partial") if path.is_file()], number
    for number in moments(len(events)):
        verb.start()
        process = verb.apart(number, die)
        process.join()
        assert process.exitcode in (KILLED, 0), (number, process.exitcode)
        verb.require_whole()
    if events:
        status, _ = verb.run(lambda _: None)
        said = verb.capture.readouterr().err
        assert status == 0 or "exists, and nothing is overwritten" in said, said
        verb.require_complete()


def test_a_second_process_comes_at_every_moment(verb: Verb) -> None:
    """The second does all of its work while the first one stops, or waits for it, or is refused."""
    verb.start()
    _, events = verb.run(lambda _: None, LOCKS)
    assert bool(events) == (verb.name != "check")  # which writes nothing
    for number in moments(len(events), MET):
        verb.start()
        verb.capture.readouterr()
        meeting = Meeting()
        first = verb.apart(number, meeting)
        meeting.reached.wait(60)
        status, _ = verb.run(lambda _: None)
        meeting.over.set()
        first.join()
        ends = {
            "second": (status, verb.capture.readouterr().err),
            "first": (first.exitcode, Path("apart.err").read_text()),
        }
        assert 0 in (status, first.exitcode), (number, events[number - 1], ends)
        for status, text in ends.values():
            refused = [line for line in text.splitlines() if line.startswith("basicsr ")]
            assert status in (0, 1, 2) and bool(status) == (len(refused) == 1), (number, events[number - 1], ends)
            assert "Traceback" not in text and "No such file" not in text, (number, events[number - 1], ends)
        verb.require_complete()
