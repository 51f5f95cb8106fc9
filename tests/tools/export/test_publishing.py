"""`basicsr publish`: all that it writes is read back and used; what it refuses, and why."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import jsonschema
import numpy as np
import pytest
import torch
import yaml
from conftest import NETWORK
from networks import image, randomise
from PIL import Image
from safetensors import safe_open
from skimage.data import astronaut

import esc_arch
from esc_arch import UserError, atomic_io
from esc_arch.checkpoints.conversion import build_network
from esc_arch.cli import main
from esc_arch.data.benchmark import prepare_benchmark
from esc_arch.data.image_files import Source, encode_png
from esc_arch.options import load_yaml
from esc_arch.tools.export import ExportResult, export_onnx, publishing
from esc_arch.tools.export.model_info import LICENCES, TAGS, model_id, user_id
from esc_arch.tools.export.publishing import ModelInfo, Published, publish
from esc_arch.tools.upscale import Upscaler

pytest.importorskip("huggingface_hub", reason='needs pip install "esc-arch[publish]"')

INFO = ModelInfo(
    name="Sharp Eyes",
    authors=("Jane Doe", "K. O'Neil"),
    licence="cc-by-4.0",
    dataset="DIV2K, Flickr2K",
    description="Enlarges **photographs**.",
    tags=("photo", "research"),
    date="2025-03-31",
)
BASE = "https://example.org/jane/2x-Sharp-Eyes/"
ID = {"type": "string", "pattern": "^[a-z0-9]+(-[a-z0-9]+)*$"}
COUNT = {"type": "integer", "minimum": 1}
#: OpenModelDB's rules (`src/lib/model-props.ts` and `schema-util.ts` of its repository) for what is in our entries.
ENTRY_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["name", "author", "license", "tags", "description", "date", "architecture", "scale", "resources"],
    "properties": {
        "name": {"type": "string", "minLength": 1},
        "author": {"anyOf": [ID, {"type": "array", "items": ID, "minItems": 2}]},
        "license": {"enum": list(LICENCES)},
        "tags": {"type": "array", "items": ID, "minItems": 1, "uniqueItems": True},
        "description": {"type": "string", "pattern": r"^\S[\s\S]*\S$"},
        "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "architecture": ID,
        "scale": {**COUNT, "maximum": 16},
        "inputChannels": {**COUNT, "maximum": 4},
        "outputChannels": {**COUNT, "maximum": 4},
        "trainingIterations": COUNT,
        "trainingHRSize": COUNT,
        "trainingOTF": {"type": "boolean"},
        "resources": {
            "type": "array",
            "minItems": 1,
            "items": {
                "type": "object",
                "required": ["platform", "type", "size", "sha256", "urls"],
                "properties": {
                    "platform": {"enum": ["pytorch", "onnx"]},
                    "type": {"enum": ["pth", "safetensors", "onnx"]},
                    "size": COUNT,
                    "sha256": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
                    "urls": {"type": "array", "items": {"type": "string", "pattern": r"^https?://[^/\s]+/\S*$"}},
                },
            },
        },
    },
}
PHOTOGRAPH = astronaut()
SMALL: dict[str, Any] = {key: NETWORK[key] for key in ("dim", "pdim", "kernel_size", "n_blocks", "conv_blocks")}
SMALL |= {"window_size": 4, "num_heads": 2}
SECTIONS: dict[str, dict[str, Any]] = {
    "ESC": {"type": "ESC", **SMALL, "upscaling_factor": 2},
    "FlashBias": {"type": "ESC", **SMALL, "upscaling_factor": 3, "attn_type": "FlashBias", "flashbias_rank": 4},
    "ESCFP": {"type": "ESCFP", **SMALL, "upscaling_factor": 3},
    "ESCReal": {"type": "ESCReal", **SMALL, "upscaling_factor": 4},
    "ESCRealM": {"type": "ESCRealM", **SMALL, "upscaling_factor": 1},
    "ESCRIB": {
        "type": "ESCRIB", **SMALL, "upscaling_factor": 2, "rank": 4, "rib_hidden_dim": 4, "rib_n_freqs": 2
    },
    "ESCLTE": {"type": "ESCLTE", **SMALL, "upscaling_factor": 2, "hidden_dim": 8, "mlp_dims": [8]},
}  # fmt: skip


def state_dict(section: dict[str, Any], seed: int = 0) -> dict[str, Any]:
    net = randomise(build_network(section), seed)
    return {name: 0.3 * tensor if tensor.is_floating_point() else tensor for name, tensor in net.state_dict().items()}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A checkpoint as of training, with more beside its weights than is for everyone."""
    path = tmp_path / "net_g_4.pth"
    section = SECTIONS["ESC"]
    beside = {"network_g": section, "folded": False, "home": "my secret folder"}
    torch.save({"params": state_dict(section, 1), "params_ema": state_dict(section), **beside}, path)
    return path


