"""A folder with all that sharing a network takes: weights, ONNX, option files, model card, entry in OpenModelDB."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from esc_arch.atomic_io import fsync_folder, remove, write_atomically
from esc_arch.checkpoints.conversion import Checkpoint, build_network, open_checkpoint, save_checkpoint
from esc_arch.errors import UserError
from esc_arch.suggestions import did_you_mean, nearest

from .experiment import Training, read_experiment
from .model_card import Card, PublishedFile, Sample
from .openmodeldb import ARCHITECTURE, LICENCES, TAGS, entry_problems, model_id, url_problems, user_id
from .option_files import option_files

__all__ = ["Facts", "Published", "publish"]

SUMS, IMAGES, FINETUNE = "SHA256SUMS", "images", "finetune_"
PLATFORMS = {"safetensors": "pytorch", "onnx": "onnx"}
#: Pictures for the card may have this many pixels once enlarged; larger ones belong elsewhere.
LARGEST_SAMPLE = 2**24


@dataclass(frozen=True)
class Facts:
    """What no file says of a model.

    Attributes:
        name: with or without the scale before it.
        authors: names of people.
        licence: an SPDX id, upper and lower case being alike.
        dataset: what the network was trained on; that of the experiment if None.
        description: Markdown.
        tags: of OpenModelDB.
        purpose: what the model is for, a line; may be None.
        date: of publication, YYYY-MM-DD; today if None.
    """

    name: str | None = None
    authors: tuple[str, ...] = ()
    licence: str | None = None
    dataset: str | None = None
    description: str | None = None
    tags: tuple[str, ...] = ()
    purpose: str | None = None
    date: str | None = None


@dataclass(frozen=True)
class Published:
    """What was made.

    Attributes:
        folder: it is there.
        identifier: of the model, such as 4x-Name.
        files: what is in it, but for the list of these.
        notes: what is left to do, a sentence each.
    """

    folder: Path
    identifier: str
    files: tuple[PublishedFile, ...]
    notes: tuple[str, ...]


def publish(
    weights: str | Path,
    folder: str | Path,
    facts: Facts,
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

    In it are ID.safetensors, ID.onnx, test_ID.yml, finetune_ID.yml, README.md (the model card), ID.json (the entry in
    OpenModelDB), images/, and SHA256SUMS of all these. Weights are the average of those trained, where there is one.
    The large kernel stays free, so that they can be trained further.

    Args:
        weights: a checkpoint of a network of the family.
        folder: where to put it; must not be there.
        facts: what no file says.
        experiment: the folder of the training, whose settings and figures the card is to show.
        images: small pictures that the card is to show, enlarged.
        urls: where the files will be: addresses that end in .safetensors or .onnx, or one that ends in a slash.
        onnx: make the ONNX file; without the packages for it, a note takes its place.
        overwrite: replace the folder, if it is one that this made.
        param_key, window_size: see `open_checkpoint`.

    Raises:
        UserError: facts are missing or cannot be (all are listed), the folder is there, or a file cannot be used.
    """
    weights, folder = Path(weights), Path(folder)
    _check_place(folder, overwrite=overwrite)
    checkpoint = open_checkpoint(weights, param_key=param_key, window_size=window_size)
    training = None
    if experiment is not None:
        training = read_experiment(Path(experiment), weights, checkpoint.network_g, checkpoint.beside)
    facts = _completed(facts, training, _whole_scale(checkpoint), urls)
    with _made(folder) as place:
        return _Publisher(place, checkpoint, facts, training, tuple(urls)).run(folder, images, onnx=onnx)


def _check_place(folder: Path, *, overwrite: bool) -> None:
    if not folder.absolute().parent.is_dir():
        raise UserError(
            f"{folder}: there is no folder {folder.absolute().parent} to put it in. Make it, or choose another."
        )
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists() and not overwrite:
        raise UserError(f"{folder} is there already. Choose another -o, or give --overwrite to replace it.")
    if folder.exists() and (others := _others(folder)):
        raise UserError(
            f"{folder} holds {', '.join(others[:3])}{' and more' * (len(others) > 3)}, which `basicsr publish` did not "
            "put there: it is not replaced. Choose another -o, or remove it yourself."
        )


