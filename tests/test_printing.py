"""What is printed of text that comes from files, and streams that cannot take it or are not there."""

from __future__ import annotations

import errno
import io
import logging
import os
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from esc_arch.cli import main
from esc_arch.errors import UserError
from esc_arch.printing import OutputStream, escape_record, safe_streams, shown
from esc_arch.problems import Problem

HOSTILE = "a\nb\x1b[2J\x9b1m\u202e\udcff\r\0"
HARMLESS = r"a\nb\x1b[2J\x9b1m\u202e\udcff\r\x00"


@pytest.mark.parametrize("name", ["é 1.png", "超解像　x\u00a0.png", "a\\nb", ""])
def test_names_stay_as_they_are(name: str) -> None:
    assert shown(name) == name


def test_names_are_on_one_line_and_steer_no_terminal() -> None:
    assert shown(HOSTILE) == HARMLESS
    assert shown(Path(f"x/{HARMLESS}")) == f"x/{HARMLESS}"


def test_errors_and_problems_keep_to_their_lines() -> None:
    error = UserError(f"{HOSTILE}: not there.", Problem("a", HOSTILE))
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == f"{HARMLESS}: not there.\na: {HARMLESS}"


def test_lines_of_a_log() -> None:
    record = logging.LogRecord("a", 20, "", 0, f"{HOSTILE}: %s, %s, %d", (HOSTILE, Path("p\nq"), 3), None)
    assert escape_record(record)
    assert record.getMessage() == f"{HARMLESS}".replace(r"\n", "\n") + rf": {HARMLESS}, p\nq, 3"


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_stream_is_sent_no_sequences_but_our_own() -> None:
    text = "\x1b[31mred\x1b[0m\x1b[A\r\t\x1b[2J\x1b]0;title\x07\n"
    stream = Terminal()
    assert OutputStream(stream).write(text) == len(text)
    assert stream.getvalue() == "\x1b[31mred\x1b[0m\x1b[A\r\t\\x1b[2J\\x1b]0;title\\x07\n"
    no_terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    OutputStream(no_terminal).write("\x1b[31mü\udcff\n")
    no_terminal.seek(0)
    assert no_terminal.read() == "\\x1b[31m\\xfc\\udcff\n"


def test_streams_that_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with safe_streams():
        print("nobody reads this")
        print("nor this", file=sys.stderr)
    assert sys.stdout is None


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    """As after `basicsr ... <&- >&- 2>&-`, in a process of its own."""
    child = os.fork()
    if child == 0:
        os.closerange(0, 3)
        with safe_streams():
            os._exit(os.open(os.devnull, os.O_RDONLY))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) > 2


@pytest.mark.parametrize("text", ["a line", "many lines\n" * 10_000])
def test_a_reader_that_has_gone(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of `basicsr doctor | head`: the run goes on, without a traceback, and has the status of such programs."""
    reader, writer = os.pipe()
    os.close(reader)
    ran: list[str] = []
    for name, status in (("stdout", 141), ("stderr", 0)):
        with open(os.dup(writer), "w") as stream, monkeypatch.context() as patched:
            patched.setattr("esc_arch.cli.check.run", lambda args, to=name: say(text, to, ran))
            patched.setattr(sys, name, stream)
            assert main(["check", "-opt", "any.yml"]) == status
    os.close(writer)
    assert ran == ["stdout", "stderr"]


def say(text: str, to: str, ran: list[str]) -> int:
    print(text, file=getattr(sys, to), flush=True)
    print(text, file=getattr(sys, to), flush=True)
    ran.append(to)
    return 0


def test_output_that_does_not_fit_on_the_disk(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr("esc_arch.cli.check.run", lambda args: say("the result", "stdout", []))
    with open("/dev/full", "w") as stream, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        assert main(["check", "-opt", "any.yml"]) == 1
    told = f"basicsr check: the standard output is incomplete: {os.strerror(errno.ENOSPC)}.\n"
    assert capsys.readouterr().err == told


def test_a_pipe_of_a_verb_s_own_is_not_taken_for_that(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(args: Any) -> int:
        raise BrokenPipeError("of a child process")

    monkeypatch.setattr("esc_arch.cli.check.run", run)
    with pytest.raises(BrokenPipeError, match="of a child process"):
        main(["check", "-opt", "any.yml"])
