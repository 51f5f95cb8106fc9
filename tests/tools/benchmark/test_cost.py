"""`basicsr benchmark cost`: the paper's numbers, the generated document, networks by name, and mistakes."""

from __future__ import annotations

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from basicsr.archs.swinir_arch import SwinTransformerBlock

import esc_arch
from esc_arch.cli import main
from esc_arch.tools.benchmark import cost
from esc_arch.tools.benchmark.cost import network_cost
from esc_arch.tools.benchmark.counting import Operations, count_operations
from esc_arch.tools.benchmark.latency import LatencyProtocol
from esc_arch.tools.benchmark.networks import PRESETS, from_option_file, named
from esc_arch.tools.benchmark.paper import paper_cost, paper_scores

Record = dict[str, Any]

ROOT = Path(esc_arch.__file__).parents[1]
DOCUMENT = ROOT / "docs" / "costs.md"
TINY = "dim: 8, pdim: 4, kernel_size: 5, n_blocks: 1, conv_blocks: 1, window_size: 4, num_heads: 2"


def run_cost(capsys: pytest.CaptureFixture[str], *arguments: str, refused: bool = False) -> str:
    """What is printed; a refusal is one line, and prints nothing else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["basicsr", "benchmark", "cost", *arguments])
        status = main()
    printed = capsys.readouterr()
    assert status == (2 if refused else 0), printed.err
    if not refused:
        return printed.out
    assert printed.out == ""
    assert printed.err.startswith("basicsr benchmark: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_the_document_is_what_its_command_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the numbers in it are the paper's."""
    costs: list[Record] = []

    def noting(*args: Any) -> Record:
        costs.append(network_cost(*args))
        return costs[-1]

    mask_of = SwinTransformerBlock.calculate_mask

    def mask_without_data(*args: Any) -> torch.Tensor:
        """It takes seconds for large images, and no count depends on what is in it."""
        with torch.device("meta"):
            return mask_of(*args)

    monkeypatch.setattr(SwinTransformerBlock, "calculate_mask", mask_without_data)
    document = DOCUMENT.read_text(encoding="utf-8")
    written = re.search("^Made by `(.*)`", document, re.MULTILINE)
    assert written is not None
    monkeypatch.chdir(tmp_path)
    Path("docs").mkdir()
    monkeypatch.setattr(cost, "network_cost", noting)
    monkeypatch.setattr("sys.argv", shlex.split(written[1]))
    assert main() == 0
    assert Path("docs/costs.md").read_text(encoding="utf-8") == document
    compared = [record for record in costs if "paper_g" in record]
    for record in compared:
        thousands, paper = record["parameters"] / 1000, record["paper_g"]
        assert record["paper_parameters_k"] in (int(thousands), round(thousands)), record
        assert record["paper_convention_g"] == pytest.approx(paper, rel=1e-3), record
        if record["network"].startswith("ESC"):
            assert round(record["paper_convention_g"], 1) == paper, record
            assert 0.985 * paper < record["multiply_adds_g"] < paper, record
    networks = ("ESC", "ESC-light", "ESC-FP", "SwinIR-light")
    names = {(record["network"], record["scale"]) for record in compared}
    assert names == {(name, scale) for name in networks for scale in (2, 3, 4)}


def test_the_readme_has_numbers_of_the_document() -> None:
    """Networks at x4: parameters, multiply-adds, and the paper's PSNR of those that have one."""
    costs = {
        cells[1]: (cells[5], f"{cells[8]} G")
        for cells in (re.split(r" *\| *", line) for line in DOCUMENT.read_text(encoding="utf-8").splitlines())
        if cells[2:4] == ["4", "1280x720"]
    }
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [re.split(r" *\| *", line) for line in readme.splitlines() if re.match(r"\| ESC[^|]*\| `", line)]
    assert len(rows) == 9
    for _, name, _, *numbers, set5, urban100, _, _ in rows:
        network = name.partition(",")[0]
        assert tuple(numbers) == costs[network]
        table = "ESC-DFLIP" if "DFLIP" in name else network
        for dataset, text in (("Set5", set5), ("Urban100", urban100)):
            score = paper_scores(table, dataset, 4).get("psnr") if text else None
            assert text == ("" if score is None else f"{score:.2f} dB")


def test_paper_tables() -> None:
    assert paper_scores("ESC", "Set5", 2)["psnr"] == 38.35
    esc = paper_cost("ESC", 2)
    assert [esc[key] for key in ("params_k", "flops_g", "latency_ms", "memory_mb")] == [947, 592.0, 120.9, 831]
    for nothing in (("ESC", 2, (1920, 1080)), ("ESC", 2.5), ("ESC-XL", 2), (None, 2)):
        assert paper_cost(*nothing) == {}


