"""`basicsr publish`: a folder with everything that sharing a network takes."""

from __future__ import annotations

import argparse

from esc_arch.printing import shown
from esc_arch.tools.export.publishing import ModelInfo, publish

__all__ = ["run"]


def run(args: argparse.Namespace) -> int:
    """Make the folder, and print its files and what is left to do; raises UserError as `publish` does."""
    texts = {key: getattr(args, key) for key in ("name", "dataset", "description", "purpose", "date")}
    published = publish(
        args.model,
        args.output,
        ModelInfo(authors=tuple(args.author), licence=args.license, tags=tuple(args.tags), **texts),
        experiment=args.experiment,
        images=args.images,
        urls=args.resources,
        onnx=not args.no_onnx,
        overwrite=args.overwrite,
        param_key=args.param_key,
        window_size=args.window,
    )
    width = max(len(file.name) for file in published.files)
    for file in published.files:
        print(f"{file.name:{width}}  {file.size:>13,} bytes  sha256 {file.sha256}")
    for note in published.notes:
        print(f"Note: {shown(note)}")
    print(f"Wrote folder {shown(published.folder)}/")
    return 0