@pytest.fixture
def experiment(tmp_path: Path, train_options: dict[str, Any]) -> Path:
    """What a training leaves in its folder."""
    folder = tmp_path / "experiments" / "trial"
    folder.mkdir(parents=True)
    train_options["network_g"] = SECTIONS["ESC"]
    train_options["train"]["losses"] = {"own": {"weights": str(tmp_path / "vgg.pth"), "more": [str(tmp_path), 1]}}
    (folder / "train.yml").write_text("# CMD:\n" + yaml.safe_dump(train_options), encoding="utf-8")
    records = [
        {"iter": 2, "dataset": "Cuts", "psnr": 20.5, "ssim": 0.5},
        {"iter": 4, "lr": 1e-3, "l_pix": 0.1},
        {"iter": 4, "dataset": "Cuts", "psnr": 21.25, "ssim": 0.625},
        {"iter": 6, "dataset": "Cuts", "psnr": 22.5, "ssim": 0.75},
    ]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return folder


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "Astro naut.png"
    Image.fromarray(PHOTOGRAPH[40:61, 170:193]).save(path)
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def card(folder: Path) -> tuple[dict[str, Any], str]:
    """The head and the text of the model card."""
    _, head, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), text


def entry(published: Published) -> dict[str, Any]:
    return dict(json.loads((published.folder / f"{published.identifier}.json").read_text(encoding="utf-8")))


# --- what is written ------------------------------------------------------------------------------------------------


def test_weights(weights: Path, tmp_path: Path) -> None:
    """Those of the average, as they were, with what is to be said of them and nothing else of the file's."""
    published = publish(weights, tmp_path / "out", INFO, onnx=False)
    path = published.folder / "2x-Sharp-Eyes.safetensors"
    before, after = (esc_arch.load(file, device="cpu") for file in (weights, path))
    picture = image(1, 3, 13, 10)
    assert torch.equal(after(picture), before(picture))
    assert not torch.equal(esc_arch.load(weights, device="cpu", param_key="params")(picture), before(picture))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        free = state_dict(SECTIONS["ESC"])["plk_filter"]
        assert torch.equal(file.get_tensor("plk_filter"), free)
    assert metadata["author"] == "Jane Doe, K. O'Neil" and metadata["license"] == "CC-BY-4.0"
    assert json.loads(metadata["network_g"])["window_size"] == 4
    everything = b"".join(file.read_bytes() for file in published.folder.rglob("*") if file.is_file())
    assert b"secret" not in everything and str(tmp_path).encode() not in everything


