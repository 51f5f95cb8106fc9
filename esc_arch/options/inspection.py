"""An option file checked as a whole, before a run or in place of one: nothing on disk is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from esc_arch.errors import UserError
from esc_arch.problems import Problem
from esc_arch.project import import_modules

from .checks import check_sections, check_shape, merge
from .data_checks import CheckScope
from .defaults import set_debug, set_defaults, set_paths
from .files import Options, apply_force_yml, load_with_positions
from .key_checks import check_keys
from .network_checks import check_networks
from .positions import Positions

__all__ = ["Inspection", "inspect_options"]


@dataclass(frozen=True)
class Inspection:
    """What was found in an option file.

    Attributes:
        opt: the options; complete for BasicSR's pipelines if there are no errors.
        is_train: whether they were checked as those of a training.
        problems: all findings with their places, in the order of the file.
    """

    opt: Options
    is_train: bool
    problems: Sequence[Problem]

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == "error"]

    @property
    def warnings(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == "warning"]

    @property
    def notes(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.severity == "note"]


def inspect_options(
    file: str,
    *,
    root_path: str,
    is_train: bool | None,
    force_yml: Sequence[str] = (),
    auto_resume: bool = False,
    debug: bool = False,
    dist: bool = False,
    scope: CheckScope | None = None,
) -> Inspection:
    """Read an option file, complete it, and check all of it.

    Args:
        root_path: the folder that `experiments/` and `results/` are in.
        is_train: whether it is to train or to test; None: to train if it has anything to train.
        scope: how much of the data is checked; by default as much as takes next to no time.

    Raises:
        UserError: the file or an entry of `force_yml` cannot be read at all.
    """
    scope = scope or CheckScope()
    opt, positions = load_with_positions(file)
    apply_force_yml(opt, force_yml, positions)
    if is_train is None:
        datasets = opt.get("datasets")
        is_train = isinstance(opt.get("train"), dict) or (isinstance(datasets, dict) and "train" in datasets)
    try:
        import_modules(opt.get("import"), "import")
    except UserError as error:  # what it would have registered is not known
        return Inspection(opt, is_train, _located([Problem("import", str(error).removeprefix("import: "))], positions))
    problems = list(check_shape(opt))
    if any(problem.path != "name" for problem in problems):
        return Inspection(opt, is_train, _located(problems, positions))
    if problems:
        opt["name"] = "unnamed"  # so that the rest can be checked
    of_keys = list(check_keys(opt, is_train))
    opt |= {"dist": dist, "auto_resume": auto_resume, "is_train": is_train}
    set_defaults(opt, is_train)
    set_debug(opt, debug, is_train)
    set_paths(opt, root_path, is_train)
    problems += merge(of_keys, check_sections(opt, is_train, scope))
    in_the_way = ("network_", "path", "train")
    if not any(problem.severity == "error" and problem.path.startswith(in_the_way) for problem in problems):
        problems += check_networks(opt, is_train, scope)
    problems += positions.repeated.values()
    return Inspection(opt, is_train, _located(merge(positions.odd_numbers(), problems), positions))


def _located(problems: Iterable[Problem], positions: Positions) -> list[Problem]:
    """The problems with their places, in the order of the file."""
    located = map(positions.locate, problems)
    return sorted(
        located, key=lambda problem: (problem.place.line or 0, problem.place.column or 0) if problem.place else (0, 0)
    )
