"""`basicsr benchmark quality`: the scores of `basicsr test`, compared with the paper and with a baseline."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch
from basicsr.archs import build_network
from conftest import NETWORK, Run
from ranks import free_port, of_torchrun, run_ranks

from esc_arch.cli import main
from esc_arch.options import load_yaml
from esc_arch.tools.benchmark.evaluation import SetScores, plan_evaluation
from esc_arch.tools.benchmark.paper import paper_scores
from esc_arch.tools.benchmark.quality import quality_table

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "options").glob("test_ESC*.yml"))


@pytest.fixture
def options(test_options: Any, work_folder: Path) -> Any:
    """A test of a tiny network with weights of its own, on two cuts of a photograph named Set5."""
    test_options["datasets"]["test_1"]["name"] = "Set5"
    test_options["val"]["save_img"] = False
    test_options["path"]["pretrain_network_g"] = save_weights(work_folder / "net.pth", seed=0)
    return test_options


def save_weights(path: Path, seed: int) -> str:
    net = build_network(dict(NETWORK))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    torch.save({"params": net.state_dict()}, path)
    return str(path)


@pytest.fixture
def quality(run_basicsr: Any, capsys: Any) -> Any:
    """Runs the command on option files, and gives its exit status and what it printed."""

    def run(opts: list[Any], *arguments: str) -> Run:
        files = [run_basicsr.option_file(opt) for opt in opts]
        capsys.readouterr()
        status = main(["benchmark", "quality", "-opt", *files, *arguments])
        return Run(status, *capsys.readouterr(), run_basicsr.folder)

    return run


def records(run: Run) -> list[dict[str, Any]]:
    assert run.status == 0, run.err
    return json.loads(run.out)


def logged(log: str, metric: str) -> str:
    (value,) = re.findall(rf"# {metric}: ([\d.]+)", log)
    return value


# --- scores -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("protocol", "model"), [("published", "ESCModel"), ("srmodel", "SRModel")])
def test_scores_are_those_of_basicsr_test(
    protocol: str, model: str, quality: Any, run_basicsr: Any, options: Any
) -> None:
    (record,) = records(quality([options], "--format", "json", "--protocol", protocol))
    log = run_basicsr("test", options | {"name": "expected", "model_type": model}).log("expected", of="results")
    for metric in ("psnr", "ssim"):
        assert f"{record[metric]:.4f}" == logged(log, metric)
    assert (record["network"], record["protocol"], record["dataset"], record["images"]) == (
        "trial", protocol, "Set5", 2
    )  # fmt: skip


def test_protocols_differ_and_the_file_s_own_is_the_default(quality: Any, options: Any) -> None:
    found = {
        protocol: records(quality([options], "--format", "json", "--protocol", protocol))[0]["psnr"]
        for protocol in ("published", "srmodel", "ensemble")
    }
    assert len(set(found.values())) == 3
    assert records(quality([options], "--format", "json"))[0]["psnr"] == found["published"]
    options["val"]["protocol"] = "ensemble"
    (record,) = records(quality([options], "--format", "json"))
    assert (record["protocol"], record["psnr"]) == ("ensemble", found["ensemble"])
    del options["val"]["protocol"]
    (record,) = records(quality([options | {"model_type": "SRModel"}], "--format", "json"))
    assert (record["protocol"], record["psnr"]) == ("srmodel", found["srmodel"])


def test_weights_may_be_given(quality: Any, options: Any, work_folder: Path) -> None:
    other = save_weights(work_folder / "other: 1.pth", seed=1)
    (first,) = records(quality([options], "--format", "json"))
    (second,) = records(quality([options], "--format", "json", "-m", other))
    options["path"]["pretrain_network_g"] = other
    assert records(quality([options], "--format", "json"))[0]["psnr"] == second["psnr"] != first["psnr"]


def test_several_option_files_have_logs_of_their_own(quality: Any, options: Any) -> None:
    others = [options | {"name": name} for name in ("first", "second")]
    run = quality(others, "--format", "json", "--device", "cpu", "--force_yml", "manual_seed=7")
    assert [record["network"] for record in records(run)] == ["first", "second"]
    for name in ("first", "second"):
        assert f"name: {name}" in run.log(name, of="results")
        assert "manual_seed: 7" in run.log(name, of="results")


def test_two_processes_give_the_same_scores(quality: Any, options: Any, work_folder: Path) -> None:
    """To the last digit; sharing among processes is tested more closely in tests/cli/test_two_processes.py."""
    if torch.cuda.is_available():
        pytest.skip("with GPUs the processes would use them")
    others = [options | {"name": name} for name in ("first", "second")]
    expected = records(quality(others, "--format", "json"))
    command = ["benchmark", "quality", "-opt", "first.yml", "second.yml", "--format", "json", "--launcher", "pytorch"]
    first, second = run_ranks(work_folder, command, of_torchrun(free_port()))
    assert first.status == second.status == 0, first.err + second.err
    assert json.loads(first.out) == expected and second.out == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_scores(quality: Any, options: Any) -> None:
    (on_cpu,), (on_gpu,) = (
        records(quality([options], "--format", "json", "--device", device)) for device in ("cpu", "cuda")
    )
    for metric in ("psnr", "ssim"):
        assert on_gpu[metric] == pytest.approx(on_cpu[metric], abs=5e-5)


# --- forms --------------------------------------------------------------------------------------------------------


def test_what_is_printed(quality: Any, options: Any) -> None:
    (expected,) = records(quality([options], "--format", "json"))
    (row,) = csv.DictReader(io.StringIO(quality([options], "--format", "csv").out))
    assert float(row["psnr"]) == expected["psnr"]
    assert quality([options], "--format", "markdown").out.startswith("| network | protocol |")
    text = quality([options], "--baseline", "bicubic", "--paper", "ESC").out
    assert f"{expected['psnr']:.3f}" in text and f"{expected['ssim']:.4f}" in text
    assert "gain over bicubic (dB)" in text


def test_the_folder(quality: Any, options: Any, run_basicsr: Any) -> None:
    pytest.importorskip("matplotlib")
    other = run_basicsr.option_file(options | {"name": "other"})
    run = quality([options], "-o", "out/report", "--baseline", other, "-m", save_weights(Path("1.pth"), seed=1))
    assert run.status == 0, run.err
    folder = run.folder / "out/report"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    tables = {f"{name}.{end}" for name in ("quality", "gains", "per_image") for end in ("txt", "md", "csv", "json")}
    crops = {name for name in names if name.startswith("crops/trial/Set5/most_")}
    assert names == tables | crops | {"gains_trial.png", "psnr_against_multiply_adds_x2.png"}
    assert crops
    for name in names - tables:
        assert cv2.imread(str(folder / name)) is not None
    rows = json.loads((folder / "per_image.json").read_text())
    assert [row["image"] for row in rows] == ["val0x2", "val1x2"]
    (gain,) = json.loads((folder / "gains.json").read_text())
    psnr = {name: per_image(run.folder, name) for name in ("trial", "other")}
    differences = {image: psnr["trial"][image] - psnr["other"][image] for image in psnr["trial"]}
    assert gain["most_gained_db"] == max(differences.values()) == differences[gain["most_gained"]]
    assert gain["least_gained_db"] == min(differences.values()) == differences[gain["least_gained"]]
    assert gain["gain_db"] == pytest.approx(sum(differences.values()) / 2)
    assert gain["better"] == sum(value > 0 for value in differences.values())
    kinds = {"gain" for value in differences.values() if value > 0} | {
        "loss" for value in differences.values() if value < 0
    }
    assert {re.findall("most_(gain|loss)_", name)[0] for name in crops} == kinds

    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run = quality([options], "-o", "out/report")
    assert run.status == 2
    assert "out/report exists, and nothing is overwritten. Choose another folder with -o." in run.err
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_that_cannot_be_written(quality: Any, options: Any, monkeypatch: Any) -> None:
    """Found before the tests, or where the disk is full after them: nothing half stays, and the scores are printed."""
    run = quality([options], "-o", "/proc/report", "--no-figures")
    assert run.status == 2 and not (run.folder / "results").exists()
    assert run.err.startswith("basicsr benchmark: /proc/report cannot be written: ")
    before = {path.name for path in run.folder.iterdir()} | {"results"}

    def full(path: Path, _: bytes) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("esc_arch.tools.benchmark.quality.write_atomically", full)
    run = quality([options], "-o", "report", "--no-figures")
    assert run.status == 2 and "PSNR" in run.out
    assert re.search(r"report cannot be written: .*No space left on device: .*quality\.txt", run.err)
    assert {path.name for path in run.folder.iterdir()} == before


def per_image(folder: Path, name: str) -> dict[str, float]:
    with open(folder / f"results/{name}/visualization/per_image/Set5.csv", encoding="utf-8") as file:
        return {row["image"]: float(row["psnr"]) for row in csv.DictReader(file)}


def test_gains_over_bicubic_are_those_of_the_comparison(quality: Any, options: Any) -> None:
    options["val"]["comparison"] = True
    run = quality([options], "--baseline", "bicubic", "--no-figures", "-o", "report")
    assert run.status == 0, run.err
    (gain,) = json.loads((run.folder / "report/gains.json").read_text())
    lines = re.findall(r"^  (\S+) +bicubic .* (\S+) dB$", run.log(of="results"), re.MULTILINE)
    logged_gains = {name: float(value) for name, value in lines}
    assert gain["gain_db"] == pytest.approx(logged_gains.pop("mean"), abs=0.006)
    assert gain["most_gained"] == max(logged_gains, key=logged_gains.__getitem__)
    assert gain["least_gained_db"] == pytest.approx(min(logged_gains.values()), abs=0.006)
    assert not list((run.folder / "report").rglob("*.png"))


def test_plots_have_measured_latencies(quality: Any, options: Any) -> None:
    pytest.importorskip("matplotlib")
    cost = {"network": "trial", "scale": 2, "output": "1280x720", "latency_ms": 12.5, "memory_mib": 300.0}
    Path("cost.json").write_text(json.dumps([cost, cost | {"scale": 3, "latency_ms": "not measured"}]))
    run = quality([options], "-o", "report", "--cost", "cost.json")
    assert run.status == 0, run.err
    assert [path.name for path in (run.folder / "report").glob("*.png")] == ["psnr_against_latency_x2.png"]


def test_a_network_of_any_scale(quality: Any, options: Any) -> None:
    """Each data set at its own scale, with the border that belongs to it; there is no cost of such a network."""
    pytest.importorskip("matplotlib")
    section = {"type": "ArbitraryScaleDataset", "dataroot_gt": options["datasets"]["test_1"]["dataroot_gt"]}
    options["datasets"] = {
        f"test_{name}": section | {"name": name, "scale": scale}
        for name, scale in (("Set5_x2", 2), ("Set5_x3", 3), ("odd", [2, 2.5]))
    }
    del options["scale"]
    network = {key: value for key, value in NETWORK.items() if key != "upscaling_factor"}
    options |= {"model_type": "ESCLTEModel", "path": {}}
    options["network_g"] = network | {"type": "ESCLTE", "hidden_dim": 8, "mlp_dims": [8]}
    torch.save({"params": build_network(options["network_g"]).state_dict()}, "lte.pth")
    options["path"] = {"pretrain_network_g": "lte.pth"}
    for metric in options["val"]["metrics"].values():
        metric["crop_border"] = "scale"
    run = quality([options], "--format", "json", "--paper", "ESC-LTE", "--baseline", "bicubic", "-o", "report")
    rows = {record["dataset"]: record for record in records(run)}
    assert [(row["scale"], row["psnr_paper"], row["ssim_paper"]) for row in rows.values()] == [
        (2, 38.29, None), (3, 34.79, None), ("2 x 2.5", None, None)
    ]  # fmt: skip
    assert {path.name for path in (run.folder / "report").glob("*.png")} == {"gains_trial.png"}


def test_without_matplotlib(quality: Any, options: Any, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    run = quality([options], "-o", "report")
    assert run.status == 2
    assert 'Plots need matplotlib, which is not installed: pip install "esc-arch[plot]"' in run.err
    assert not (run.folder / "report").exists() and not (run.folder / "results").exists()
    assert quality([options], "-o", "report", "--no-figures").status == 0


# --- the paper ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "dataset", "scale", "expected"),
    [
        ("ESC", "Urban100", 4, {"psnr": 27.07, "ssim": 0.8144}),
        ("ESC-light", "Set5", 2, {"psnr": 38.24, "ssim": 0.9615}),
        ("ESC-DFLIP", "Manga109", 3, {"psnr": 34.94, "ssim": 0.9525}),
        ("ESC-LTE", "B100_x6", 6, {"psnr": 26.00}),
        ("ESC-LTE", "B100", [2, 2], {"psnr": 32.38}),
        ("ESC-LTE", "B100", [2, 3], {}),
        ("ESC", "Set5", 8, {}),
        ("ESC", "DIV2K", 2, {}),
        (None, "Set5", 2, {}),
    ],
)
def test_scores_of_the_paper(row: str | None, dataset: str, scale: Any, expected: dict[str, float]) -> None:
    assert paper_scores(row, dataset, scale) == expected


ROWS = {"ESC": "ESC", "ESC_light": "ESC-light", "ESC_FP": "ESC-FP", "ESC_DFLIP": "ESC-DFLIP", "ESCLTE": "ESC-LTE"}


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_rows_of_the_paper_are_recognised(file: Path, options: Any, photographs: Any, run_basicsr: Any) -> None:
    shipped, network = load_yaml(file), re.sub(r"^test_|_x\d$", "", file.stem)
    kept = {key: shipped[key] for key in ("name", "network_g")} | {"scale": shipped.get("scale", 2)}
    # Data of any scale
    hr_images = {"type": "DownsampleImageDataset", "dataroot_gt": str(photographs.val_gt)}
    options["datasets"] = {"test_1": {"name": "Cuts"} | hr_images}
    options["path"] = {}
    file = Path(run_basicsr.option_file(options | kept))
    assert plan_evaluation(file).paper == ROWS.get(network)
    assert plan_evaluation(file, paper="SwinIR-light").paper == "SwinIR-light"
    assert plan_evaluation(file, paper="none").paper is None


def test_weights_of_dflip_are_recognised(options: Any, work_folder: Path, run_basicsr: Any) -> None:
    shipped = load_yaml(ROOT / "options/test_ESC_x2.yml")
    file = Path(run_basicsr.option_file(options | {"network_g": shipped["network_g"], "path": {}}))
    assert plan_evaluation(file).paper == "ESC"
    weights = work_folder / "ESC_DFLIP_X2.pth"
    torch.save({"params": build_network(dict(shipped["network_g"])).state_dict()}, weights)
    assert plan_evaluation(file, [f"path:pretrain_network_g={weights}"]).paper == "ESC-DFLIP"


def of_paper(file: Path, psnr: float, ssim: float, **metric: Any) -> SetScores:
    """ESC x2 on Set5, with two images of these means."""
    evaluation = plan_evaluation(file, paper="ESC")
    opt = copy.deepcopy(evaluation.opt)
    opt["val"]["metrics"]["psnr"] |= metric
    images = {name: {"psnr": psnr + sign * 2, "ssim": ssim} for name, sign in (("a", 1), ("b", -1))}
    return SetScores(replace(evaluation, opt=opt), opt["datasets"]["test_1"], images)


def test_differences_from_the_paper(options: Any, run_basicsr: Any) -> None:
    file = Path(run_basicsr.option_file(options))
    results = [of_paper(file, 38.36, 0.9619), of_paper(file, 38.33, 0.9619), of_paper(file, 38.35, 0.9617)]
    rows = quality_table(results).records
    assert [row["agrees"] for row in rows] == ["yes", "no", "no"]
    assert [row["psnr_difference"] for row in rows] == pytest.approx([0.01, -0.02, 0])
    assert [row["ssim_difference"] for row in rows] == pytest.approx([0, 0, -0.0002])
    assert {(row["psnr_paper"], row["ssim_paper"], row["paper"]) for row in rows} == {(38.35, 0.9619, "ESC")}


@pytest.mark.parametrize("metric", [{"crop_border": 4}, {"test_y_channel": False}])
def test_other_metrics_are_not_compared_with_the_paper(metric: dict[str, Any], options: Any, run_basicsr: Any) -> None:
    table = quality_table([of_paper(Path(run_basicsr.option_file(options)), 38.35, 0.9619, **metric)])
    (row,) = table.records
    assert "psnr_paper" not in row and "psnr_difference" not in row
    assert (row["ssim_paper"], row["agrees"]) == (0.9619, "yes")
    assert "trial: val:metrics:psnr is not measured as in the paper on Set5, and is not compared." in table.notes


def test_a_network_of_no_paper(quality: Any, options: Any) -> None:
    (record,) = records(quality([options], "--format", "json"))
    assert (record["paper"], record["agrees"], record["psnr_paper"]) == ("no published scores", None, None)


def test_data_are_looked_at_first(quality: Any, options: Any, photographs: Any, work_folder: Path) -> None:
    """LR by another bicubic, the common mistake, in one of the images."""
    lr = shutil.copytree(photographs.val_lq, work_folder / "lq")
    options["datasets"]["test_1"]["dataroot_lq"] = str(lr)
    hr = cv2.imread(str(photographs.val_gt / "val1.png"))
    cv2.imwrite(str(lr / "val1x2.png"), cv2.resize(hr, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_CUBIC))
    run = quality([options], "--paper", "ESC")
    for problem in (
        "Set5 x2: It has 2 HR images instead of 5.",
        "Set5 x2: 1 of 2 LR images compared were not made by MATLAB's bicubic, but by OpenCV's INTER_CUBIC",
    ):
        assert problem in run.out
        assert f"Note: {problem}" in run.err
    assert run.err.index("Note: Set5 x2") < run.err.index("Testing Set5...")
    assert "Set5 x2" not in quality([options]).out  # no scores of the paper to compare with


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["-m", "a.pth", "b.pth"], "-m has 2 file(s) and -opt 1: give one for each option file"),
        ({}, ["-m", "a.pth"], "path:pretrain_network_g: 'a.pth' given, but there is no file"),
        ({"path": {}}, [], "names no weights, and an untrained network says nothing"),
        ({}, ["--baseline", "no.yml"], "option file no.yml does not exist"),
        ({}, ["--baseline", "trial.yml"], "both have the name trial, and would share results/trial"),
        ({}, ["--cost", "no.json"], "--cost no.json cannot be used"),
        ({}, ["--cost", "trial.yml"], "Make it with: basicsr benchmark cost --format json -o trial.yml"),
        (
            {"model_type": "SwinIRModel"},
            [],
            "'SwinIRModel' does not keep the scores of each image. Choose with --protocol",
        ),
        ({"val": {}}, [], "trial.yml: val:metrics is missing; give the metrics to measure"),
        ({"network_g": {"type": "ESK"}}, [], "network_g:type: 'ESK' is not known."),
    ],
)
def test_bad_input(changes: Any, arguments: list[str], message: str, quality: Any, options: Any) -> None:
    run = quality([options | changes], *arguments)
    assert run.status == 2
    assert message in run.err
    assert "Traceback" not in run.err
    assert not (run.folder / "results").exists()
