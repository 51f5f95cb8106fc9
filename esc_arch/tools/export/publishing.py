"""A folder with all that sharing a network takes: weights, ONNX, option files, model card, OpenModelDB entry."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from esc_arch.atomic_io import new_folder, replacing, write_file
from esc_arch.checkpoints.conversion import Checkpoint, open_checkpoint, save_checkpoint
from esc_arch.errors import UserError
from esc_arch.names import did_you_mean
from esc_arch.tools.upscale import Upscaler, load, upscale
from esc_arch.tools.upscale.image_reader import read_image

from .checking import require
from .experiment import UNKNOWN, read_experiment
from .formats import export_onnx
from .model_card import model_card
from .model_info import TAGS, Model, ModelInfo, PublishedFile, complete, model_id, user_id
from .option_files import option_files

__all__ = ["ModelInfo", "Published", "publish"]

SUMS = "SHA256SUMS"


class Published(NamedTuple):
    """A published model: its folder, its id such as 4x-Name, its files but SHA256SUMS, and what is left to do."""

    folder: Path
    identifier: str
    files: list[PublishedFile]
    notes: list[str]


def publish(
    weights: str | Path,
    folder: str | Path,
    info: ModelInfo,
    *,
    experiment: str | Path | None = None,
    images: Sequence[str | Path] = (),
    urls: Sequence[str] = (),
    onnx: bool = True,
    overwrite: bool = False,
    param_key: str | None = None,
    window_size: int | None = None,
) -> Published:
    """Make the folder of a model, whole or not at all.

    It holds ID.safetensors, ID.onnx, test_ID.yml, finetune_ID.yml, README.md (the model card), ID.json (the OpenModelDB
    entry), images/, and SHA256SUMS of all these. The large kernel stays free, so the weights can be trained further.

    Args:
        experiment: the folder of the training, whose settings and scores the card shows.
        images: small pictures that the card shows, enlarged.
        urls: where the files will be: addresses that end in .safetensors or .onnx, or one that ends in a slash.
        onnx: make the ONNX file; where that fails, a note takes its place.
        overwrite: replace the folder, if this function made it.
        param_key, window_size: see `open_checkpoint`.

    Raises:
        UserError: huggingface_hub is missing, info is incomplete or invalid, the folder exists, a file cannot be used.
    """
    require("huggingface_hub", extra="publish", purpose="Publishing")
    weights, folder = Path(weights), Path(folder)
    _check_folder(folder, overwrite=overwrite)
    checkpoint = open_checkpoint(weights, param_key=param_key, window_size=window_size)
    training = UNKNOWN if experiment is None else read_experiment(Path(experiment), weights, checkpoint)
    scale = max(round(checkpoint.network_g["upscaling_factor"]), 1)
    info = complete(info, training, scale, urls)
    name = model_id(info.name, scale)
    notes = [f"Assumed: {assumption}" for assumption in checkpoint.assumptions]
    with _filling(folder, overwrite=overwrite) as place:
        file = place / f"{name}.safetensors"
        _write_weights(file, checkpoint, info)
        upscaler = load(file, device="cpu")
        samples = _write_samples(place / "images", [Path(image) for image in images], upscaler)
        exported = None
        if onnx:
            try:
                exported = export_onnx(upscaler, place / f"{name}.onnx")
            except UserError as error:
                notes.append(f"There is no ONNX file: {error}")
        model = Model(name, scale, info, checkpoint.network_g, training, samples, exported)
        options = option_files(name, model.network_g, file.name, training.settings.get("gt_size"))
        for option_file, text in options.items():
            write_file(place / option_file, text.encode())
        weights_first = [file for file in reversed(_files(place)) if file.name.endswith((".safetensors", ".onnx"))]
        fields = _entry(model, weights_first, urls)
        notes += _left_to_do(fields)
        write_file(place / f"{name}.json", f"{json.dumps(fields, indent=4, ensure_ascii=False)}\n".encode())
        write_file(place / "README.md", model_card(model, _files(place)).encode())
        files = _files(place)
        write_file(place / SUMS, "".join(f"{file.sha256}  {file.name}\n" for file in files).encode())
    return Published(folder, name, files, notes)


def _check_folder(folder: Path, *, overwrite: bool) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{folder} already exists. Choose another -o, or replace it with --overwrite.")
    sums = (folder / SUMS).read_bytes() if (folder / SUMS).is_file() else b""
    published = {SUMS, *(line.partition("  ")[2] for line in sums.decode(errors="replace").splitlines())}
    if not any(name.startswith("finetune_") for name in published):
        raise UserError(f"{folder} was not made by `basicsr publish`, so it is not replaced. Choose another -o.")
    there = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    if others := sorted(name for name in there if name not in published):
        raise UserError(
            f"{folder} holds {', '.join(others)}, not made by `basicsr publish`, so it is not replaced. "
            "Choose another -o, or move these files."
        )


@contextmanager
def _filling(folder: Path, *, overwrite: bool) -> Iterator[Path]:
    """`new_folder` for `folder`, which another process may have made in the meantime."""
    try:
        with new_folder(Path(os.path.realpath(folder)), lambda: _check_folder(folder, overwrite=overwrite)) as place:
            yield place
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}. Choose another -o.") from error


def _write_weights(path: Path, checkpoint: Checkpoint, info: ModelInfo) -> None:
    authors = ", ".join(info.authors)
    about = {"name": path.stem, "author": authors, "license": info.licence, "description": info.description}
    # Text beside the weights may be private: names and paths
    numbers = {key: value for key, value in checkpoint.beside.items() if isinstance(value, int | float)}
    save_checkpoint(replace(checkpoint, beside={**numbers, **about}), path, file_format="safetensors")


def _write_samples(folder: Path, images: Sequence[Path], upscaler: Upscaler) -> list[tuple[str, ...]]:
    samples = []
    for index, image in enumerate(images, 1):
        pixels = read_image(image).pixels
        if pixels.dtype == np.uint16:
            pixels = (pixels // 257).astype(np.uint8)
        lr = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        sr = upscale(lr, upscaler)
        stem = re.sub(r"[^A-Za-z0-9]+", "-", image.stem).strip("-") or "picture"
        pictures = {"LR": lr, "bicubic": lr.resize(sr.size, Image.Resampling.BICUBIC), "SR": sr}
        names = tuple(f"{index}-{stem}-{kind}.png" for kind in pictures)
        folder.mkdir(exist_ok=True)
        for name, picture in zip(names, pictures.values(), strict=True):
            with replacing(folder / name) as file:
                picture.save(file, "PNG")
        samples.append(tuple(f"{folder.name}/{name}" for name in names))
    return samples


def _files(place: Path) -> list[PublishedFile]:
    names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    contents = ((name, (place / name).read_bytes()) for name in names)
    return [PublishedFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in contents]


def _entry(model: Model, files: Sequence[PublishedFile], urls: Sequence[str]) -> dict[str, Any]:
    """The entry of a model and its weight files, as in `data/models/` of OpenModelDB/open-model-database.

    Fields are those of `src/lib/model-props.ts` there.
    """
    info, section, training = model.info, model.network_g, model.training
    authors = [user_id(author) for author in info.authors]
    names = {"trainingIterations": "iterations", "trainingHRSize": "gt_size"}
    trained = {field: training.settings[name] for field, name in names.items() if name in training.settings}
    resources = []
    for file in files:
        kind = file.name.rpartition(".")[2]
        found = (url + file.name if url.endswith("/") else url for url in urls)
        resources.append(
            {
                "platform": "onnx" if kind == "onnx" else "pytorch",
                "type": kind,
                "size": file.size,
                "sha256": file.sha256,
                "urls": [url for url in found if url.partition("?")[0].lower().endswith(f".{kind}")],
            }
        )
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
        "resources": resources,
        **trained,
        **({"trainingOTF": training.on_the_fly} if training.settings else {}),
        "dataset": info.dataset,
        "images": [
            {"type": "paired", "LR": f"{folder}{lr}", "SR": f"{folder}{sr}"} for lr, _, sr in model.samples if folder
        ],
    }


def _left_to_do(fields: Mapping[str, Any]) -> Iterator[str]:
    for resource in fields["resources"]:
        if not resource["urls"]:
            yield f"The entry has no address of the {resource['type']} file, which OpenModelDB needs: give --resources."
    for tag in fields["tags"]:
        if tag not in TAGS:
            yield f"The tag {tag!r} is not known here. {did_you_mean(tag, TAGS)}"
    yield "OpenModelDB keeps lists of architectures and users: add those of the entry if they are missing there."
