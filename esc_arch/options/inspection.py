"""An option file looked at as a whole, before a run or in place of one: nothing on disk is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from esc_arch.errors import UserError
from esc_arch.project import import_modules

from .checks import check_options, check_shape
from .data_checks import CheckScope
from .defaults import set_debug, set_defaults, set_paths
from .files import Options, apply_force_yml, load_with_positions
from .key_checks import check_values, unknown_keys
from .network_checks import check_networks
from .positions import Place, Positions

__all__ = ["Finding", "Inspection", "inspect_options"]


@dataclass(frozen=True)
class Finding:
    """Something wrong, or worth a warning, in an option file."""

    place: Place
    key: str
    """The key and those of the sections above it, joined by colons."""
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.key}: {self.message}"


@dataclass
class Inspection:
    """What was found in an option file.

    Attributes:
        opt: the options; complete for BasicSR's pipelines when there are no errors.
        is_train: whether they were looked at as those of a training.
        errors: what has to be fixed before a run, in the order of the file.
        warnings: keys without effect, and numbers that are read unexpectedly.
        facts: what was compared with what, a sentence each.
    """

    opt: Options
    is_train: bool
    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)


def inspect_options(
    file: str,
    *,
    root_path: str,
    is_train: bool | None,
    force_yml: Sequence[str] = (),
    auto_resume: bool = False,
    debug: bool = False,
    dist: bool = False,
    extent: CheckScope | None = None,
) -> Inspection:
    """Read an option file, complete it, and check all of it.

    Args:
        root_path: the folder that `experiments/` and `results/` are in.
        is_train: whether it is to train or to test; None: to train when it has anything to train.
        extent: how much of the data is looked at; as much as takes no time to speak of by default.

    Raises:
        UserError: the file or an entry of `force_yml` cannot be read at all.
    """
    extent = extent or CheckScope()
    opt, positions = load_with_positions(file)
    apply_force_yml(opt, force_yml, positions)
    if is_train is None:
        is_train = has_training(opt)
    inspection = Inspection(opt, is_train)
    try:
        import_modules(opt.get("import"), "import")
    except UserError as error:  # what it would have registered is not known
        inspection.errors = _findings([str(error)], positions)
        return inspection
    if problems := check_shape(opt):
        inspection.errors = _findings(problems, positions)
        if any(not problem.startswith("name: ") for problem in problems):
            return inspection
        opt["name"] = "unnamed"  # so that the rest can be looked at
    unknown = list(unknown_keys(opt, is_train))
    problems += [key.problem for key in unknown if key.is_error]
    values = list(check_values(opt, is_train))
    inspection.warnings = _findings((key.problem for key in unknown if not key.is_error), positions)
    inspection.warnings += [Finding(*remark) for remark in positions.remarks()]
    opt |= {"dist": dist, "auto_resume": auto_resume, "is_train": is_train}
    set_defaults(opt, is_train)
    set_debug(opt, debug, is_train)
    set_paths(opt, root_path, is_train)
    problems += check_options(opt, is_train, extent)
    problems += [text for text in values if not _is_told(text, problems)]
    if not any(problem.startswith(("network_", "path", "train")) for problem in problems):
        problems += check_networks(opt, is_train, extent)
        inspection.warnings += _findings(extent.warnings, positions)
    inspection.facts = extent.facts
    inspection.errors = _findings(problems, positions)
    return inspection


def has_training(opt: Options) -> bool:
    """Whether an option file is one for training."""
    datasets = opt.get("datasets")
    return isinstance(opt.get("train"), dict) or (isinstance(datasets, dict) and "train" in datasets)


def _is_told(problem: str, problems: Iterable[str]) -> bool:
    """Whether another check has something about the same key, or about a section that cannot be used at all."""
    path = problem.partition(": ")[0]
    return any(other.startswith((f"{path}:", f"{path} ")) for other in problems)


def _findings(problems: Iterable[str], positions: Positions) -> list[Finding]:
    found = [_finding(problem, positions) for problem in problems]
    return sorted(found, key=lambda finding: (finding.place.line or 0, finding.place.column or 0))


def _finding(problem: str, positions: Positions) -> Finding:
    path, place = positions.of_problem(problem)
    message = problem.removeprefix(f"{path}: ")
    reading: Any = positions.reading(path.split(":"))
    return Finding(place, path, f"{message}. {reading}" if reading else message)
