"""What a failure of the system, or one between two iterations, makes of a run: one message, and no lost work."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from esc_arch.atomic_io import system_fault
from esc_arch.errors import UserError, message_of
from esc_arch.training.run import current_run

__all__ = ["rescuing", "system_faults_named"]


@contextmanager
def system_faults_named() -> Iterator[None]:
    """Turn what a full disk, a folder without permission or a killed worker makes of a run into one UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if (message := _message(error)) is None:
            raise
        traceback.clear_frames(error.__traceback__)  # as `main` does of what it sees
        raise UserError(message) from error


@contextmanager
def rescuing() -> Iterator[None]:
    """Around what happens between two iterations: if it fails, save what was trained, and say where to go on from."""
    try:
        yield
    except Exception as error:
        if (run := current_run()) is None:
            raise
        saved = run.rescue()
        # A data loader in its frames would keep its workers waiting when the process ends
        traceback.clear_frames(error.__traceback__)
        if (message := _message(error)) is None:
            raise
        raise UserError(f"{message} {saved}") from error


def _message(error: Exception) -> str | None:
    """What to say of a failure that a user can fix: of the data, of the system, or of a process that loads data."""
    if isinstance(error, UserError):
        return message_of(error)
    if isinstance(error, OSError) and (message := system_fault(error)) is not None:
        return message
    is_torch_s = isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")
    if not (is_torch_s or isinstance(error, ConnectionError | EOFError)):
        return None
    reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(" .")
    return (
        f"A process that loads data died ({reason}). Most often the memory was full, or the shared memory (/dev/shm): "
        f"lower datasets: train: num_worker_per_gpu or batch_size_per_gpu."
    )