def test_files_are_listed_as_they_are(weights: Path, experiment: Path, picture: Path, tmp_path: Path) -> None:
    published = publish(weights, tmp_path / "out", INFO, experiment=experiment, images=[picture], onnx=False)
    folder = published.folder
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    pictures = {f"images/1-Astro-naut-{kind}.png" for kind in ("LR", "bicubic", "SR")}
    named = {f"{verb}_2x-Sharp-Eyes.yml" for verb in ("test", "finetune")}
    assert there == {"README.md", "SHA256SUMS", "2x-Sharp-Eyes.json", "2x-Sharp-Eyes.safetensors", *named, *pictures}
    listed = dict(reversed(line.split("  ")) for line in (folder / "SHA256SUMS").read_text().splitlines())
    assert listed == {name: sha256(folder / name) for name in there - {"SHA256SUMS"}}
    assert {file.name: (file.size, file.sha256) for file in published.files} == {
        name: ((folder / name).stat().st_size, digest) for name, digest in listed.items()
    }
    text = card(folder)[1]
    for name in there - {"SHA256SUMS", "README.md"}:
        assert f"| `{name}` | {(folder / name).stat().st_size:,} | `{listed[name]}` |" in text


def test_entry(weights: Path, experiment: Path, picture: Path, tmp_path: Path) -> None:
    published = publish(
        weights, tmp_path / "out", INFO, experiment=experiment, images=[picture], urls=[BASE], onnx=False
    )
    file = published.folder / "2x-Sharp-Eyes.safetensors"
    found = entry(published)
    jsonschema.validate(found, ENTRY_SCHEMA)
    assert found == {
        "name": "Sharp-Eyes",
        "author": ["jane-doe", "k-o-neil"],
        "license": "CC-BY-4.0",
        "tags": ["photo", "research"],
        "description": "Enlarges **photographs**.",
        "date": "2025-03-31",
        "architecture": "esc",
        "size": ["ESC", "8dim", "1blocks"],
        "scale": 2,
        "inputChannels": 3,
        "outputChannels": 3,
        "resources": [
            {
                "platform": "pytorch",
                "type": "safetensors",
                "size": file.stat().st_size,
                "sha256": sha256(file),
                "urls": [f"{BASE}2x-Sharp-Eyes.safetensors"],
            }
        ],
        "trainingIterations": 4,
        "trainingHRSize": 16,
        "trainingOTF": False,
        "dataset": "DIV2K, Flickr2K",
        "images": [
            {
                "type": "paired",
                "LR": f"{BASE}images/1-Astro-naut-LR.png",
                "SR": f"{BASE}images/1-Astro-naut-SR.png",
            }
        ],
    }
    assert [note for note in published.notes if "keeps lists" not in note] == []


def test_entry_without_addresses(weights: Path, picture: Path, tmp_path: Path) -> None:
    published = publish(weights, tmp_path / "out", replace(INFO, purpose="old albums"), images=[picture], onnx=False)
    found = entry(published)
    assert found["resources"][0]["urls"] == found["images"] == []
    assert found["description"] == "Enlarges **photographs**.\n\nPurpose: old albums"
    assert (
        "The entry has no address of the safetensors file, which OpenModelDB needs: give --resources."
        in published.notes
    )


def test_addresses_of_single_files(weights: Path, tmp_path: Path) -> None:
    url = "https://example.org/download/any.safetensors?download=true"
    published = publish(weights, tmp_path / "out", INFO, urls=[url, "https://example.org/a.onnx"], onnx=False)
    assert entry(published)["resources"][0]["urls"] == [url]


