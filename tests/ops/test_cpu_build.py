"""Compiling C++ operators: what is built when, what is kept, and what is said when it does not work.

A few tiny sources stand in for the operators: they need no header of PyTorch and compile in a moment.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import SERVER

from esc_arch.ops import cache, cpu
from esc_arch.ops.cpu import background, building

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs g++ or clang++"
)

NOT_BUILT = ["the C++ operators are not built yet"]


@pytest.fixture(autouse=True)
def new_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], None]:
    """Tiny sources and an empty cache; the function makes this process forget what it knows."""
    csrc = tmp_path / "csrc"
    csrc.mkdir()
    (csrc / "common.h").write_text("constexpr int answer = 42;\n")
    for name in ("one", "two"):
        (csrc / f"{name}.cpp").write_text(f'#include "common.h"\nextern "C" int {name}() {{ return answer; }}\n')
    monkeypatch.setattr(building, "CSRC", csrc)
    monkeypatch.setattr(building, "PREBUILT", tmp_path / "prebuilt")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for variable in ("ESC_ARCH_NATIVE", "ESC_ARCH_NATIVE_SOURCES", "CXX"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(cpu._State, "registrations", [])
    monkeypatch.setattr(cpu._State, "library", None)

    def forget() -> None:
        monkeypatch.setattr(cpu._State, "reasons", None)

    forget()
    return forget


@pytest.fixture
def csrc() -> Path:
    return building.CSRC


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was run since: the last arguments, which are sources and, of the link, an option."""
    run, found = building._run, []
    monkeypatch.setattr(
        building, "_run", lambda command, *others: (found.append(Path(command[-1]).name), run(command, *others))
    )
    return found


@needs_compiler
def test_built_once_and_found_again(new_process: Callable[[], None], commands: list[str]) -> None:
    assert cpu.unsupported_reasons() == NOT_BUILT
    assert not cpu.ready()
    assert cpu.build() > 0
    assert cpu.ready()
    assert cpu.unsupported_reasons() == []
    new_process()
    assert cpu.ready()
    assert len(commands) == 3  # two files and the link
    building.compile_library(building.recipe())
    assert len(commands) == 3


@needs_compiler
def test_only_what_changed_is_compiled_again(csrc: Path, commands: list[str]) -> None:
    first = building.compile_library(building.recipe())
    commands.clear()
    (csrc / "one.cpp").write_text('extern "C" int one() { return 1; }\n')
    assert building.compile_library(building.recipe()) != first
    assert commands[:-1] == ["one.cpp"]
    assert first.exists()  # for those who run the older version
    assert len(list((first.parent.parent / "objects").glob("*.o"))) == 2
    (csrc / "common.h").write_text("constexpr int answer = 43;\n")
    commands.clear()
    building.compile_library(building.recipe())
    assert sorted(commands[:-1]) == ["one.cpp", "two.cpp"]


@needs_compiler
@pytest.mark.parametrize("damage", ["cut", "changed", "gone", "no note"])
def test_a_damaged_library_is_built_again(new_process: Callable[[], None], damage: str) -> None:
    cpu.build()
    library = building.built_library(building.recipe())
    assert library is not None
    content = library.read_bytes()
    library.unlink()  # (this process has it loaded: its file must not change under it)
    if damage == "cut":
        library.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        library.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "no note":
        library.write_bytes(content)
        library.with_suffix(".sha256").unlink()
    new_process()
    assert cpu.unsupported_reasons() == NOT_BUILT
    cpu.build()
    assert cpu.ready()
    assert building.built_library(building.recipe()) == library


@needs_compiler
def test_several_at_once_build_once(commands: list[str]) -> None:
    recipe = building.recipe()
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: building.compile_library(recipe), range(4)))
    assert len(set(made)) == 1
    assert len(commands) == 3


