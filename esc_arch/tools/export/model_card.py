"""The model card of a network that is published: a README.md whose metadata Hugging Face reads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import torch
import yaml

from esc_arch.archs.esc_rib_arch import PUBLISHED_WINDOW as PUBLISHED_RIB_WINDOW
from esc_arch.checkpoints.conversion import build_network

from .model_info import Model, PublishedFile

__all__ = ["model_card"]

CITATION = """\
@inproceedings{lee2025esc,
  title     = {Emulating Self-attention with Convolution for Efficient Image Super-Resolution},
  author    = {Lee, Dongheon and Yun, Seokju and Ro, Youngmin},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2025}
}"""


def model_card(model: Model, files: Sequence[PublishedFile]) -> str:
    """The card, in Markdown, of a model whose folder holds these files."""
    name, info = model.identifier, model.info
    samples = [(f"![bicubic]({bicubic})", f"![{name}]({sr})") for _, bicubic, sr in model.samples]
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in build_network(model.network_g).parameters())
    training = []
    if model.training.settings:
        training = ["## Training", _code("yaml", yaml.safe_dump(model.training.settings, sort_keys=False))]
        scores = model.training.scores.items()
        rows = [(dataset, metric.upper(), f"{value:.4f}") for (dataset, metric), value in scores]
        training += [_table(("data set", "metric", "value"), rows)] if rows else []
    parts = [
        f"---\n{_metadata(model)}\n---",
        f"# {name}",
        info.description,
        *([f"For: {info.purpose}"] if info.purpose else []),
        f"By {', '.join(info.authors)}, {info.date}. Licence: {info.licence}. Trained on: {info.dataset}.",
        *([_table(("bicubic", name), samples)] if samples else []),
        *_usage(model),
        "## Network",
        f"{parameters:,} parameters; input and output are RGB in 0 .. 1.",
        _code("yaml", yaml.safe_dump({"network_g": dict(model.network_g)}, sort_keys=False)),
        *training,
        "## Files",
        _table(("file", "bytes", "SHA-256"), [(f"`{file}`", f"{size:,}", f"`{sha}`") for file, size, sha in files]),
        f"`test_{name}.yml` tests the network, `finetune_{name}.yml` trains it further on images of your own "
        "(esc_arch; their first lines say how).",
        "## Cite",
        "The architecture is ESC ([arXiv 2503.06671](https://arxiv.org/abs/2503.06671)):",
        _code("bibtex", CITATION),
    ]
    return "\n\n".join(parts) + "\n"


def _metadata(model: Model) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-to-image",
            task_name="Super-resolution",
            dataset_type=dataset,
            dataset_name=dataset,
            metric_type=metric,
            metric_name=metric.upper(),
            metric_value=round(value, 4),
        )
        for (dataset, metric), value in model.training.scores.items()
    ]
    # Names of the hub, such as DIV2K or user/photographs; a sentence is none
    datasets = re.split(r"\s*(?:[,;+&]|\band\b)\s*", model.info.dataset)
    named = all(re.fullmatch(r"[\w.-]+(?:/[\w.-]+)?", name) for name in datasets)
    tags = ["super-resolution", "esc", "pytorch", *(["onnx"] if model.onnx else []), *model.info.tags]
    return ModelCardData(
        # Hugging Face's name of an SPDX licence
        license=model.info.licence.lower().removesuffix("-only").removesuffix("-or-later"),
        library_name="esc-arch",
        pipeline_tag="image-to-image",
        datasets=datasets if named else None,
        tags=list(dict.fromkeys(tags)),
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=model.identifier if results else None,
        eval_results=results or None,
    ).to_yaml()


def _usage(model: Model) -> Iterable[str]:
    section, file = model.network_g, f"{model.identifier}.safetensors"
    any_scale = section["type"] == "ESCLTE"
    yield "## Use"
    yield "On the command line, with esc_arch (`pip install esc-arch`); pictures, folders and videos, of any size:"
    yield _code("bash", f"basicsr upscale -i INPUT -o OUTPUT -m {file}{' -s SCALE' if any_scale else ''}")
    yield "In Python, with a NumPy array, a tensor or a Pillow image:"
    scale = ", scale=2.5" if any_scale else ""
    yield _code("python", f'import esc_arch\n\nmodel = esc_arch.load("{file}")\nesc_arch.upscale(image, model{scale})')
    # spandrel hands over weights alone, so it would take another window of RIB for the published one
    if section["attn_type"] != "RIB" or section["window_size"] == PUBLISHED_RIB_WINDOW:
        scale = "; it enlarges by 4 there" if any_scale else ""
        yield f"In programs that load models by spandrel (chaiNNer, ComfyUI and others){scale}:"
        imports = "import spandrel\nfrom esc_arch.integrations.spandrel import install"
        yield _code("python", f'{imports}\n\ninstall()\nmodel = spandrel.ModelLoader().load_from_file("{file}")')
    if model.onnx is not None:
        name, opset = model.onnx.path.name, model.onnx.metadata["opset"]
        yield f"In other runtimes: `{name}`, opset {opset}, images of any size. See its metadata for more."


def _code(language: str, text: str) -> str:
    return f"```{language}\n{text.strip()}\n```"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))
