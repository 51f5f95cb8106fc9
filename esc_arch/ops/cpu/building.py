"""Compiling the C++ operators: one shared library of every file in csrc, made once and kept in the user's cache.

Wheels for Linux on x86-64 bring it compiled, for each kind of vectors, in the folder prebuilt (see .ci/build_wheel).
The compiler is called directly, because torch.utils.cpp_extension wants ninja and includes every header of PyTorch.
For development, ESC_ARCH_NATIVE_SOURCES (file names with commas between) restricts the library to some of the files.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from esc_arch.atomic_io import open_regular
from esc_arch.ops.cache import cache_folder, own_folder, read, write
from esc_arch.system import lock

__all__ = [
    "PORTABLE",
    "Recipe",
    "built_library",
    "cache_folder",
    "compile_library",
    "find_compiler",
    "flags",
    "library_at_hand",
    "note_of_failure",
    "possible_now",
    "recipe",
]

logger = logging.getLogger(__name__)

CSRC, PREBUILT = Path(__file__).parent / "csrc", Path(__file__).parent / "prebuilt"

#: True if PyTorch has all of libtorch's stable ABI that csrc/tensors.h needs: libraries serve all such versions.
STABLE_ABI = torch.__version__ >= "2.11"  # (TorchVersion compares them as versions)

#: What the compiler's vectors are to use, by the name PyTorch gives to what this CPU has (ATEN_CPU_CAPABILITY lowers
#: it, for PyTorch and for us).
_VECTORS = {
    "AVX512": ("-mprefer-vector-width=512", "-DCPU_CAPABILITY=AVX512", "-DCPU_CAPABILITY_AVX512"),
    "AVX2": ("-mno-avx512f", "-DCPU_CAPABILITY=AVX2", "-DCPU_CAPABILITY_AVX2"),
}

#: The instructions of prebuilt libraries: those that PyTorch looks for before it gives a CPU this name.
PORTABLE = {"AVX512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"), "AVX2": ("-mavx2", "-mfma")}

#: A script that turns into the command of its arguments. Beside it waits what ends the command, all that it started
#: and its folder of temporary files, when nobody holds the other end of standard input any more: when this process
#: ends, in whatever way.
_GUARDED = """
exec 3<&0 </dev/null
(trap "" TERM; read _ <&3; kill -TERM 0; rm -rf -- "$0"; kill -KILL 0) >/dev/null 2>&1 &
exec "$@" 3<&-
"""


class Recipe(NamedTuple):
    """The compiler's command, the files to compile, the flags without include paths, and the library to make."""

    compiler: tuple[str, ...]
    sources: tuple[Path, ...]
    flags: tuple[str, ...]
    library: Path


def find_compiler() -> tuple[str, ...] | None:
    """The C++ compiler's command: CXX of the environment, g++ or clang++; None for none, or an invalid CXX."""
    for command in (os.environ.get("CXX", ""), "g++", "clang++"):
        try:
            words = shlex.split(command)
        except ValueError:
            return None
        path = shutil.which(words[0]) if words else None
        if path is not None:
            return (path, *words[1:])
    return None


