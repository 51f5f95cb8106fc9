"""Two runs of one name at once: the second is refused, with who holds the folder, and changes nothing."""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from typing import Any

import pytest
from basicsr.utils import make_exp_dirs

from esc_arch.atomic_io import locked
from esc_arch.errors import UserError
from esc_arch.tools.benchmark import quality
from esc_arch.training.run_locks import lock_run, run_locks

HOLDER = rf"It is process {os.getpid()} on {re.escape(socket.gethostname())}\.$"


@pytest.mark.parametrize("arguments", [["train"], ["train", "--auto_resume"], ["test"]])
def test_a_second_run_is_refused(
    arguments: list[str], run_basicsr: Any, train_options: Any, test_options: Any, take_snapshot: Any
) -> None:
    verb, *flags = arguments
    options, root = (train_options, "experiments") if verb == "train" else (test_options, "results")
    (run_basicsr.folder / root / "trial").mkdir(parents=True)
    (run_basicsr.folder / root / "trial" / "precious").touch()
    with locked(run_basicsr.folder / root, ".trial.lock"):
        before = take_snapshot(run_basicsr.folder / root)
        run = run_basicsr(verb, options, *flags)
        assert run.status == 2
        message = f"basicsr {verb}: {run_basicsr.folder / root / 'trial'} is in use by another run of the name trial"
        assert run.err.splitlines()[-1].startswith(message)
        assert re.search(HOLDER, run.err.splitlines()[-1])
        assert take_snapshot(run_basicsr.folder / root) == before
    if verb == "test":
        assert run_basicsr(verb, options, *flags).status == 0  # and has let go of it, for the next
        assert run_basicsr(verb, options, *flags).status == 0


@pytest.fixture
def opt(tmp_path: Path) -> Any:
    return {"name": "trial", "is_train": True, "rank": 0, "path": {"experiments_root": str(tmp_path / "trial")}}


def is_locked(opt: Any) -> bool:
    folder = Path(opt["path"]["experiments_root"])
    try:
        with locked(folder.parent, f".{folder.name}.lock"):
            return False
    except UserError:
        return True


def test_a_run_keeps_its_folder_to_the_end_of_the_command(opt: Any) -> None:
    with run_locks():
        with run_locks():
            lock_run(opt)
            lock_run(opt)
        assert is_locked(opt)
    assert not is_locked(opt)
    lock_run({**opt, "rank": 1})  # the first process of a run does it for all
    assert not is_locked(opt)
    assert hasattr(quality.run, "__wrapped__")  # what its tests wrote is read to the end


def test_programs_of_others_that_make_the_folders_themselves(opt: Any) -> None:
    with run_locks():
        make_exp_dirs(opt)
        assert is_locked(opt)
        make_exp_dirs(opt)  # archives it: the lock stays where the next run looks


def test_a_pipe_in_place_of_the_lock_is_told(opt: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".trial.lock")
    with run_locks(), pytest.raises(UserError, match=r"Cannot write to .*\.trial\.lock"):
        lock_run(opt)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_processes_that_load_data_do_not_keep_it_locked(opt: Any) -> None:
    """They outlive, for a while, a process that is killed."""
    with run_locks():
        lock_run(opt)
        (reader, writer), (started, start) = os.pipe(), os.pipe()
        if (child := os.fork()) == 0:
            os.close(writer)
            os.write(start, b"!")
            os.read(reader, 1)
            os._exit(0)
        os.read(started, 1)
    assert not is_locked(opt)
    os.close(writer)
    os.waitpid(child, 0)
    for descriptor in (reader, started, start):
        os.close(descriptor)