PUBLISHED = {
    "ESC": "ESC",
    "ESC_DFLIP": "ESC",
    "ESC_light": "ESC-light",
    "ESC_FP": "ESC-FP",
    "ESC_XL": "ESC-XL",
    "ESC_RIB": "ESC-RIB",
    "ESC_FlashBias": "ESC-FlashBias",
    "ESC_Real": "ESC-Real",
    "ESCLTE": "ESC-LTE",
}
SHIPPED = sorted(path for path in (ROOT / "options").glob("*.yml") if "demo" not in path.name)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_network_is_a_preset(path: Path) -> None:
    network = from_option_file(path)
    parts = re.fullmatch(r"(?:train|test|finetune)_(.+?)(?:_x(\d))?(?:_gan|_mse)?", path.stem)
    assert parts is not None
    assert network.published == PUBLISHED[parts[1]]
    assert network.scale == int(parts[2] or 4)
    (preset,) = named(network.published, [int(network.scale)])
    assert repr(preset.build().state_dict().keys()) == repr(network.build().state_dict().keys())


def test_no_preset_is_missing_from_the_option_files() -> None:
    theirs = {"SwinIR-light", "EDSR-baseline", "RRDBNet"}
    assert PRESETS.keys() == {*PUBLISHED.values(), *theirs}


def test_networks_that_are_not_published() -> None:
    assert from_option_file(ROOT / "options" / "train_ESC_x2_demo.yml").published is None
    assert named("ESC: {upscaling_factor: 2, window_size: 48}", [2])[0].published is None
    assert named("ESC: {upscaling_factor: 2, attn_type: Naive}", [2])[0].published == "ESC"


def test_scales_of_networks() -> None:
    def scales(text: str) -> list[float]:
        return [network.scale for network in named(text, [2, 3, 4])]

    assert scales("ESC") == [2, 3, 4]
    assert scales("ESC-Real") == [4]
    assert scales("MSRResNet") == [2, 3, 4]
    assert scales("MSRResNet: {upscale: 2}") == [2]
    assert scales("RIDNet: {in_channels: 3, mid_channels: 4, out_channels: 3}") == [1]


