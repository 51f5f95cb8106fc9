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
from esc_arch import UserError
from esc_arch.checkpoints.conversion import build_network
from esc_arch.cli import main
from esc_arch.data.benchmark import prepare_benchmark
from esc_arch.data.image_files import Source, encode_png
from esc_arch.options import load_yaml
from esc_arch.tools.export import publishing
from esc_arch.tools.export.model_card import dataset_names, hugging_face_licence
from esc_arch.tools.export.openmodeldb import LICENCES, TAGS, entry_problems, model_id, user_id
from esc_arch.tools.export.publishing import Facts, Published, publish

FACTS = Facts(
    name="Sharp Eyes",
    authors=("Jane Doe", "K. O'Neil"),
    licence="cc-by-4.0",
    dataset="DIV2K, Flickr2K",
    description="Enlarges **photographs**.",
    tags=("photo", "research"),
    date="2025-03-31",
)
BASE = "https://example.org/jane/2x-Sharp-Eyes/"
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
    published = publish(weights, tmp_path / "out", FACTS, onnx=False)
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
    published = publish(weights, tmp_path / "out", FACTS, experiment=experiment, images=[picture], onnx=False)
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
        weights, tmp_path / "out", FACTS, experiment=experiment, images=[picture], urls=[BASE], onnx=False
    )
    file = published.folder / "2x-Sharp-Eyes.safetensors"
    found = entry(published)
    assert entry_problems(published.identifier, found) == []
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
    assert [note for note in published.notes if "lists of its own" not in note] == []


def test_entry_without_addresses(weights: Path, picture: Path, tmp_path: Path) -> None:
    published = publish(weights, tmp_path / "out", replace(FACTS, purpose="old albums"), images=[picture], onnx=False)
    found = entry(published)
    assert found["resources"][0]["urls"] == found["images"] == []
    assert found["description"] == "Enlarges **photographs**.\n\nPurpose: old albums"
    assert "2x-Sharp-Eyes.json has no address for 2x-Sharp-Eyes.safetensors, which OpenModelDB needs" in " ".join(
        published.notes
    )


def test_addresses_of_single_files(weights: Path, tmp_path: Path) -> None:
    url = "https://example.org/download/any.safetensors?download=true"
    published = publish(weights, tmp_path / "out", FACTS, urls=[url, "https://example.org/a.onnx"], onnx=False)
    assert entry(published)["resources"][0]["urls"] == [url]


def test_card(weights: Path, experiment: Path, picture: Path, tmp_path: Path) -> None:
    facts = replace(FACTS, dataset=None, purpose="old albums", description="Enlarges | sharpens.")
    published = publish(weights, tmp_path / "out", facts, experiment=experiment, images=[picture], onnx=False)
    head, text = card(published.folder)
    assert head["license"] == "cc-by-4.0" and head["library_name"] == "esc-arch"
    assert head["tags"] == ["super-resolution", "esc", "pytorch", "photo", "research"]
    assert head["datasets"] == ["Train"]  # the experiment's
    assert head["metrics"] == ["psnr", "ssim"]
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
        f"| parameters | {parameters:,} |",
        "| scale | 2 |",
        "| window | 4 pixels |",
        "| HR patches | 16 x 16 |",
        "| iterations | 4 |",
        "| losses | L1Loss |",
        "| optimiser | Adam (lr: 0.001) |",
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
    folder = publish(weights, tmp_path / "out", FACTS, images=paths, onnx=False).folder
    model = esc_arch.load(weights, device="cpu")
    for number, (path, pixels) in enumerate(zip(paths, (colours, grey, grey), strict=True), 1):
        given, bicubic, enlarged = (
            np.asarray(Image.open(folder / f"images/{number}-{path.stem}-{kind}.png"))
            for kind in ("LR", "bicubic", "SR")
        )
        assert np.array_equal(given, pixels)
        assert np.array_equal(enlarged, esc_arch.upscale(pixels, model))
        assert bicubic.shape == enlarged.shape and not np.array_equal(bicubic, enlarged)


def test_onnx(weights: Path, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package, reason='needs pip install "esc-arch[onnx]"')
    onnxruntime = pytest.importorskip("onnxruntime", reason='needs pip install "esc-arch[onnx]"')
    published = publish(weights, tmp_path / "out", FACTS, urls=[BASE])
    file = published.folder / "2x-Sharp-Eyes.onnx"
    resource = entry(published)["resources"][1]
    assert (resource["platform"], resource["type"], resource["sha256"]) == ("onnx", "onnx", sha256(file))
    assert resource["urls"] == [f"{BASE}2x-Sharp-Eyes.onnx"]
    assert "`2x-Sharp-Eyes.onnx`. Opset " in card(published.folder)[1] and "onnx" in card(published.folder)[0]["tags"]
    picture = image(1, 3, 13, 10)
    output = onnxruntime.InferenceSession(str(file)).run(None, {"input": picture.numpy()})[0]
    assert np.abs(output - esc_arch.load(weights, device="cpu")(picture).numpy()).max() < 1e-4


