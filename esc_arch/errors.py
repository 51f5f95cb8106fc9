"""The one kind of error that the user can fix, told apart from faults of the program."""

from __future__ import annotations

from .printing import shown

__all__ = [
    "FAULT",
    "INTERRUPTED",
    "NO_BASICSR",
    "UNREAD",
    "USER_ERROR",
    "UserError",
    "describe",
    "first_line",
    "message_of",
]


class UserError(Exception):
    """Something the user gave cannot be used.

    The message is all a user sees, so it says what was given (file, key or value), what is allowed
    and what to do. The command line prints it without a traceback and exits with status 2. Its lines are arguments
    of their own: each stays one, whatever the names and values in it.
    """

    def __str__(self) -> str:
        return "\n".join(map(shown, self.args))


def message_of(error: UserError) -> str:
    """The message of `error`, also when it crossed a process boundary.

    A DataLoader worker's exception arrives re-made from the text of its whole traceback; what the
    user needs is the part after the last exception name.
    """
    text = str(error)
    marker = f"{UserError.__module__}.{UserError.__qualname__}: "
    return text.rpartition(marker)[2].strip() if marker in text else text


#: What a program that trains or reads data sets says without BasicSR.
NO_BASICSR = "It needs BasicSR, which is not installed: run `basicsr setup-training`."

#: Exit codes.
FAULT, USER_ERROR, INTERRUPTED, UNREAD = 1, 2, 130, 141


def first_line(error: BaseException) -> str:
    """What an error of another library says first, without a full stop; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].strip().rstrip(".")


def describe(error: BaseException) -> tuple[int, str]:
    """The exit status of a command that `error` ended, and one message for it."""
    if isinstance(error, UserError):
        return USER_ERROR, message_of(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted."
    return FAULT, f"{type(error).__name__}: {error}"
