"""A context for the doctor's sections, whose worker answers in this process."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from esc_arch.tools.doctor.report import Context, Finding
from esc_arch.tools.doctor.subprocess_worker import JobFailed

__all__ = ["InProcess", "by_key", "context"]


class InProcess:
    """Calls functions here; `answers` are results, or errors to be raised, in place of some of them."""

    def __init__(self, answers: Mapping[str, Any]) -> None:
        self.answers = answers

    def call(self, function: str, *arguments: Any) -> Any:
        name, _, attribute = function.rpartition(":")
        answer = self.answers.get(attribute)
        if isinstance(answer, JobFailed):
            raise answer
        result = (answer or getattr(importlib.import_module(name), attribute))(*arguments)
        return json.loads(json.dumps(result, default=str))


def context(import_failure: str = "", opt: str | None = None, no_test: bool = False, **answers: Any) -> Context:
    args = argparse.Namespace(opt=opt, imports=None, no_test=no_test, json=False, timeout=60.0)
    worker: Any = InProcess(answers)
    return Context(args, import_failure, worker)


def by_key(findings: Iterable[Finding]) -> dict[str, Finding]:
    listed = list(findings)
    found = {finding.key: finding for finding in listed}
    assert len(found) == len(listed), "a key is there twice"
    return found
