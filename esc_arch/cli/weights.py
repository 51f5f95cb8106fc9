"""`basicsr weights`: the weights that can be given by name."""

from __future__ import annotations

import argparse

from esc_arch.checkpoints.published import named_weights, release_page
from esc_arch.printing import shown

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    print(f"{'name':24}{'network':9}{'scale':7}{'parameters':>11}{'size':>15}  {'trained on':22}where")
    for each in named_weights().values():
        there = each.path.exists()
        # Published files hold the weights of four bytes twice, `params` and `params_ema`
        size = each.path.stat().st_size if there else 8 * each.parameters
        where = "comes with esc_arch" if each.included else shown(each.path) if there else "not downloaded"
        mb = f"{'' if there else 'about '}{size / 1e6:.1f} MB"
        print(f"{each.name:24}{each.type:9}x{each.scale:<6}{each.parameters:11,}{mb:>15}  {each.trained_on:22}{where}")
    print("Give a name in place of a file: -m NAME, pretrain_network_g: NAME. It is downloaded when first used.")
    print(f"Licence: of those that come with esc_arch MIT, as of all of it; of the others see {release_page()}")
    return 0