def test_card(weights: Path, experiment: Path, picture: Path, tmp_path: Path) -> None:
    facts = replace(INFO, dataset="", purpose="old albums", description="Enlarges | sharpens.")
    published = publish(weights, tmp_path / "out", facts, experiment=experiment, images=[picture], onnx=False)
    head, text = card(published.folder)
    assert str(tmp_path) not in text and "      more:\n      - 1\n" in text
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "esc-arch"
    assert head["tags"] == ["super-resolution", "esc", "pytorch", "photo", "research"]
    assert head["metrics"] == ["psnr", "ssim"]
    assert head["datasets"] == ["Train"]
    result = head["model-index"][0]["results"][0]
    assert result["dataset"]["name"] == "Cuts"
    assert [metric["value"] for metric in result["metrics"]] == [21.25, 0.625]  # of iteration 4, as the weights are
    net = build_network(SECTIONS["ESC"])
    parameters = sum(parameter.numel() for parameter in net.parameters())
    for line in (
        "# 2x-Sharp-Eyes",
        "Enlarges | sharpens.",
        "For: old albums",
        "By Jane Doe, K. O'Neil, 2025-03-31. Licence: CC-BY-4.0. Trained on: Train.",
        "| ![bicubic](images/1-Astro-naut-bicubic.png) | ![2x-Sharp-Eyes](images/1-Astro-naut-SR.png) |",
        "basicsr upscale -i INPUT -o OUTPUT -m 2x-Sharp-Eyes.safetensors",
        'model = esc_arch.load("2x-Sharp-Eyes.safetensors")',
        'model = spandrel.ModelLoader().load_from_file("2x-Sharp-Eyes.safetensors")',
        f"{parameters:,} parameters; input and output are RGB in 0 .. 1.",
        "  window_size: 4",
        "gt_size: 16",
        "iterations: 4",
        "    type: L1Loss",
        "    lr: 0.001",
        "| Cuts | PSNR | 21.2500 |",
    ):
        assert line in text.splitlines()


def test_pictures_are_the_networks(weights: Path, tmp_path: Path) -> None:
    """In 8 and 16 bit, in colours and in grey."""
    colours, grey = PHOTOGRAPH[40:61, 170:193], PHOTOGRAPH[40:55, 170:183, 0]
    paths = [tmp_path / name for name in ("colours.png", "grey.png", "deep.png")]
    Image.fromarray(colours).save(paths[0])
    Image.fromarray(grey).save(paths[1])
    Image.fromarray(grey.astype(np.uint16) * 257).save(paths[2])
    folder = publish(weights, tmp_path / "out", INFO, images=paths, onnx=False).folder
    model = esc_arch.load(weights, device="cpu")
    for number, (path, pixels) in enumerate(zip(paths, (colours, grey, grey), strict=True), 1):
        given, bicubic, enlarged = (
            np.asarray(Image.open(folder / f"images/{number}-{path.stem}-{kind}.png"))
            for kind in ("LR", "bicubic", "SR")
        )
        assert np.array_equal(given, pixels)
        assert np.array_equal(enlarged, esc_arch.upscale(pixels, model))
        assert bicubic.shape == enlarged.shape and not np.array_equal(bicubic, enlarged)


