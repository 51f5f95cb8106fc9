"""An option file checked as a whole, before a run or in place of one: nothing on disk is touched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from esc_arch.errors import UserError
from esc_arch.problems import Problem
from esc_arch.project import import_modules

from .checks import check_sections, check_shape, merge
from .defaults import set_debug, set_defaults, set_paths
from .files import Options, apply_force_yml, load_with_positions
from .key_checks import check_keys
from .network_checks import check_networks
from .section_checks import CheckScope

__all__ = ["Inspection", "inspect_options"]


@dataclass(frozen=True)
class Inspection:
    """What was found in an option file.

    Attributes:
        opt: the options; complete for BasicSR's pipelines if there are no errors.
        is_train: True if they were checked as those of a training, False as those of a test.
        problems: all findings with their places, in the order of the file.
    """

    opt: Options
    is_train: bool
    problems: Sequence[Problem]


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
        is_train: True to train, False to test; None: to train if it has anything to train.
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
        problems = list(check_shape(opt))
    except UserError as error:  # what the modules would have registered is not known
        problems = [Problem("import", str(error).removeprefix("import: "))]
    if all(problem.path == "name" for problem in problems):
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
        problems = merge(positions.odd_numbers(), [*problems, *positions.repeated.values()])
    return Inspection(opt, is_train, sorted(map(positions.locate, problems), key=_order))


def _order(problem: Problem) -> tuple[int, int]:
    place = problem.place
    return (place and place.line) or 0, (place and place.column) or 0