def _others(folder: Path) -> list[str]:
    """Files in a folder that are not in its list of published ones, or what it is instead."""
    if not folder.is_dir():
        return ["a file"]
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    listed = {line.partition("  ")[2] for line in lines} | {SUMS}
    if not any(name.startswith(FINETUNE) for name in listed):  # somebody else's list
        return [f"no {SUMS} of a model, but other files"]
    there = (str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if not path.is_dir())
    return sorted(name for name in there if name not in listed)


def _completed(facts: Facts, training: Training | None, scale: int, urls: Sequence[str]) -> Facts:
    """Facts with what can be had from elsewhere, in the form wanted.

    Raises:
        UserError: with everything that is missing or cannot be.
    """
    dataset = facts.dataset or (training.data if training is not None else None)
    date = facts.date or datetime.date.today().isoformat()
    facts = replace(facts, dataset=dataset, date=date)
    problems = [*_missing(facts), *_wrong(facts, scale), *url_problems(urls), *_nameless(urls)]
    if problems:
        raise UserError("Cannot publish yet. Please give or fix:" + "".join(f"\n - {line}" for line in problems))
    assert facts.licence is not None
    spelling = {licence.lower(): licence for licence in LICENCES}
    texts = {key: getattr(facts, key).strip() for key in ("name", "description", "dataset")}
    return replace(facts, licence=spelling[facts.licence.lower()], **texts)


def _whole_scale(checkpoint: Checkpoint) -> int:
    """The scale for ids and the like; ESCLTE's need not be whole."""
    return max(round(checkpoint.network_g["upscaling_factor"]), 1)


def _missing(facts: Facts) -> Iterator[str]:
    asked = {
        "--name NAME": (facts.name, "what the model is called, without its scale"),
        "--author NAME": (facts.authors, "who made it; several if there are"),
        "--license ID": (facts.licence, "under what it may be used, such as CC-BY-4.0 or MIT"),
        "--dataset TEXT": (facts.dataset, "what it was trained on, such as 'DIV2K, Flickr2K'"),
        "--description TEXT": (facts.description, "what it does, and how it differs from others"),
        "--tags TAG ...": (facts.tags, f"what it is for, of: {', '.join(TAGS)}"),
    }
    for flag, (given, meaning) in asked.items():
        if not (given.strip() if isinstance(given, str) else given):
            yield f"{flag}: {meaning}"


def _wrong(facts: Facts, scale: int) -> Iterator[str]:
    if facts.name and model_id(facts.name, scale).endswith("x-"):
        yield f"--name {facts.name!r}: must have letters or digits, from which its id {scale}x-Name is made"
    for author in facts.authors:
        if not user_id(author):
            yield f"--author {author!r}: must have letters or digits of ASCII, from which a user's id is made"
    if facts.licence and facts.licence.lower() not in {licence.lower() for licence in LICENCES}:
        yield f"--license {facts.licence!r}: not among the SPDX ids known here. {did_you_mean(facts.licence, LICENCES)}"
    for tag in facts.tags:
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", tag):
            yield f"--tags {tag!r}: must be small letters and digits, with single dashes between"
    try:
        datetime.datetime.strptime(str(facts.date), "%Y-%m-%d")
    except ValueError:
        yield f"--date {facts.date!r}: must be a day like 2025-03-31"


def _nameless(urls: Sequence[str]) -> Iterator[str]:
    for url in urls:
        if _kind_of(url) is None and not url.endswith("/"):
            yield f"--resources {url!r}: must end in .safetensors or .onnx, or in a slash: the folder of all files"


def _kind_of(url: str) -> str | None:
    suffix = url.partition("?")[0].rpartition(".")[2].lower()
    return suffix if suffix in PLATFORMS else None