def test_sizes_that_networks_are_run_on(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def noting(*args: Any) -> Operations:
        operations = count_operations(*args)
        sizes.append((args[1:], operations.output))
        return operations

    monkeypatch.setattr(cost, "count_operations", noting)
    (swinir,), (esc,) = named("SwinIR-light", [4]), named(f"ESC: {{{TINY}, upscaling_factor: 3}}", [])
    assert network_cost(swinir, (40, 72))["input"] == "10x18"
    assert network_cost(esc, (50, 31))["input"] == "16x10"
    assert sizes == [((24, 16), (1, 3, 96, 64)), ((10, 16), (1, 3, 30, 48))]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run_cost(
        capsys,
        *("--networks", f"ESC: {{{TINY}}}", "--scales", "8", "--output", "64x48", "hd", "--device", "cpu"),
        *("--runs", "4", "--warmup", "0", "--precision", "bf16", "--backend", "Naive", "--format", "json"),
    )
    small, large = json.loads(printed)
    parameters = sum(p.numel() for p in named(f"ESC: {{{TINY}, upscaling_factor: 8}}", [])[0].build().parameters())
    assert small["parameters"] == large["parameters"] == parameters
    assert (small["network"], small["scale"], small["output"], small["input"]) == ("ESC", 8, "64x48", "8x6")
    assert (large["output"], large["input"]) == ("1280x720", "160x90")
    assert 0 < small["multiply_adds_g"] < small["paper_convention_g"] < large["multiply_adds_g"]
    assert small["latency_ms"] > 0
    assert (small["precision"], small["backend"]) == ("bf16", "naive")
    assert small["device"].startswith("CPU, ")
    assert small["paper_g"] is None


def test_latency_is_compared_with_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counting is tested elsewhere."""
    counted = Operations(0, 0, 0, (1, 3, 720, 1280))
    monkeypatch.setattr(cost, "count_operations", lambda *_: counted)
    (network,), protocol = named("ESC", [2]), LatencyProtocol("cpu")
    monkeypatch.setattr(cost, "measure_latency", lambda *_: {"latency_ms": 60.45, "memory_mib": 1662.0})
    esc = network_cost(network, protocol=protocol)
    assert (esc["latency_ms"], esc["paper_latency_ms"]) == (60.45, 120.9)
    assert (esc["memory_mib"], esc["paper_memory_mb"]) == (1662.0, 831)
    monkeypatch.setattr(cost, "measure_latency", lambda *_: {"latency_ms": "out of memory"})
    esc = network_cost(network, protocol=protocol)
    assert (esc["latency_ms"], esc.get("memory_mib"), esc["precision"]) == ("out of memory", None, "fp32")


def test_latency_is_left_to_gpus(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    arguments = ("--networks", f"ESC: {{{TINY}, upscaling_factor: 2}}", "--output", "16x16")
    printed = run_cost(capsys, *arguments)
    assert "not measured" in printed.splitlines()[2]
    assert "Latency: not measured, because there is no CUDA device; --device cpu measures it on the CPU." in printed
    assert "atency" not in run_cost(capsys, *arguments, "--no-latency")


def test_notes_say_how_latency_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--networks", f"ESC: {{{TINY}, upscaling_factor: 2}}", "--output", "16x16", "--device", "cpu")
    printed = run_cost(capsys, *arguments, "--runs", "3", "--warmup", "1", "--format", "markdown")
    assert "of one image, after 2 untimed runs: median and interquartile range of 3 runs, each waited for" in printed
    assert f"PyTorch {torch.__version__}" in printed
    assert "fp32: float32, without TF32." in printed
    command = f"basicsr benchmark cost --networks 'ESC: {{{TINY}, upscaling_factor: 2}}' --output 16x16 --device cpu"
    assert f"Made by `{command} --runs 3 --warmup 1 --format markdown`" in printed


def test_option_files(capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(ROOT / "options" / f"test_ESC_{name}.yml") for name in ("x4", "DFLIP_x4")]
    rows = list(csv.DictReader(run_cost(capsys, "-opt", *files, "--no-latency", "--format", "csv").splitlines()))
    assert [row["network"] for row in rows] == ["test_ESC_x4", "test_ESC_DFLIP_x4"]
    assert {row["paper_g"] for row in rows} == {"149.2"}


def test_every_kind_of_sr_network_of_basicsr(capsys: pytest.CaptureFixture[str]) -> None:
    names = [
        "MSRResNet",
        "SRVGGNetCompact: {num_feat: 8, num_conv: 2, upscale: 2}",
        "SwinIR: {upscale: 2, img_size: 14, depths: [2], num_heads: [6], upsampler: pixelshuffledirect}",
        "RCAN: {num_in_ch: 3, num_out_ch: 3, num_group: 1, num_block: 1, upscale: 2}",
    ]
    printed = run_cost(
        capsys, "--networks", *names, "--scales", "2", "--output", "56x56", "--no-latency", "--format", "csv"
    )
    rows = list(csv.DictReader(printed.splitlines()))  # BasicSR's registry would print about a name's suffix
    assert [row["network"] for row in rows] == ["MSRResNet", "SRVGGNetCompact", "SwinIR", "RCAN"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--networks", "ESCX"], "--networks: there is no 'ESCX'. Did you mean 'ESC'? Allowed: "),
        (["--networks", "EDSR"], "--networks:num_in_ch: missing; EDSR needs it; --networks:num_out_ch: missing"),
        (["--networks", "ESC: {dimm: 8}"], "--networks:dimm: ESC has no such argument. Did you mean 'dim'?"),
        (["--networks", "ESC: 3"], "--networks 'ESC: 3' is invalid. Give a name, or a type with its options"),
        (["--networks", "ESC: {dim: 10}"], "ESC x2 cannot be built: ValueError: num_heads is 4; it must divide dim"),
        (["--networks", "ESC: {upscaling_factor: no}"], "ESC: the scale is False; it must be a number above 0."),
        (["--scales", "2", "0"], "--scales 0: a scale is an integer of at least 1."),
        (["--output", "8K"], "--output 8K is invalid. Give HD, FHD, 4K, or width x height, as in 1280x720."),
        (["--output", "0x720"], "--output 0x720 is invalid."),
        (
            ["--networks", "ESC", "--output", "3x1", "--scales", "2"],
            "--output 3x1 is too small for x2: the input would be empty.",
        ),
        (
            ["--networks", "MSRResNet: {num_in_ch: 1, num_feat: 8, upscale: 4}", "--output", "8x8"],
            "Cannot count the operations of MSRResNet x4 for an RGB image of 2 x 2: ",
        ),
        (
            ["--networks", "RRDBNet: {num_in_ch: 3, num_out_ch: 3, num_block: 1, scale: 3}", "--output", "9x9"],
            "RRDBNet x3 makes (1, 3, 12, 12) of (1, 3, 3, 3), not (1, 3, 9, 9). Only networks for",
        ),
        (["-opt", "nowhere.yml"], "option file nowhere.yml does not exist"),
        (["-o", "nowhere/costs.md"], "Cannot write nowhere/costs.md: it must be a file in an existing folder."),
        (["--backend", "fast", "--device", "cpu"], "--backend fast: attn_type 'fast' is not known; allowed: auto, "),
    ],
)
def test_refusals(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in run_cost(capsys, *arguments, refused=True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x", "network_g: None given; must be a mapping with type and its arguments"),
        ("network_g: {dim: 8}", "network_g:type: missing. Allowed: "),
        ("network_g: {type: ESV}", "network_g:type: 'ESV' is not known. Did you mean 'ESC'?"),
    ],
)
def test_refused_option_files(text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yml"
    path.write_text(text, encoding="utf-8")
    printed = run_cost(capsys, "-opt", str(path), refused=True)
    assert f"option file {path}, {message}" in printed
