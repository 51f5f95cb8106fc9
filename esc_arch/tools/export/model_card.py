"""The model card of a network that is published: a README.md with a head that Hugging Face reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from esc_arch.archs.esc_rib_arch import PUBLISHED_WINDOW as PUBLISHED_RIB_WINDOW

from .experiment import Training

__all__ = ["Card", "PublishedFile", "Sample"]

CITATION = """\
@inproceedings{lee2025esc,
  title     = {Emulating Self-attention with Convolution for Efficient Image Super-Resolution},
  author    = {Lee, Dongheon and Yun, Seokju and Ro, Youngmin},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2025}
}"""
#: Metrics by the names that Hugging Face has for them.
METRIC_NAMES = {"psnr": "PSNR", "ssim": "SSIM", "niqe": "NIQE", "lpips": "LPIPS"}


@dataclass(frozen=True)
class PublishedFile:
    """A file of the folder: its name, size in bytes and SHA-256 in hexadecimal digits."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Sample:
    """Files of a picture, relative to the card: as given, enlarged by bicubic interpolation, and by the network."""

    given: str
    bicubic: str
    enlarged: str


@dataclass(frozen=True)
class Card:
    """What the card says.

    Attributes:
        identifier, authors, licence, description, purpose, dataset, tags, date: of the model; see `Facts`.
        network_g: type and options of the network.
        parameters: how many.
        weights, onnx: names of files; None where there is none.
        onnx_note: of the ONNX file.
        any_scale: whether the network can be asked for any scale.
        training: what an experiment says.
        samples, files, options: what else is in the folder.
    """

    identifier: str
    authors: Sequence[str]
    licence: str
    description: str
    purpose: str | None
    dataset: str
    tags: Sequence[str]
    date: str
    network_g: Mapping[str, Any]
    parameters: int
    weights: str
    onnx: str | None
    onnx_note: str
    any_scale: bool
    training: Training | None
    samples: Sequence[Sample]
    files: Sequence[PublishedFile]
    options: Sequence[str]

    def text(self) -> str:
        """The card, in Markdown."""
        parts = [
            f"---\n{yaml.safe_dump(self._head(), sort_keys=False, allow_unicode=True)}---",
            f"# {self.identifier}",
            self.description,
            *([f"For: {self.purpose}"] if self.purpose else []),
            f"By {', '.join(self.authors)}, {self.date}. Licence: {self.licence}. Trained on: {self.dataset}.",
            *self._pictures(),
            *self._usage(),
            "## Network",
            _table(("", ""), self._network()),
            *self._training(),
            "## Files",
            _table(
                ("file", "bytes", "SHA-256"),
                [(f"`{file.name}`", f"{file.size:,}", f"`{file.sha256}`") for file in self.files],
            ),
            f"`{self.options[0]}` tests the network, `{self.options[1]}` trains it further on images of your own "
            "(esc_arch; their first lines say how).",
            "## Cite",
            f"The architecture is ESC ([arXiv 2503.06671](https://arxiv.org/abs/2503.06671)):\n\n```bibtex\n{CITATION}\n```",
        ]
        return "\n\n".join(parts) + "\n"

    def _head(self) -> dict[str, Any]:
        head: dict[str, Any] = {
            "license": hugging_face_licence(self.licence),
            "library_name": "esc-arch",
            "pipeline_tag": "image-to-image",
            "tags": list(
                dict.fromkeys(["super-resolution", "esc", "pytorch", *(["onnx"] if self.onnx else []), *self.tags])
            ),
        }
        if names := dataset_names(self.dataset):
            head["datasets"] = names
        if self.training is not None and self.training.metrics:
            metrics = self.training.metrics
            head["metrics"] = list(dict.fromkeys(metric for values in metrics.values() for metric in values))
            head["model-index"] = [{"name": self.identifier, "results": [_result(*item) for item in metrics.items()]}]
        return head

    def _pictures(self) -> list[str]:
        rows = [
            (f"![bicubic]({sample.bicubic})", f"![{self.identifier}]({sample.enlarged})") for sample in self.samples
        ]
        return [_table(("bicubic", self.identifier), rows)] if rows else []

    def _usage(self) -> list[str]:
        scale = " -s SCALE" if self.any_scale else ""
        with_scale = ", scale=2.5" if self.any_scale else ""
        usage = [
            "## Use",
            "On the command line, with esc_arch (`pip install esc-arch`); pictures, folders and videos, of any size:",
            f"```bash\nbasicsr upscale -i INPUT -o OUTPUT -m {self.weights}{scale}\n```",
            "In Python:",
            "```python\nimport esc_arch\n\n"
            f'model = esc_arch.load("{self.weights}")\n'
            f"enlarged = esc_arch.upscale(image, model{with_scale})  # a NumPy array, a tensor or a Pillow image\n```",
            *self._in_spandrel(),
        ]
        if self.onnx is not None:
            usage.append(f"In other runtimes: `{self.onnx}`. {self.onnx_note}")
        return usage

    def _in_spandrel(self) -> list[str]:
        """How programs load it by spandrel, which hands over weights alone; see `integrations.spandrel`."""
        section = self.network_g
        if section["attn_type"] == "RIB" and section["window_size"] != PUBLISHED_RIB_WINDOW:
            return []  # another window would be assumed
        scale = "; it enlarges by 4 there" if self.any_scale else ""
        return [
            f"In programs that load models by spandrel (chaiNNer, ComfyUI and others){scale}:",
            "```python\nimport spandrel\nfrom esc_arch.integrations.spandrel import install\n\n"
            f'install()\nmodel = spandrel.ModelLoader().load_from_file("{self.weights}")\n```',
        ]

    def _network(self) -> list[tuple[str, str]]:
        section = self.network_g
        scale = (
            f"any; {section['upscaling_factor']:g} by default" if self.any_scale else f"{section['upscaling_factor']:g}"
        )
        options = {
            key: value for key, value in section.items() if key not in ("type", "upscaling_factor", "window_size")
        }
        return [
            ("architecture", section["type"]),
            ("scale", scale),
            ("parameters", f"{self.parameters:,}"),
            ("window", f"{section['window_size']} pixels"),
            ("input and output", "RGB in 0 .. 1"),
            ("options", ", ".join(f"{key}: {value}" for key, value in options.items())),
        ]

    def _training(self) -> list[str]:
        if self.training is None:
            return []
        parts = ["## Training", _table(("", ""), self.training.rows())]
        if self.training.metrics:
            rows = [
                (dataset, METRIC_NAMES.get(metric, metric), f"{value:.4f}")
                for dataset, values in self.training.metrics.items()
                for metric, value in values.items()
            ]
            parts.append(_table(("data set", "metric", "value"), rows))
        return parts


def hugging_face_licence(licence: str) -> str:
    """Hugging Face's name of an SPDX licence."""
    return licence.lower().removesuffix("-only").removesuffix("-or-later")


def dataset_names(text: str) -> list[str]:
    """Names of data sets in a text such as `DIV2K, Flickr2K`; none when it is prose."""
    names = [part.strip() for part in re.split(r"[,;+&]| and ", text) if part.strip()]
    return names if all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) for name in names) else []


def _result(dataset: str, metrics: Mapping[str, float]) -> dict[str, Any]:
    return {
        "task": {"type": "image-to-image", "name": "Super-resolution"},
        "dataset": {"name": dataset, "type": dataset},
        "metrics": [
            {"type": metric, "name": METRIC_NAMES.get(metric, metric), "value": round(value, 4)}
            for metric, value in metrics.items()
        ],
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
