"""What runs where Windows' Python does: without the modules and names that it lacks, and with files as it treats them.

What the interpreter itself and other libraries need of Linux is imported before; then Linux is hidden.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from fresh import run_code

if sys.platform != "linux":
    pytest.skip("hides Linux", allow_module_level=True)

HIDE = '''
import concurrent.futures.process, concurrent.futures.thread, ctypes, errno, fcntl, mmap, multiprocessing.spawn, os
import pathlib, select, shutil, signal, socket, sys, tempfile, types
from multiprocessing import popen_spawn_posix, resource_tracker, synchronize
import cv2, lmdb, numpy, requests, safetensors.torch, scipy.linalg, tifffile, torch, torchvision, yaml
import PIL.Image, PIL.ImageCms, PIL.PngImagePlugin
import filelock, torch.utils.data, tqdm.contrib.logging

flock, real_replace, real_unlink, real_open = fcntl.flock, os.replace, os.unlink, os.open
for name in ("fcntl", "grp", "matplotlib", "pwd", "pty", "readline", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
LACKING = {
    os: """O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_NONBLOCK O_SYNC chown chroot environb fchdir fchmod fchown fork forkpty
        fstatvfs getegid geteuid getgid getgroups getloadavg getpgid getpriority getsid getuid killpg lchown mkfifo
        mknod nice pathconf posix_fadvise posix_fallocate posix_spawn pread preadv pwrite pwritev register_at_fork
        sched_getaffinity sched_getparam sched_getscheduler sched_setscheduler sendfile set_blocking setpgid setsid
        statvfs sync sysconf uname wait4""",
    signal: "SIGALRM SIGHUP SIGKILL SIGPIPE SIGQUIT SIGUSR1 SIGUSR2 alarm pause pthread_kill pthread_sigmask setitimer",
    select: "epoll poll",
    mmap: "MADV_DONTNEED MAP_PRIVATE",
    socket: "AF_UNIX",
}
for module, names in LACKING.items():
    for name in names.split():
        if hasattr(module, name):
            delattr(module, name)

def refusing_open(function):
    def call(*paths, **options):
        held = {os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd")}
        for path in paths:
            if isinstance(path, (str, os.PathLike)) and os.path.realpath(path) in held:
                raise PermissionError(errno.EACCES, "used by another process", str(path))
        return function(*paths, **options)
    return call

def open_file(path, flags, *rest, **options):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    return real_open(path, flags, *rest, **options)

os.replace, os.rename = refusing_open(real_replace), refusing_open(os.rename)
os.unlink = os.remove = refusing_open(real_unlink)
os.open = open_file
shutil._use_fd_functions = False
tempfile.TemporaryFile = tempfile.NamedTemporaryFile

def locking(descriptor, mode, size):
    assert (os.lseek(descriptor, 0, os.SEEK_CUR), size) == (2**30, 1)
    try:
        flock(descriptor, mode)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied") from None

EX, NB = 2, 4
sys.modules["msvcrt"] = types.SimpleNamespace(locking=locking, LK_NBLCK=EX | NB, LK_LOCK=EX)
sizes = types.SimpleNamespace(total=2**33, available=2**32, peak_wset=2**30)
sys.modules["psutil"] = types.SimpleNamespace(
    virtual_memory=lambda: sizes, Process=lambda: types.SimpleNamespace(memory_info=lambda: sizes)
)
read_text = pathlib.Path.read_text

def read_without_proc(path, *options, **named):
    if str(path).startswith(("/proc/", "/sys/")):
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", str(path))
    return read_text(path, *options, **named)

pathlib.Path.read_text = read_without_proc
pathlib.Path.exists = lambda path: not str(path).startswith(("/proc/", "/sys/")) and os.path.exists(path)
sys.platform = "win32"

import esc_arch
from esc_arch.cli import main
'''
#: Of imports that are missing where a module is for an extra, or for another program.
OPTIONAL = {"av", "comfy", "folder_paths", "matplotlib", "onnx", "onnxscript", "spandrel", "triton", "wandb"}


def run(code: str, folder: Path) -> str:
    done = run_code(HIDE + code, folder, XDG_CACHE_HOME=str(folder / "cache"))
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_modules_files_and_locks(tmp_path: Path) -> None:
    output = run(
        f"""
import importlib, pkgutil
from pathlib import Path
for module in pkgutil.walk_packages(esc_arch.__path__, "esc_arch."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name.partition(".")[0] in {OPTIONAL}, error
print(len([name for name in sys.modules if name.startswith("esc_arch.")]))

from esc_arch.atomic_io import locked, new_folder, open_regular, remove_partial, write_atomically
from esc_arch.ops import cache, cpu
from esc_arch.system import memory_sizes
from esc_arch.tools.upscale.memory import available, resident

folder, file = Path("some"), Path("some", "file")
with locked(folder, "lock"):
    try:
        with locked(folder, "lock"):
            raise AssertionError
    except esc_arch.UserError as error:
        assert f"It is process {{os.getpid()}} on" in str(error)
with locked(folder, "lock"):  # once the other has ended
    pass
for text in (b"1", b"2"):
    write_atomically(file, text)
    assert file.read_bytes() == text
left, used = Path("some", ".left.partial"), Path("some", ".used.partial")
left.write_bytes(b"")
with used.open("wb"):
    remove_partial(folder)
    assert (left.exists(), used.exists()) == (False, True)
for _ in range(2):
    with new_folder(Path("made"), lambda: None) as new:
        (new / "content").touch()
assert os.listdir("made") == ["content"]
os.symlink(file, "link")
try:
    open_regular(Path("link"))
    raise AssertionError
except OSError:
    pass

place = cache.cache_folder() / "a" / "b"
cache.write(place, b"kept")
assert cache.read(place) == b"kept"
assert "for Linux and macOS" in cpu.unsupported_reasons()[0]
assert (memory_sizes()[0], available(), resident()) == (2**33, 2**32, 2**30)
""",
        tmp_path,
    )
    assert int(output) > 180


def test_commands(train_options: dict[str, Any], tmp_path: Path) -> None:
    """With BasicSR: a training, and with its result what needs none."""
    train_options["train"]["total_iter"] = 2
    (tmp_path / "a.yml").write_text(yaml.safe_dump(train_options), encoding="utf-8")
    run(
        """
from PIL import Image
from esc_arch.tools.doctor import machine

assert main(["check", "-opt", "a.yml", "--no-data"]) == 0
assert main(["train", "-opt", "a.yml"]) == 0
weights = "experiments/trial/models/net_g_2.pth"
Image.effect_noise((70, 50), 60).convert("RGB").save("small.png")
for name, limit in (("whole.png", []), ("parts.png", ["--max-memory", "1100M"])):
    assert main(["upscale", "-i", "small.png", "-m", weights, "-o", name, "--no-build", *limit]) == 0
assert Image.open("whole.png").tobytes() == Image.open("parts.png").tobytes()
assert main(["convert", weights, "-o", "net.safetensors"]) == 0
os.mkdir("images")
Image.open("whole.png").save("images/a.png")
assert main(["prepare", "benchmark", "-i", "images", "-o", "benchmark"]) == 0
assert main(["prepare", "train", "-i", "images", "-o", "lmdb", "--crop-size", "48", "--overlap", "24"]) == 0
assert machine._given()["XDG_CACHE_HOME"]
""",
        tmp_path,
    )