@needs_compiler
def test_the_library_depends_on_cpu_compiler_and_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {building.recipe().library}
    monkeypatch.setattr(building, "_cpu", lambda: "flags: another")
    keys.add(building.recipe().library)
    monkeypatch.setattr(building, "_version_of", lambda _: "another")
    keys.add(building.recipe().library)
    monkeypatch.setattr(torch, "__version__", "another")
    keys.add(building.recipe().library)
    capabilities = {"AVX2": "-mno-avx512f", "AVX512": "-mprefer-vector-width=512", "other": "-DCPU_CAPABILITY_DEFAULT"}
    for capability, flag in capabilities.items():
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda capability=capability: capability)
        assert flag in building.recipe().flags
        keys.add(building.recipe().library)
    assert len(keys) >= 6  # one of the three is this machine's


@needs_compiler
def test_a_prebuilt_library(new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It needs no compiler; one that was built here comes first."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    built = building.compile_library(building.recipe())
    building.PREBUILT.mkdir()
    shutil.copy(built, building.PREBUILT / "AVX2.so")
    assert building.library_at_hand() == built
    monkeypatch.setattr(building, "find_compiler", lambda: None)
    assert cpu.ready() and cpu.origin() == "prebuilt, AVX2"
    assert not background.wanted()
    assert building.library_at_hand() is not None
    for module, name, value in (
        (torch.backends.cpu, "get_cpu_capability", lambda: "AVX512"),  # not there
        (building, "STABLE_ABI", False),
        (os, "environ", {**os.environ, "ESC_ARCH_NATIVE_SOURCES": "one.cpp"}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            assert building.library_at_hand() is None


@needs_compiler
def test_what_the_compiler_says_is_passed_on(
    csrc: Path, new_process: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    (csrc / "two.cpp").write_text('extern "C" int two() { return nothing; }\n')
    with pytest.raises(RuntimeError, match=r"The C\+\+ operators cannot be built: .*two\.cpp:1:.*error.*nothing"):
        cpu.build()
    (reason,) = cpu.unsupported_reasons()
    assert reason.startswith("compiling the C++ operators failed: ")
    assert "nothing" in reason
    assert not cpu.ready()
    assert not list(csrc.parent.glob("cache/esc_arch/native-*/operators.so"))
    cpu.build_by_name()
    assert not caplog.records  # it is not tried again for every layer
    (csrc / "two.cpp").write_text('extern "C" int two() { return 2; }\n')
    new_process()
    cpu.build()
    assert cpu.ready()


@needs_compiler
def test_by_name_it_is_built_and_said(caplog: pytest.LogCaptureFixture) -> None:
    cpu.build_by_name()
    assert cpu.ready()
    text = [record.getMessage() for record in caplog.records]
    assert text[0] == "Building the C++ operators (1 to 3 minutes, once) ..."
    assert text[1:3] == ["  1 of 2 parts are compiled", "  2 of 2 parts are compiled"]
    assert text[3].startswith("The C++ operators are ready after ")
    cpu.build_by_name()
    assert len(caplog.records) == 4


@needs_compiler
def test_by_name_a_failure_is_said(csrc: Path, caplog: pytest.LogCaptureFixture) -> None:
    (csrc / "one.cpp").write_text("nonsense\n")
    cpu.build_by_name()
    assert not cpu.ready()
    assert "The C++ operators cannot be built: " in caplog.records[-1].getMessage()


@needs_compiler
def test_pytorch_is_told_of_operators_once_they_are_there(csrc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch.library, "register_fake", lambda name, _: told.append(name))
    monkeypatch.setattr(torch.ops, "esc_arch", SimpleNamespace(one=None, two=None))
    for name in ("one", "left_out"):
        cpu.register(name, torch.empty_like)
    assert told == []
    cpu.build()
    cpu.register("two", torch.empty_like)
    assert told == ["esc_arch::one", "esc_arch::two"]


@needs_compiler
def test_a_library_that_does_not_load(new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.build()

    def fail(_: str) -> None:
        raise OSError("undefined symbol: x")

    monkeypatch.setattr(torch.ops, "load_library", fail)
    new_process()
    assert cpu.unsupported_reasons() == ["loading the C++ operators failed: undefined symbol: x"]


@needs_compiler
@pytest.mark.parametrize("damage", [b"", b"damaged"])
def test_a_damaged_object_is_compiled_again(csrc: Path, commands: list[str], damage: bytes) -> None:
    """As a power cut may leave it: empty, and without a note of what it should be, or with another."""
    first = building.compile_library(building.recipe())
    (obj,) = (first.parent.parent / "objects").glob("one-*.o")
    obj.write_bytes(damage)
    if not damage:
        obj.with_suffix(".sha256").unlink()
    first.unlink()
    commands.clear()
    assert building.compile_library(building.recipe()) == first
    assert commands[:-1] == ["one.cpp"]


@needs_compiler
def test_a_whole_library_that_does_not_load(
    new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Networks go on without the operators, and a build makes them again."""
    library = building.recipe().library
    cache.write(library, b"junk")
    cache.write(library.with_suffix(".sha256"), hashlib.sha256(b"junk").hexdigest().encode())
    assert not cpu.ready()
    (record,) = caplog.records
    assert record.getMessage().startswith("loading the C++ operators failed: Could not load this library: ")
    cpu.build()
    assert cpu.ready()


@needs_compiler
@pytest.mark.parametrize("plant", ["library", "note", "folder", "cache", "link", "link to cache", "parent"])
def test_what_others_may_have_written_is_not_loaded(
    plant: str, new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cpu.build()
    new_process()
    library, folder = building.recipe().library, building.cache_folder()
    monkeypatch.setattr(torch.ops, "load_library", lambda _: pytest.fail("it was loaded"))
    if plant.startswith("link"):
        linked = library if plant == "link" else folder
        linked.rename(tmp_path / "there")
        linked.symlink_to(tmp_path / "there")
        what = f"{linked} is a link"
    else:
        note = library.with_suffix(".sha256")
        parts = {"library": library, "note": note, "folder": library.parent, "cache": folder, "parent": folder.parent}
        parts[plant].chmod(0o770)
        what = f"{parts[plant]} can be written by other users"
    (reason,) = cpu.unsupported_reasons()
    assert reason.startswith(f"loading the C++ operators failed: {what}, so nothing is taken from the cache. ")


@needs_compiler
def test_what_others_own_is_not_loaded(new_process: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.build()
    new_process()
    user = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    assert f"operators.so belongs to another user (uid {user})" in cpu.unsupported_reasons()[0]
    with pytest.raises(RuntimeError, match=rf"cannot be built: .* belongs to another user \(uid {user}\)"):
        cpu.build()


@needs_compiler
def test_the_cache_is_for_this_user_alone(new_process: Callable[[], None]) -> None:
    """Whatever the umask; a folder of the user's that others may write is made so."""
    folder = building.cache_folder()
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    umask = os.umask(0)
    try:
        cpu.build()
    finally:
        os.umask(umask)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.rglob("*"))}
    assert modes.pop("esc_arch") == 0o700
    assert all(mode == (0o600 if "." in name else 0o700) for name, mode in modes.items())
    new_process()
    assert cpu.ready()


@needs_compiler
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_planted_lock(kind: str, tmp_path: Path) -> None:
    (victim := tmp_path / "victim").write_text("precious")
    lock = cache.own_folder(building.cache_folder()) / "build.lock"
    os.mkfifo(lock) if kind == "pipe" else lock.symlink_to(victim)
    with pytest.raises(RuntimeError, match=r"build\.lock cannot be locked: .*\. Remove it\."):
        cpu.build()
    assert victim.read_text() == "precious"


def test_no_home_and_no_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As in a container with a user of its own."""
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for home, named in ((None, None), ("here", "here")):
        for variable, value in (("HOME", home), ("XDG_CACHE_HOME", named)):
            monkeypatch.setenv(variable, value) if value else monkeypatch.delenv(variable)
        assert building.cache_folder() == tmp_path / f"esc_arch-{os.geteuid()}"
    assert not cpu.ready()


_ENDLESS = """#!/bin/sh
# A compiler that starts another process, as compilers do, and does not end
if [ "$1" = --version ]; then exit; fi
sleep 300 & echo $$ $! >{pids}; wait
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_compilers_end_with_the_process(number: signal.Signals, tmp_path: Path) -> None:
    """And their temporary folder goes; how is the matter of a process of its own."""
    pids, compiler = tmp_path / "pids", tmp_path / "endless"
    compiler.write_text(_ENDLESS.format(pids=pids))
    compiler.chmod(0o755)
    environment = {"CXX": str(compiler), "ESC_ARCH_NATIVE_SOURCES": "memory.cpp"}
    child = SERVER.Process(target=build_with, args=({**os.environ, **environment},))
    child.start()
    until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    os.kill(child.pid, number)
    child.join()
    assert child.exitcode not in (0, None)
    until(lambda: not any(map(runs, pids.read_text().split())))
    until(lambda: not list(building.cache_folder().glob("objects/tmp*")))


def build_with(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    cpu.build()


def until(condition: Callable[[], bool]) -> None:
    while not condition():  # (the test ends after the time that pytest gives it)
        time.sleep(0.05)


def runs(pid: str) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@needs_compiler
def test_what_a_killed_build_left_is_removed() -> None:
    left = cache.own_folder(building.cache_folder() / "objects" / "tmp123")
    (left / "half.o").touch()
    cpu.build()
    assert not left.exists()


def test_a_second_process_says_that_it_waits(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.own_folder(building.cache_folder())
    entered = threading.Event()

    def enter() -> None:
        with building._build_lock():
            entered.set()

    with building._build_lock():
        second = threading.Thread(target=enter)
        second.start()
        until(lambda: bool(caplog.records))
        assert not entered.is_set()
    second.join()
    assert entered.is_set() and "Waiting for another process" in caplog.text


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    linker = tmp_path / "linker"
    linker.write_text("#!/bin/sh\necho 'ld: final link failed: No space left on device' >&2\nexit 1\n")
    linker.chmod(0o755)
    monkeypatch.setenv("CXX", str(linker))
    message = r"cannot be built: .*/objects/\w+-\w+\.o: No space left on device \(free space there: .* Make room there"
    with pytest.raises(RuntimeError, match=message):
        cpu.build()


@needs_compiler
def test_some_of_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    everything = building.recipe()
    monkeypatch.setenv("ESC_ARCH_NATIVE_SOURCES", "two.cpp")
    assert [source.name for source in building.recipe().sources] == ["two.cpp"]
    assert building.recipe().library != everything.library
    monkeypatch.setenv("ESC_ARCH_NATIVE_SOURCES", "two.cpp,three.cpp")
    with pytest.raises(RuntimeError, match=r"NATIVE_SOURCES names three\.cpp; there are one\.cpp, two\.cpp"):
        building.recipe()


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    message = "compiling the C++ operators needs g++ or clang++ on the PATH, or CXX naming a compiler"
    assert cpu.unsupported_reasons() == [message]
    with pytest.raises(RuntimeError, match=r"The C\+\+ operators cannot be built: compiling .* needs g\+\+ or clang"):
        cpu.build()
    cpu.build_by_name()
    assert not cpu.ready()


def test_a_compiler_that_is_no_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", 'g++ "-O2')
    (reason,) = cpu.unsupported_reasons()
    assert reason.endswith("CXX naming a compiler, which CXX='g++ \"-O2' does not")


def test_switched_off_and_unknown_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESC_ARCH_NATIVE", "0")
    assert "the C++ operators are switched off by ESC_ARCH_NATIVE=0" in cpu.unsupported_reasons()
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    monkeypatch.setattr(cpu._State, "reasons", None)
    assert any("on x86-64 and arm64, not linux on riscv64" in reason for reason in cpu.unsupported_reasons())
    with pytest.raises(RuntimeError, match=r"switched off by ESC_ARCH_NATIVE=0; .*riscv64"):
        cpu.build()


def test_the_compiler_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("#!/bin/sh\nexit 1\n")
    mine.chmod(0o755)
    monkeypatch.setenv("CXX", f"{mine} -extra")
    assert building.find_compiler() == (str(mine), "-extra")
    with pytest.raises(RuntimeError, match="cannot be built: no message"):
        cpu.build()


def test_a_compiler_that_cannot_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(RuntimeError, match="broken cannot be run"):
        cpu.build()


# --- unasked ------------------------------------------------------------------------------------------------------


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Processes that were started to build, and did so at once, in this process."""
    started: list[list[str]] = []

    def start(command: list[str], **how: object) -> None:
        assert how["start_new_session"] and how["cwd"] == "/"
        started.append(command)
        reasons = cpu._State.reasons
        background.build_and_note()
        cpu._State.reasons = reasons  # of this process, which does not know yet

    monkeypatch.setattr(background, "subprocess", SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL))
    monkeypatch.setattr(cpu, "_load", lambda library: setattr(cpu._State, "reasons", []))
    return started


@needs_compiler
def test_built_in_the_background_and_used_from_the_next_image_on(unasked: list[list[str]]) -> None:
    said: list[str] = []
    background.start_build(said.append)
    assert len(unasked) == len(said) == 1 and "in the background" in said[0]
    assert not cpu.ready()
    cpu.look_again()
    assert cpu.ready()
    background.start_build(said.append)
    assert len(unasked) == len(said) == 1


@needs_compiler
@pytest.mark.parametrize("value", ["0", "built"])
def test_not_unasked_where_that_is_switched_off(
    value: str, unasked: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ESC_ARCH_NATIVE", value)
    background.start_build(pytest.fail)
    background.build_first(pytest.fail)
    assert not unasked


@needs_compiler
def test_a_failure_in_the_background_is_not_repeated(unasked: list[list[str]], csrc: Path) -> None:
    (csrc / "two.cpp").write_text("int wrong(")
    background.start_build(lambda line: None)
    background.start_build(pytest.fail)
    background.build_first(pytest.fail)
    assert len(unasked) == 1
    note = building.note_of_failure(building.recipe())
    assert note.exists()
    (csrc / "two.cpp").write_text("int right();")
    assert background.wanted()
    note.rename(building.note_of_failure(building.recipe()))  # as of a compiler that failed once
    assert not background.wanted()
    building.compile_library(building.recipe())
    assert background.wanted()


@needs_compiler
def test_not_in_the_background_beside_another_build_or_without_a_cache(
    unasked: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.own_folder(building.cache_folder())
    with building._build_lock():
        background.start_build(pytest.fail)
    (tmp_path / "file").touch()
    monkeypatch.setattr(building, "own_folder", lambda folder: tmp_path / "file")
    background.start_build(pytest.fail)
    assert not unasked


def test_the_background_finds_the_same_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "esc_arch" / "ops" / "cpu").mkdir(parents=True)
    for folder in ("", "ops", "ops/cpu"):
        (tmp_path / "esc_arch" / folder / "__init__.py").touch()
    (tmp_path / "esc_arch" / "ops" / "cpu" / "background.py").write_text(
        "from pathlib import Path\nbuild_and_note = Path(__file__).with_name('was_here').touch"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.setattr(background, "wanted", lambda: True)
    monkeypatch.setattr(
        background,
        "subprocess",
        SimpleNamespace(
            Popen=lambda command, **how: subprocess.run(command, **how, check=True), DEVNULL=subprocess.DEVNULL
        ),
    )
    background.start_build(lambda line: None)
    assert (tmp_path / "esc_arch" / "ops" / "cpu" / "was_here").exists()


@needs_compiler
def test_built_aloud_before_a_training(unasked: list[list[str]], csrc: Path, new_process: Callable[[], None]) -> None:
    said: list[str] = []
    background.build_first(said.append)
    assert cpu.ready() and not unasked
    assert said[1:3] == ["  1 of 2 parts are compiled", "  2 of 2 parts are compiled"] and "are ready" in said[3]
    new_process()
    background.build_first(pytest.fail)
    new_process()
    said.clear()
    (csrc / "two.cpp").write_text("int wrong(")
    background.build_first(said.append)
    assert "PyTorch's own operators are used instead" in said[-1]