def test_onnx(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What test_export.py tests is published, of the weights that are."""

    def export(upscaler: Upscaler, path: Path) -> ExportResult:
        picture = image(1, 3, 13, 10)
        assert torch.equal(upscaler(picture), esc_arch.load(weights, device="cpu")(picture))
        path.write_bytes(b"onnx")
        return ExportResult(path, {"opset": "20"}, {})

    monkeypatch.setattr(publishing, "export_onnx", create_autospec(export_onnx, side_effect=export))
    published = publish(weights, tmp_path / "out", INFO, urls=[BASE])
    file = published.folder / "2x-Sharp-Eyes.onnx"
    resource = entry(published)["resources"][1]
    assert (resource["platform"], resource["type"], resource["sha256"]) == ("onnx", "onnx", sha256(file))
    assert resource["urls"] == [f"{BASE}2x-Sharp-Eyes.onnx"]
    assert "`2x-Sharp-Eyes.onnx`, opset 20" in card(published.folder)[1] and "onnx" in card(published.folder)[0]["tags"]


def test_without_the_packages_for_onnx(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    published = publish(weights, tmp_path / "out", INFO)
    assert [file for file in published.files if file.name.endswith(".onnx")] == []
    assert "There is no ONNX file: Exporting to ONNX needs onnxscript" in " ".join(published.notes)
    assert len(entry(published)["resources"]) == 1


def test_onnx_that_fails(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("It differs.")

    monkeypatch.setattr(publishing, "export_onnx", fail)
    published = publish(weights, tmp_path / "out", INFO)
    assert "There is no ONNX file: It differs." in published.notes and not list(published.folder.glob("*.onnx"))


# --- networks of all types ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`datasets/` with everything that published option files name."""
    folder = tmp_path_factory.mktemp("data") / "datasets"
    cut = PHOTOGRAPH[100:196, 150:246]
    for name in ("photographs", "own/HR", "own/LR", "own/val/HR", "own/val/LR"):
        (folder / name).mkdir(parents=True)
    for name in ("Set5", "Set14", "B100", "Urban100", "Manga109"):
        prepare_benchmark([Source("face", lambda: cut[..., ::-1].copy(), ("face",))], folder / "benchmark" / name)
    (folder / "photographs" / "face.png").write_bytes(encode_png(cut))
    return folder


def with_data(folder: Path, data: Path, scale: int, side: int) -> None:
    shutil.copytree(data, folder / "datasets")
    hr = encode_png(np.ascontiguousarray(PHOTOGRAPH[: side * scale, : side * scale]))
    lr = encode_png(np.ascontiguousarray(PHOTOGRAPH[:side, :side]))
    for own in ("own", "own/val"):
        (folder / "datasets" / own / "HR" / "a.png").write_bytes(hr)
        (folder / "datasets" / own / "LR" / "a.png").write_bytes(lr)


@pytest.mark.parametrize("kind", SECTIONS)
def test_option_files_of_every_type_run(
    kind: str, data: Path, tmp_path: Path, run_basicsr: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the folder that was published, with nothing but the data added."""
    section = SECTIONS[kind]
    path = tmp_path / "net.pth"
    torch.save({"params": state_dict(section), "network_g": section}, path)
    published = publish(path, run_basicsr.folder, INFO, onnx=False)
    name, folder = published.identifier, published.folder
    assert name == f"{section['upscaling_factor']}x-Sharp-Eyes"
    monkeypatch.chdir(folder)  # it has taken the place of the one that was there
    with_data(folder, data, 4 if kind == "ESCLTE" else section["upscaling_factor"], 64)
    for verb in ("test", "finetune"):
        options = load_yaml(folder / f"{verb}_{name}.yml")
        assert {key: options["network_g"][key] for key in section} == section
        assert options["path"]["pretrain_network_g"] == f"{name}.safetensors"
    head = (folder / f"test_{name}.yml").read_text(encoding="utf-8").splitlines()
    assert head[1] == f"# basicsr test -opt test_{name}.yml"
    forced = ["num_gpu=0", "val:metrics=none"] if "Real" in kind else ["num_gpu=0"]
    run = run_basicsr("test", f"test_{name}.yml", "--force_yml", *forced)
    assert run.status == 0, run.err
    results = list((folder / "results").rglob("*.png"))
    assert len(results) == len(load_yaml(folder / f"test_{name}.yml")["datasets"])

    short = ["num_gpu=0", "train:total_iter=1", "val:val_freq=1", "datasets:train:batch_size_per_gpu=1"]
    short += ["datasets:train:num_worker_per_gpu=0", "logger:use_tb_logger=false"]
    run = run_basicsr("train", f"finetune_{name}.yml", "--force_yml", *short)
    assert run.status == 0, run.err
    assert (folder / "experiments" / f"finetune_{name}" / "models" / "net_g_latest.pth").is_file()


@pytest.mark.parametrize(
    ("text", "names"),
    [("DIV2K and jane/Old-Photos_2", ["DIV2K", "jane/Old-Photos_2"]), ("400 photographs of mine", None)],
)
def test_card_names_data_sets(weights: Path, tmp_path: Path, text: str, names: list[str] | None) -> None:
    published = publish(weights, tmp_path / "out", replace(INFO, dataset=text), onnx=False)
    head, body = card(published.folder)
    assert head.get("datasets") == names and f"Trained on: {text}." in body


def test_cards_of_networks_that_weights_do_not_say_all_of(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    texts = {}
    for kind in ("ESCRIB", "ESCLTE"):
        torch.save({"params": state_dict(SECTIONS[kind]), "network_g": SECTIONS[kind]}, path)
        texts[kind] = card(publish(path, tmp_path / kind, INFO, onnx=False).folder)[1]
    assert "spandrel" not in texts["ESCRIB"]  # it would take the window for another
    assert "by spandrel (chaiNNer, ComfyUI and others); it enlarges by 4 there:" in texts["ESCLTE"]
    assert "-m 2x-Sharp-Eyes.safetensors -s SCALE" in texts["ESCLTE"]

    torch.save(state_dict(SECTIONS["ESCRIB"]), path)  # without its window
    published = publish(path, tmp_path / "assumed", INFO, onnx=False)
    assert any(note.startswith("Assumed: RIB's weights do not depend on window_size: 64") for note in published.notes)
    published = publish(path, tmp_path / "given", INFO, onnx=False, window_size=4)
    assert esc_arch.load(published.folder / "2x-Sharp-Eyes.safetensors", device="cpu").net.window_size == 4


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_missing_is_asked_for_at_once(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        publish(weights, tmp_path / "out", ModelInfo(description="  "))
    lines = str(raised.value).splitlines()
    assert lines[0] == "Cannot publish yet. Please give:"
    flags = ["--name", "--author", "--license", "--dataset", "--description", "--tags"]
    assert [line.split()[1] for line in lines[1:]] == flags
    assert list(tmp_path.iterdir()) == [weights]


@pytest.mark.parametrize(
    ("change", "url", "message"),
    [
        ({"name": "2x-"}, BASE, r"--name NAME: what the model is called, in ASCII letters or digits \(given: 2x-\)"),
        ({"authors": ("…", "Jane")}, BASE, r"--author NAME .*: who made it, in ASCII letters .*\(given: \['…'\]\)"),
        ({"licence": "CC-BY-5.0"}, BASE, r"--license ID: .* an SPDX id. Did you mean 'CC-BY-.*\(given: CC-BY-5.0\)"),
        ({"tags": ("Photo s",)}, BASE, r"--tags TAG .*: what it is for, such as anime, .*\(given: \['Photo s'\]\)"),
        ({"date": "31.03.2025"}, BASE, r"--date YYYY-MM-DD: a day like 2025-03-31 \(given: 31.03.2025\)"),
        ({"date": "2025-02-30"}, BASE, r"--date YYYY-MM-DD: a day like 2025-03-31"),
        (
            {},
            "example.org/a.onnx",
            r"--resources URL .*: https:// addresses that .*\(given: \['example.org/a.onnx'\]\)",
        ),
        ({}, "https://example.org/a.zip", r"--resources URL .* end in .safetensors or .onnx, or in a slash"),
        (
            {},
            "https://cdn.discordapp.com/a.onnx",
            r"--resources URL .*; those of Discord's CDN expire",
        ),
    ],
)
def test_invalid_info(weights: Path, tmp_path: Path, change: dict[str, Any], url: str, message: str) -> None:
    with pytest.raises(UserError, match=f"Please give:\n - {message}"):
        publish(weights, tmp_path / "out", replace(INFO, **change), urls=[url])


def test_without_huggingface_hub(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r'Publishing needs huggingface_hub, .* pip install "esc-arch\[publish\]"'):
        publish(weights, tmp_path / "out", INFO)


def test_unknown_tags_are_said(weights: Path, tmp_path: Path) -> None:
    published = publish(weights, tmp_path / "out", replace(INFO, tags=("photos", "quux")), onnx=False)
    notes = "\n".join(published.notes)
    assert "The tag 'photos' is not known here. Did you mean 'photo'? Allowed: anime, " in notes
    assert "The tag 'quux' is not known here. Allowed: anime, " in notes


def test_pictures_that_cannot_be(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a PNG"):
        publish(weights, tmp_path / "out", INFO, images=[weights], onnx=False)
    assert list(tmp_path.iterdir()) == [weights]


def test_experiments_that_cannot_be(weights: Path, experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--experiment .*nowhere: no such folder"):
        publish(weights, tmp_path / "out", INFO, experiment=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no option file \(\*\.yml\) in it"):
        publish(weights, tmp_path / "out", INFO, experiment=tmp_path)
    options = load_yaml(experiment / "train.yml")
    options["network_g"] = {**options["network_g"], "upscaling_factor": 3}
    (experiment / "train.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"trained a network with upscaling_factor: 3; .*net_g_4.pth has upscaling_factor: 2\. Give"
    ):
        publish(weights, tmp_path / "out", INFO, experiment=experiment)


def test_an_experiment_that_names_the_network_as_ours(weights: Path, experiment: Path, tmp_path: Path) -> None:
    options = load_yaml(experiment / "train.yml")
    options["network_g"] = {**options["network_g"], "type": "esc_arch.ESC"}
    (experiment / "train.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    published = publish(weights, tmp_path / "out", INFO, experiment=experiment, onnx=False)
    assert entry(published)["architecture"] == entry(publish(weights, tmp_path / "b", INFO, onnx=False))["architecture"]


def test_iterations_that_nothing_says(weights: Path, experiment: Path, tmp_path: Path) -> None:
    """The last that was measured counts for `net_g_latest`; without any, none is claimed."""
    latest = weights.rename(tmp_path / "net_g_latest.pth")
    published = publish(latest, tmp_path / "last", INFO, experiment=experiment, onnx=False)
    assert entry(published)["trainingIterations"] == 6
    (experiment / "metrics.jsonl").unlink()
    published = publish(latest, tmp_path / "none", INFO, experiment=experiment, onnx=False)
    assert "trainingIterations" not in entry(published) and "model-index" not in card(published.folder)[0]


# --- where it goes --------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(weights: Path, tmp_path: Path, take_snapshot: Callable[..., Any]) -> None:
    folder = tmp_path / "out"
    publish(weights, folder, INFO, onnx=False)
    before = take_snapshot(tmp_path)
    with pytest.raises(UserError, match=r"out already exists\. Choose another -o, or replace it with --overwrite"):
        publish(weights, folder, INFO, onnx=False)
    assert take_snapshot(tmp_path) == before
    other = replace(INFO, name="Other")
    publish(weights, folder, other, onnx=False, overwrite=True)
    assert not list(folder.glob("*Sharp*")) and (folder / "2x-Other.safetensors").is_file()
    (folder / "notes.txt").write_text("mine")
    before = take_snapshot(tmp_path)
    with pytest.raises(UserError, match=r"out holds notes\.txt, not made by `basicsr publish`, so it is not replaced"):
        publish(weights, folder, INFO, onnx=False, overwrite=True)
    with pytest.raises(UserError, match="was not made by `basicsr publish`, so it is not replaced"):
        publish(weights, tmp_path, INFO, onnx=False, overwrite=True)
    (tmp_path / "SHA256SUMS").write_text(f"{sha256(weights)}  {weights.name}\n")
    with pytest.raises(UserError, match="was not made by `basicsr publish`, so it is not replaced"):
        publish(weights, tmp_path, INFO, onnx=False, overwrite=True)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"net_g_4\.pth was not made by"):
        publish(weights, weights, INFO, onnx=False, overwrite=True)
    with pytest.raises(UserError, match=r"nowhere/out cannot be written: No such file or directory\. Choose"):
        publish(weights, tmp_path / "nowhere" / "out", INFO, onnx=False)
    assert take_snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("late", [False, True])
def test_a_failure_leaves_what_was_there(
    weights: Path,
    tmp_path: Path,
    error: BaseException,
    late: bool,
    monkeypatch: pytest.MonkeyPatch,
    take_snapshot: Callable[..., Any],
) -> None:
    """While the new folder is filled, and when the old one has been taken away already."""
    folder = tmp_path / "out"
    publish(weights, folder, INFO, onnx=False)
    before = take_snapshot(tmp_path)
    replace_file = os.replace

    def fail(*_: object) -> None:
        raise error

    def fail_late(source: Path, target: Path) -> None:
        if Path(target) == folder and Path(source).name != ".out.old":
            raise error
        replace_file(source, target)

    if late:
        monkeypatch.setattr(atomic_io, "_exchange", lambda one, other: False)  # which cannot be interrupted
        monkeypatch.setattr(os, "replace", fail_late)
    else:
        monkeypatch.setattr(publishing, "option_files", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="cannot be written: No space left" if expected is UserError else None):
        publish(weights, folder, INFO, onnx=False, overwrite=True)
    assert take_snapshot(tmp_path) == before


def test_what_a_kill_left(weights: Path, tmp_path: Path) -> None:
    """In the middle of filling, and between taking the old folder away and putting the new one there."""
    folder = tmp_path / "out"
    publish(weights, folder, INFO, onnx=False)
    (tmp_path / ".out.0123abcd.partial").mkdir()
    (tmp_path / ".out.0123abcd.partial" / "half").write_text("")
    folder.rename(tmp_path / ".out.old")
    publish(weights, folder, INFO, onnx=False, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {weights.name, "out"}


def test_two_at_once(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process publishes to the same folder while this one fills its own: the first that is done stays."""
    folder, made = tmp_path / "out", publishing.option_files

    def publish_meanwhile(*arguments: Any) -> dict[str, str]:
        monkeypatch.setattr(publishing, "option_files", made)
        publish(weights, folder, replace(INFO, name="Other"), onnx=False)
        return made(*arguments)

    monkeypatch.setattr(publishing, "option_files", publish_meanwhile)
    with pytest.raises(UserError, match=r"out already exists"):
        publish(weights, folder, INFO, onnx=False)
    assert (folder / "2x-Other.safetensors").is_file() and not list(folder.glob("*Sharp*"))
    assert {path.name for path in tmp_path.iterdir()} == {weights.name, "out"}


def test_command(weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["publish", "-m", str(weights), "-o", str(tmp_path / "out"), "--no-onnx"]
    assert main(command) == 2
    assert "--license ID" in capsys.readouterr().err
    command += ["--name", "Sharp", "--author", "Jane", "--license", "MIT", "--dataset", "DIV2K", "--tags", "photo"]
    command += ["--description", "Enlarges.", "--date", "2025-03-31"]
    assert main(command) == 0
    out = capsys.readouterr().out
    file = tmp_path / "out" / "2x-Sharp.safetensors"
    assert f"{file.stat().st_size:,} bytes  sha256 {sha256(file)}" in out
    assert "Note: The entry has no address of the safetensors file" in out
    assert f"Wrote folder {tmp_path / 'out'}/" in out


# --- OpenModelDB ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Sharp Eyes", "4x-Sharp-Eyes"),
        ("4xSharp_Eyes", "4x-Sharp-Eyes"),
        ("4x-Sharp-Eyes", "4x-Sharp-Eyes"),
        ("Sharp-Eyes-x4", "4x-Sharp-Eyes"),
        ("x4 Sharp Eyes", "4x-Sharp-Eyes"),
        ("2xSharp", "4x-2xSharp"),
        ("ESC_(v2)!", "4x-ESC-v2"),
        ("x42", "4x-x42"),
        ("日本", "4x-"),
    ],
)
def test_ids_of_models(name: str, expected: str) -> None:
    assert model_id(name, 4) == expected


def test_ids_of_users() -> None:
    assert [user_id(name) for name in ("Philip K.", "jane_doe", "X")] == ["philip-k", "jane-doe", "x"]


def test_lists_name_everything_once() -> None:
    assert len(set(LICENCES)) == len(LICENCES) and len(set(TAGS)) == len(TAGS)
