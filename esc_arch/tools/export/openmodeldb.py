"""The entry of a model in OpenModelDB: a file `data/models/ID.json` of its repository, OpenModelDB/open-model-database.

Fields are those of its `src/lib/model-props.ts`; the lists of users, tags and architectures are kept there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .model_info import Model, PublishedFile, user_id

__all__ = ["entry"]


def entry(model: Model, files: Sequence[PublishedFile], urls: Sequence[str]) -> dict[str, Any]:
    """The entry, as JSON holds it.

    Args:
        files: the weights, and the ONNX file.
        urls: addresses of these files, or of the folder of all files, which end in a slash.
    """
    info, section, training = model.info, model.network_g, model.training
    authors = [user_id(author) for author in info.authors]
    trained: dict[str, Any] = {}
    if training is not None:
        names = {"trainingIterations": "iterations", "trainingHRSize": "gt_size"}
        trained = {field: training.settings[name] for field, name in names.items() if name in training.settings}
        trained["trainingOTF"] = training.on_the_fly
    folder = next((url for url in urls if url.endswith("/")), None)
    return {
        "name": model.identifier.partition("-")[2],
        "author": authors[0] if len(authors) == 1 else authors,
        "license": info.licence,
        "tags": list(dict.fromkeys(info.tags)),
        "description": info.description + (f"\n\nPurpose: {info.purpose}" if info.purpose else ""),
        "date": info.date,
        "architecture": "esc",
        "size": [section["type"], f"{section['dim']}dim", f"{section['n_blocks']}blocks"],
        "scale": model.scale,
        "inputChannels": 3,
        "outputChannels": 3,
        "resources": [_resource(file, urls) for file in files],
        **trained,
        "dataset": info.dataset,
        "images": [
            {"type": "paired", "LR": f"{folder}{lr}", "SR": f"{folder}{sr}"} for lr, _, sr in model.samples if folder
        ],
    }


def _resource(file: PublishedFile, urls: Sequence[str]) -> dict[str, Any]:
    kind = file.name.rpartition(".")[2]
    found = (url + file.name if url.endswith("/") else url for url in urls)
    return {
        "platform": "onnx" if kind == "onnx" else "pytorch",
        "type": kind,
        "size": file.size,
        "sha256": file.sha256,
        "urls": [url for url in found if url.partition("?")[0].lower().endswith(f".{kind}")],
    }
