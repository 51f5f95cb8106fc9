"""The options of a run: command line, option file and checks, in place of `basicsr.utils.options`."""

from __future__ import annotations

import argparse
import os
import random

import basicsr  # noqa: F401  first: what comes with it imports modules of this package
import torch.distributed
from basicsr.utils import set_random_seed
from basicsr.utils.dist_util import get_dist_info

from esc_arch.errors import UserError
from esc_arch.problems import of_severity
from esc_arch.training.distributed import gather_objects, init_dist, print_note, resolve_launcher

from .checks import check_options, inspect_options
from .data_checks import missing_data
from .files import Options, apply_force_yml, load_options, load_yaml
from .section_checks import CheckScope

__all__ = [
    "CheckScope",
    "Options",
    "apply_force_yml",
    "check_options",
    "checked_options",
    "inspect_options",
    "load_options",
    "load_yaml",
    "missing_data",
    "parse_options",
]


def parse_options(root_path: str, is_train: bool, args: argparse.Namespace) -> tuple[Options, argparse.Namespace]:
    """The checked options of a run under `root_path`, complete for BasicSR's pipelines, and `args`.

    Joins the other processes of a distributed run and seeds all random number generators. Nothing is
    written before or by this: BasicSR puts an old experiment's folder aside right after (fault 42).

    Args:
        root_path: the folder that `experiments/` and `results/` are in; with `--auto_resume` the current one (fault 7).
        is_train: True to train, False to test.
        args: the flags of `basicsr train` or `test`; its launcher is replaced by the real one.

    Raises:
        UserError: with every problem of the option file, `--force_yml` and the launcher.
    """
    opt = checked_options(root_path, is_train, args)
    if opt["dist"] and not torch.distributed.is_initialized():  # by a run before this one
        init_dist(args.launcher, **(opt.get("dist_params") or {} if args.launcher == "slurm" else {}))
    opt["rank"], opt["world_size"] = get_dist_info()
    if opt.get("manual_seed") is None:
        opt["manual_seed"] = gather_objects(random.randint(1, 10000))[0]  # one for all processes
    set_random_seed(opt["manual_seed"] + opt["rank"])
    return opt, args


def checked_options(root_path: str, is_train: bool, args: argparse.Namespace) -> Options:
    """The options that `parse_options` gives, before the processes have joined: without rank and world size.

    Raises:
        UserError: as `parse_options`.
    """
    args.launcher = resolve_launcher(args.launcher, os.environ)
    inspection = inspect_options(
        args.opt,
        root_path=root_path,
        is_train=is_train,
        force_yml=args.force_yml or [],
        auto_resume=args.auto_resume,
        debug=args.debug,
        dist=args.launcher != "none",
    )
    for warning in of_severity(inspection.problems, "warning"):
        print_note(f"{warning}.")
    if errors := of_severity(inspection.problems, "error"):
        others, lines = missing_data(errors)
        raise UserError(f"{args.opt}: {len(errors)} problem(s):", *others, *lines)
    return inspection.opt