def test_without_the_packages_for_onnx(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    published = publish(weights, tmp_path / "out", FACTS)
    assert [file for file in published.files if file.name.endswith(".onnx")] == []
    assert "There is no ONNX file: Exporting to ONNX needs onnxscript" in " ".join(published.notes)
    assert len(entry(published)["resources"]) == 1


def test_onnx_that_fails(weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript", reason='needs pip install "esc-arch[onnx]"')

    def fail(*_: object) -> None:
        raise UserError("It differs.")

    monkeypatch.setattr("esc_arch.tools.export.onnx.export_onnx", fail)
    with pytest.raises(UserError, match=r"It differs\. Without the ONNX file: --no-onnx"):
        publish(weights, tmp_path / "out", FACTS)
    assert not (tmp_path / "out").exists()


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
    published = publish(path, run_basicsr.folder, FACTS, onnx=False)
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


def test_cards_of_networks_that_weights_do_not_say_all_of(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    texts = {}
    for kind in ("ESCRIB", "ESCLTE"):
        torch.save({"params": state_dict(SECTIONS[kind]), "network_g": SECTIONS[kind]}, path)
        texts[kind] = card(publish(path, tmp_path / kind, FACTS, onnx=False).folder)[1]
    assert "spandrel" not in texts["ESCRIB"]  # it would take the window for another
    assert "by spandrel (chaiNNer, ComfyUI and others); it enlarges by 4 there:" in texts["ESCLTE"]
    assert "| scale | any; 2 by default |" in texts["ESCLTE"]
    assert "-m 2x-Sharp-Eyes.safetensors -s SCALE" in texts["ESCLTE"]

    torch.save(state_dict(SECTIONS["ESCRIB"]), path)  # without its window
    published = publish(path, tmp_path / "assumed", FACTS, onnx=False)
    assert any(note.startswith("Assumed: RIB's weights do not depend on window_size: 64") for note in published.notes)
    published = publish(path, tmp_path / "given", FACTS, onnx=False, window_size=4)
    assert esc_arch.load(published.folder / "2x-Sharp-Eyes.safetensors", device="cpu").window == 4


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_is_missing_is_asked_for_at_once(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised:
        publish(weights, tmp_path / "out", Facts(description="  "))
    lines = str(raised.value).splitlines()
    assert lines[0] == "Cannot publish yet. Please give or fix:"
    flags = ["--name", "--author", "--license", "--dataset", "--description", "--tags"]
    assert [line.split()[1] for line in lines[1:]] == flags
    assert list(tmp_path.iterdir()) == [weights]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "2x-"}, r"--name '2x-': must have letters or digits, from which its id 2x-Name is made"),
        ({"authors": ("…",)}, r"--author '…': must have letters or digits of ASCII"),
        ({"licence": "CC-BY-5.0"}, r"--license 'CC-BY-5.0': not among the SPDX ids known here. Did you mean 'CC-BY-"),
        ({"tags": ("Photo s",)}, r"--tags 'Photo s': must be small letters and digits, with single dashes between"),
        ({"date": "31.03.2025"}, r"--date '31.03.2025': must be a day like 2025-03-31"),
        ({"date": "2025-02-30"}, r"--date '2025-02-30': must be a day like 2025-03-31"),
    ],
)
def test_facts_that_cannot_be(weights: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        publish(weights, tmp_path / "out", replace(FACTS, **change))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("example.org/a.onnx", "'example.org/a.onnx' given; must be an address that begins with https://"),
        ("https://example.org/a.zip", r"--resources .*: must end in .safetensors or .onnx, or in a slash"),
        ("https://cdn.discordapp.com/a.onnx", r"expires within a day: put the file elsewhere"),
    ],
)
def test_addresses_that_cannot_be(weights: Path, tmp_path: Path, url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        publish(weights, tmp_path / "out", FACTS, urls=[url])


def test_unknown_tags_are_said(weights: Path, tmp_path: Path) -> None:
    published = publish(weights, tmp_path / "out", replace(FACTS, tags=("photos", "quux")), onnx=False)
    assert "The tag 'photos' is not known here; is 'photo' meant?" in published.notes
    assert "The tag 'quux' is not known here." in published.notes


def test_pictures_that_cannot_be(weights: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "other" / picture.name
    other.parent.mkdir()
    shutil.copy(picture, other)
    with pytest.raises(UserError, match=r"--images: two pictures are called Astro naut\. Rename one of them"):
        publish(weights, tmp_path / "out", FACTS, images=[picture, other], onnx=False)
    monkeypatch.setattr(publishing, "LARGEST_SAMPLE", 1000)
    with pytest.raises(
        UserError, match=r"23 x 21 pixels, which is too large for a card once enlarged; up to 250 pixels"
    ):
        publish(weights, tmp_path / "out", FACTS, images=[picture], onnx=False)
    with pytest.raises(UserError, match="not a PNG"):
        publish(weights, tmp_path / "out", FACTS, images=[weights], onnx=False)
    assert {path.name for path in tmp_path.iterdir()} == {weights.name, picture.name, "other"}


def test_experiments_that_cannot_be(weights: Path, experiment: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--experiment .*nowhere: there is no such folder"):
        publish(weights, tmp_path / "out", FACTS, experiment=tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no option file \(\*\.yml\) in it"):
        publish(weights, tmp_path / "out", FACTS, experiment=tmp_path)
    options = load_yaml(experiment / "train.yml")
    options["network_g"] = {**options["network_g"], "upscaling_factor": 3}
    (experiment / "train.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"trained another network .*: upscaling_factor: 3, where the weights are of upsc"
    ):
        publish(weights, tmp_path / "out", FACTS, experiment=experiment)


def test_an_experiment_that_names_the_network_as_ours(weights: Path, experiment: Path, tmp_path: Path) -> None:
    options = load_yaml(experiment / "train.yml")
    options["network_g"] = {**options["network_g"], "type": "esc_arch.ESC"}
    (experiment / "train.yml").write_text(yaml.safe_dump(options), encoding="utf-8")
    published = publish(weights, tmp_path / "out", FACTS, experiment=experiment, onnx=False)
    assert (
        entry(published)["architecture"] == entry(publish(weights, tmp_path / "b", FACTS, onnx=False))["architecture"]
    )


def test_iterations_that_nothing_says(weights: Path, experiment: Path, tmp_path: Path) -> None:
    """The last that was measured counts for `net_g_latest`; without any, none is claimed."""
    latest = weights.rename(tmp_path / "net_g_latest.pth")
    published = publish(latest, tmp_path / "last", FACTS, experiment=experiment, onnx=False)
    assert entry(published)["trainingIterations"] == 6
    (experiment / "metrics.jsonl").unlink()
    published = publish(latest, tmp_path / "none", FACTS, experiment=experiment, onnx=False)
    assert "trainingIterations" not in entry(published) and "model-index" not in card(published.folder)[0]


# --- where it goes --------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(weights: Path, tmp_path: Path, take_snapshot: Callable[..., Any]) -> None:
    folder = tmp_path / "out"
    publish(weights, folder, FACTS, onnx=False)
    before = take_snapshot(tmp_path)
    with pytest.raises(UserError, match=r"out is there already\. Choose another -o, or give --overwrite to replace it"):
        publish(weights, folder, FACTS, onnx=False)
    assert take_snapshot(tmp_path) == before
    other = replace(FACTS, name="Other")
    publish(weights, folder, other, onnx=False, overwrite=True)
    assert not list(folder.glob("*Sharp*")) and (folder / "2x-Other.safetensors").is_file()
    (folder / "notes.txt").write_text("mine")
    before = take_snapshot(tmp_path)
    with pytest.raises(UserError, match=r"out holds notes\.txt, which `basicsr publish` did not put there"):
        publish(weights, folder, FACTS, onnx=False, overwrite=True)
    with pytest.raises(UserError, match="holds no SHA256SUMS of a model, but other files"):
        publish(weights, tmp_path, FACTS, onnx=False, overwrite=True)
    (tmp_path / "SHA256SUMS").write_text(f"{sha256(weights)}  {weights.name}\n")
    with pytest.raises(UserError, match="holds no SHA256SUMS of a model, but other files"):
        publish(weights, tmp_path, FACTS, onnx=False, overwrite=True)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"net_g_4\.pth holds a file"):
        publish(weights, weights, FACTS, onnx=False, overwrite=True)
    with pytest.raises(UserError, match=r"there is no folder .*nowhere to put it in"):
        publish(weights, tmp_path / "nowhere" / "out", FACTS, onnx=False)
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
    publish(weights, folder, FACTS, onnx=False)
    before = take_snapshot(tmp_path)
    replace_file = os.replace

    def fail(*_: object) -> None:
        raise error

    def fail_late(source: Path, target: Path) -> None:
        if Path(source).name == ".out.partial":
            raise error
        replace_file(source, target)

    if late:
        monkeypatch.setattr(publishing.os, "replace", fail_late)
    else:
        monkeypatch.setattr(publishing, "option_files", fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="cannot be written: No space left" if expected is UserError else None):
        publish(weights, folder, FACTS, onnx=False, overwrite=True)
    assert take_snapshot(tmp_path) == before


def test_what_a_kill_left(weights: Path, tmp_path: Path) -> None:
    """In the middle of filling, and between taking the old folder away and putting the new one there."""
    folder = tmp_path / "out"
    publish(weights, folder, FACTS, onnx=False)
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "half").write_text("")
    folder.rename(tmp_path / ".out.before")
    publish(weights, folder, FACTS, onnx=False, overwrite=True)
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
    assert "Note: 2x-Sharp.json has no address for 2x-Sharp.safetensors" in out
    assert f"2x-Sharp is in {tmp_path / 'out'}" in out


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


ENTRY: dict[str, Any] = {
    "name": "Name",
    "author": "jane",
    "license": "MIT",
    "tags": ["photo"],
    "description": "Text.",
    "date": "2025-03-31",
    "architecture": "esc",
    "size": None,
    "scale": 4,
    "inputChannels": 3,
    "outputChannels": 3,
    "resources": [{"platform": "pytorch", "type": "pth", "size": 5, "sha256": "0" * 64, "urls": [BASE + "a.pth"]}],
    "images": [],
}


def test_an_entry_as_it_is_to_be() -> None:
    assert entry_problems("4x-Name", ENTRY) == []
    assert entry_problems("4x-Name", {**ENTRY, "license": None, "author": ["a", "b-c"], "trainingEpochs": 3}) == []


def resource(**changes: Any) -> dict[str, Any]:
    return {"resources": [{**ENTRY["resources"][0], **changes}]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scale": 2}, "the id '4x-Name' must be the scale, x, and letters"),
        ({"scale": 17}, "scale: 17 given; must be a whole number, 1 to 16"),
        ({"inputChannels": True}, "inputChannels: True given; must be a whole number, 1 to 4"),
        ({"name": ""}, "name: '' given; must be text"),
        ({"description": " Text."}, "description: ' Text.' given; must be text, without blanks around it"),
        ({"author": "Jane Doe"}, "author: 'Jane Doe' given; must be small letters"),
        ({"author": []}, "author: none given; must be at least one"),
        ({"tags": []}, "tags: none given"),
        ({"tags": ["a--b"]}, "tags: 'a--b' given"),
        ({"architecture": None}, "architecture: None given"),
        ({"date": "2025-3-1"}, "date: '2025-3-1' given; must be a day like"),
        ({"license": "mine"}, "license: 'mine' given; must be an SPDX id: Apache-2.0, "),
        ({"resources": []}, "resources: none given; must be at least one file"),
        (resource(type="zip"), "resources: 'zip' of 'pytorch' given; must be pth of pytorch, safetensors of pytorch"),
        (resource(platform="onnx"), "resources: 'pth' of 'onnx' given"),
        (resource(sha256="0"), "resources: pth must have its size in bytes, and its sha256"),
        (resource(size=0), "resources: pth must have its size in bytes"),
        (resource(urls=["a.pth"]), "resources: 'a.pth' given; must be an address"),
        ({"trainingIterations": 0.5}, "trainingIterations: 0.5 given; must be a whole number of at least 1"),
    ],
)
def test_entries_that_cannot_be(change: dict[str, Any], message: str) -> None:
    assert any(problem.startswith(message) for problem in entry_problems("4x-Name", {**ENTRY, **change}))


def test_lists_name_everything_once() -> None:
    assert len(set(LICENCES)) == len(LICENCES) and len(set(TAGS)) == len(TAGS)


def test_names_for_hugging_face() -> None:
    assert [hugging_face_licence(name) for name in ("MIT", "GPL-3.0-only", "AGPL-3.0-or-later")] == [
        "mit",
        "gpl-3.0",
        "agpl-3.0",
    ]
    assert dataset_names("DIV2K + Flickr2K and jane/own") == ["DIV2K", "Flickr2K", "jane/own"]
    assert dataset_names("photographs of my garden") == []