@contextmanager
def _made(folder: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of `folder` when the block ends, or is gone."""
    target = folder.resolve()
    place, before = (target.with_name(f".{target.name}.{suffix}") for suffix in ("partial", "before"))
    try:
        if before.exists():  # an earlier run was killed while it replaced the folder
            remove(before) if target.exists() else os.replace(before, target)
        remove(place)
        place.mkdir()
        yield place
        if target.exists():
            os.replace(target, before)
        os.replace(place, target)
        fsync_folder(target.parent)
        remove(before)
    except BaseException as error:
        if before.exists() and not target.exists():
            os.replace(before, target)
        shutil.rmtree(place, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"{folder}: cannot be written: {error.strerror or error}. Choose another -o.") from error
        raise


class _Publisher:
    """Fills a folder."""

    def __init__(
        self,
        place: Path,
        checkpoint: Checkpoint,
        facts: Facts,
        training: Training | None,
        urls: tuple[str, ...],
    ) -> None:
        self.place, self.checkpoint, self.facts, self.training = place, checkpoint, facts, training
        self.urls = urls
        self.network_g = checkpoint.network_g
        self.scale = _whole_scale(checkpoint)
        self.identifier = model_id(str(facts.name), self.scale)
        self.weights = f"{self.identifier}.safetensors"
        self.notes: list[str] = []

    def run(self, folder: Path, images: Sequence[str | Path], *, onnx: bool) -> Published:
        self._write_weights()
        samples = self._write_samples([Path(image) for image in images])
        onnx_file, onnx_note = self._write_onnx() if onnx else (None, "")
        gt_size = None if self.training is None else self.training.gt_size
        options = option_files(self.identifier, self.network_g, self.weights, gt_size)
        for name, text in options.items():
            self._write(name, text)
        self._write_entry(onnx_file, samples)
        self._write_card(onnx_file, onnx_note, samples, list(options))
        files = self._files()
        self._write(SUMS, "".join(f"{file.sha256}  {file.name}\n" for file in files))
        self._note_of_lists()
        return Published(folder, self.identifier, files, tuple(self.notes))

    def _write(self, name: str, text: str) -> None:
        write_atomically(self.place / name, text.encode())

    def _write_weights(self) -> None:
        facts = self.facts
        said = {
            "name": self.identifier,
            "author": ", ".join(facts.authors),
            "license": str(facts.licence),
            "description": str(facts.description),
        }
        # What others wrote beside their weights may be paths and names that are not for everyone
        numbers = {key: value for key, value in self.checkpoint.beside.items() if isinstance(value, int | float)}
        checkpoint = replace(self.checkpoint, beside={**numbers, **said})
        save_checkpoint(checkpoint, self.place / self.weights, file_format="safetensors")
        self.notes += [f"Assumed: {assumption}" for assumption in self.checkpoint.assumptions]

    def _write_onnx(self) -> tuple[str | None, str]:
        from esc_arch.tools.upscale import load

        from .onnx import export_onnx, require

        try:
            require("onnx", "onnxscript", "onnxruntime")
        except UserError as error:
            self.notes.append(f"There is no ONNX file: {error}")
            return None, ""
        name = f"{self.identifier}.onnx"
        upscaler = load(self.place / self.weights, device="cpu")
        try:
            report = export_onnx(upscaler, self.place / name)
        except UserError as error:
            raise UserError(f"{error} Without the ONNX file: --no-onnx.") from error
        largest = "" if report.worst is None else f" It differs from PyTorch by {report.worst:.1g} at most."
        return name, (
            f"Opset {report.metadata['opset']}; input {report.metadata['input']}; padding {report.metadata['padding']}."
            f"{largest}"
        )

    def _write_samples(self, images: Sequence[Path]) -> list[Sample]:
        from esc_arch.tools.upscale import load, upscale
        from esc_arch.tools.upscale.image_reader import read_picture

        stems = [image.stem for image in images]
        if twice := next((stem for stem in stems if stems.count(stem) > 1), None):
            raise UserError(f"--images: two pictures are called {twice}. Rename one of them.")
        samples = []
        upscaler = load(self.place / self.weights, precision="fp32") if images else None
        for index, image in enumerate(images, 1):
            pixels = read_picture(image).pixels
            height, width = pixels.shape[:2]
            if height * width * self.scale**2 > LARGEST_SAMPLE:
                raise UserError(
                    f"--images {image}: {width} x {height} pixels, which is too large for a card once enlarged; "
                    f"up to {LARGEST_SAMPLE // self.scale**2:,} pixels are allowed. Cut something out of it."
                )
            if pixels.dtype == np.uint16:
                pixels = (pixels // 257).astype(np.uint8)
            assert upscaler is not None
            given = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
            enlarged = upscale(given, upscaler)
            bicubic = given.resize(enlarged.size, Image.Resampling.BICUBIC)
            stem = re.sub(r"[^A-Za-z0-9]+", "-", image.stem).strip("-") or "picture"
            names = [f"{IMAGES}/{index}-{stem}-{kind}.png" for kind in ("LR", "bicubic", "SR")]
            (self.place / IMAGES).mkdir(exist_ok=True)
            for name, picture in zip(names, (given, bicubic, enlarged), strict=True):
                picture.save(self.place / name)
            samples.append(Sample(*names))
        return samples

    def _write_entry(self, onnx_file: str | None, samples: Sequence[Sample]) -> None:
        entry = self._entry(onnx_file, samples)
        if problems := entry_problems(self.identifier, entry):
            raise UserError("OpenModelDB does not take this:" + "".join(f"\n - {problem}" for problem in problems))
        self._write(f"{self.identifier}.json", json.dumps(entry, indent=4, ensure_ascii=False) + "\n")

    def _entry(self, onnx_file: str | None, samples: Sequence[Sample]) -> dict[str, Any]:
        facts, section, training = self.facts, self.network_g, self.training
        ids = [user_id(author) for author in facts.authors]
        entry: dict[str, Any] = {
            "name": self.identifier.partition("-")[2],
            "author": ids[0] if len(ids) == 1 else ids,
            "license": facts.licence,
            "tags": list(dict.fromkeys(facts.tags)),
            "description": "\n\n".join(
                filter(None, (facts.description, facts.purpose and f"Purpose: {facts.purpose.strip()}"))
            ),
            "date": facts.date,
            "architecture": ARCHITECTURE,
            "size": [section["type"], f"{section['dim']}dim", f"{section['n_blocks']}blocks"],
            "scale": self.scale,
            "inputChannels": 3,
            "outputChannels": 3,
            "resources": [self._resource(name) for name in (self.weights, onnx_file) if name is not None],
        }
        if training is not None:
            numbers = {"trainingIterations": training.iteration, "trainingHRSize": training.gt_size}
            entry |= {key: value for key, value in numbers.items() if value}
            entry["trainingOTF"] = training.on_the_fly
        entry["dataset"] = facts.dataset
        base = self._base()
        pairs = [(sample.given, sample.enlarged) for sample in samples if base is not None]
        entry["images"] = [{"type": "paired", "LR": f"{base}{given}", "SR": f"{base}{sr}"} for given, sr in pairs]
        return entry

    def _base(self) -> str | None:
        return next((url for url in self.urls if url.endswith("/")), None)

    def _resource(self, name: str) -> dict[str, Any]:
        kind, file = name.rpartition(".")[2], self._file(name)
        urls = [
            url + name if url.endswith("/") else url for url in self.urls if _kind_of(url) == kind or url.endswith("/")
        ]
        if not urls:
            self.notes.append(
                f"{self.identifier}.json has no address for {name}, which OpenModelDB needs: --resources."
            )
        return {"platform": PLATFORMS[kind], "type": kind, "size": file.size, "sha256": file.sha256, "urls": urls}

    def _write_card(self, onnx_file: str | None, onnx_note: str, samples: Sequence[Sample], options: list[str]) -> None:
        facts, section = self.facts, self.network_g
        with torch.device("meta"):
            parameters = sum(parameter.numel() for parameter in build_network(section).parameters())
        card = Card(
            identifier=self.identifier,
            authors=facts.authors,
            licence=str(facts.licence),
            description=str(facts.description),
            purpose=facts.purpose,
            dataset=str(facts.dataset),
            tags=facts.tags,
            date=str(facts.date),
            network_g=section,
            parameters=parameters,
            weights=self.weights,
            onnx=onnx_file,
            onnx_note=onnx_note,
            any_scale=section["type"] == "ESCLTE",
            training=self.training,
            samples=samples,
            files=self._files(),
            options=options,
        )
        self._write("README.md", card.text())

    def _files(self) -> tuple[PublishedFile, ...]:
        names = sorted(path.relative_to(self.place).as_posix() for path in self.place.rglob("*") if path.is_file())
        return tuple(self._file(name) for name in names)

    def _file(self, name: str) -> PublishedFile:
        data = (self.place / name).read_bytes()
        return PublishedFile(name, len(data), hashlib.sha256(data).hexdigest())

    def _note_of_lists(self) -> None:
        unknown = [tag for tag in self.facts.tags if tag not in TAGS]
        for tag in unknown:
            guess = nearest(tag, TAGS)
            self.notes.append(f"The tag {tag!r} is not known here" + (f"; is {guess!r} meant?" if guess else "."))
        users = ", ".join(user_id(author) for author in self.facts.authors)
        self.notes.append(
            f"OpenModelDB has lists of its own. Add there what is missing: the architecture {ARCHITECTURE}, the author "
            f"{users}."
        )