def recipe() -> Recipe:
    """What would be compiled here now.

    Raises:
        RuntimeError: there is no compiler, or ESC_ARCH_NATIVE_SOURCES names a file that is not in csrc.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("there is no C++ compiler")
    sources, arguments = _sources(), flags(torch.backends.cpu.get_cpu_capability())
    library = cache_folder() / f"native-{_key(compiler, arguments, *sources)}" / "operators.so"
    return Recipe(compiler, sources, arguments, library)


def library_at_hand() -> Path | None:
    """The library that was built here, else the one that came with the installation, for this PyTorch and CPU.

    Raises:
        OSError: see `built_library`.
    """
    if find_compiler() is not None and (built := built_library(recipe())):
        return built
    prebuilt = PREBUILT / f"{torch.backends.cpu.get_cpu_capability()}.so"
    return prebuilt if STABLE_ABI and prebuilt.exists() and not os.environ.get("ESC_ARCH_NATIVE_SOURCES") else None


def built_library(wanted: Recipe) -> Path | None:
    """The library, where it was built before and is as it was written; None otherwise.

    Raises:
        OSError: it is there, and cannot be read, or other users may have written it.
    """
    try:
        return wanted.library if _is_whole(wanted.library) else None
    except FileNotFoundError:
        return None


def compile_library(
    wanted: Recipe, *, again: bool = False, progress: Callable[[int, int], Any] = lambda done, total: None
) -> Path:
    """Compile the library, unless another process has just done so; several processes wait for one of them.

    Args:
        again: link it again if it is there, as it cannot be loaded.
        progress: is told how many of how many sources are compiled, by one thread.

    Raises:
        RuntimeError: the compiler failed; the message begins with its first line about an error.
        OSError: the cache cannot be written, or other users may write to it.
    """
    library, objects, installed = wanted.library, own_folder(cache_folder() / "objects"), Path(torch.__file__).parent
    include = (f"-I{installed / 'include'}", f"-I{installed / 'include' / 'torch' / 'csrc' / 'api' / 'include'}")
    link = (f"-L{installed / 'lib'}", f"-Wl,-rpath,{installed / 'lib'}", "-ltorch_cpu", "-lc10")

    def compile_source(source: Path) -> str:
        output = objects / f"{source.stem}-{_key(wanted.compiler, wanted.flags, source)}.o"
        with suppress(OSError):
            if _is_whole(output):
                return str(output)
        _run((*wanted.compiler, *wanted.flags, *include, "-c", str(source)), output, alive.fileno())
        for other in set(objects.glob(f"{source.stem}-*")) - {output, _note_of(output)}:
            other.unlink(missing_ok=True)
        return str(output)

    with _build_lock(), _exit_on_sigterm():
        with suppress(OSError):
            if not again and _is_whole(library):
                return library
        for left in objects.glob("tmp*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        reading, writing = os.pipe()
        # Whatever ends this block, the compilers end before the threads that wait for them
        with open(reading, "rb") as alive, ThreadPoolExecutor(os.cpu_count()) as pool, open(writing, "wb"):
            tasks = [pool.submit(compile_source, source) for source in wanted.sources]
            for done, task in enumerate(as_completed(tasks), start=1):
                task.result()
                progress(done, len(tasks))
            compiled = [task.result() for task in tasks]
            _run((*wanted.compiler, "-shared", *compiled, *link, *_openmp_at_link(wanted)), library, alive.fileno())
    note_of_failure(wanted).unlink(missing_ok=True)
    return library


def note_of_failure(wanted: Recipe) -> Path:
    """A file that is there if nobody asked for this library, and it could not be built."""
    return wanted.library.parent.with_suffix(".failed")


def possible_now() -> bool:
    """True if the cache can be written, and no other process builds."""
    import fcntl

    try:
        with open_regular(own_folder(cache_folder()) / "build.lock", create=True) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


@contextmanager
def _build_lock() -> Iterator[None]:
    path = cache_folder() / "build.lock"
    try:
        file = open_regular(path, create=True)
        os.chmod(file.fileno(), 0o600)
    except OSError as error:
        raise RuntimeError(f"{path} cannot be locked: {error.strerror}. Remove it.") from error
    with file:
        try:
            lock(file)
        except BlockingIOError:
            logger.warning("Waiting for another process that builds the C++ operators ...")
            lock(file, wait=True)
        yield


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as an interrupt does, so that it waits for its compilers to end."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _key(compiler: tuple[str, ...], flags: tuple[str, ...], *sources: Path) -> str:
    """Differs whenever what is compiled from these sources might."""
    parts = (*compiler, _version_of(compiler), *flags, torch.__version__, _cpu())
    headers = "".join(map(_digest, sorted(CSRC.glob("*.h"))))
    return hashlib.sha256(os.fsencode("\0".join((*parts, headers, *map(_digest, sources))))).hexdigest()[:20]


def _run(command: Sequence[str], output: Path, alive: int) -> None:
    """Run a command that writes `output`, which appears whole or not at all, with a note of its digest.

    It is ended when nobody holds the other end of the pipe `alive` any more.
    """
    with tempfile.TemporaryDirectory(dir=cache_folder() / "objects") as folder:
        made = Path(folder) / output.name
        done = subprocess.run(
            ("/bin/sh", "-c", _GUARDED, folder, *command, "-o", str(made)), stdin=alive, capture_output=True,
            text=True, errors="replace", env={**os.environ, "LC_ALL": "C", "TMPDIR": folder}, start_new_session=True,
        )  # fmt: skip
        if done.returncode or not made.exists():
            for full in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                if os.strerror(full) in done.stderr:
                    raise OSError(full, os.strerror(full), str(output))
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            first = next((line for line in lines if "error" in line.lower()), lines[0])
            if done.returncode in (126, 127):  # of the shell
                raise RuntimeError(f"{command[0]} cannot be run: {first}")
            raise RuntimeError(f"{first} (from: {shlex.join(command)})")
        data = made.read_bytes()
    write(output, data)
    write(_note_of(output), hashlib.sha256(data).hexdigest().encode())


def _is_whole(output: Path) -> bool:
    """True if a file is as it was written: loading half a library ends the process, as a power cut may leave it."""
    return hashlib.sha256(read(output)).hexdigest().encode() == read(_note_of(output))


def _note_of(output: Path) -> Path:
    return output.with_suffix(".sha256")


def _sources() -> tuple[Path, ...]:
    there = {path.name: path for path in sorted(CSRC.glob("*.cpp"))}
    chosen = os.environ.get("ESC_ARCH_NATIVE_SOURCES")
    if not chosen:
        return tuple(there.values())
    names = [name.strip() for name in chosen.split(",")]
    unknown = [name for name in names if name not in there]
    if unknown:
        raise RuntimeError(f"ESC_ARCH_NATIVE_SOURCES names {', '.join(unknown)}; there are {', '.join(there)}.")
    return tuple(there[name] for name in names)


def flags(capability: str, instructions: tuple[str, ...] = ("-march=native",)) -> tuple[str, ...]:
    """What to compile with, except for the folders of headers, for vectors by PyTorch's name."""
    vectors = _VECTORS.get(capability, ("-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT"))
    openmp = ("-Xclang", "-fopenmp") if sys.platform == "darwin" else ("-fopenmp",)
    # (Without signed zeros, traps and errno nothing that is computed changes)
    safe_maths = ("-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    stable = ("-DTORCH_TARGET_VERSION=0x020b000000000000",) if STABLE_ABI else ()  # 2.11
    shared = ("-std=c++20", "-O3", "-fPIC", "-fvisibility=hidden", "-DNDEBUG", "-Wno-psabi")
    return (*shared, abi, *stable, *instructions, *vectors, *openmp, *safe_maths)


def _openmp_at_link(wanted: Recipe) -> tuple[str, ...]:
    """PyTorch brings the runtime that g++'s code, and clang++'s on macOS, needs; a second one has its own threads."""
    if sys.platform == "darwin":
        return ("-undefined", "dynamic_lookup")
    return ("-fopenmp",) if "clang" in Path(wanted.compiler[0]).name else ()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _version_of(compiler: tuple[str, ...]) -> str:
    try:
        done = subprocess.run((*compiler, "--version"), capture_output=True, text=True, errors="replace")
    except OSError:
        return ""
    return done.stdout


@cache
def _cpu() -> str:
    """The CPU's own list of what it can do: a home directory, and so the cache, may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
