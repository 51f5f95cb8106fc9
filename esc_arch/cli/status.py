"""What a command ends with."""

from __future__ import annotations

from esc_arch.errors import UserError, message_of

__all__ = ["describe"]

FAULT, USER_ERROR, INTERRUPTED, UNREAD = 1, 2, 130, 141


def describe(error: BaseException) -> tuple[int, str]:
    """The exit status of a command that `error` ended, and one message for it."""
    if isinstance(error, UserError):
        return USER_ERROR, message_of(error)
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted."
    return FAULT, f"{type(error).__name__}: {error}"
