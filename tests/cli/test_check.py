"""`basicsr check`: all that is wrong at once, with its place, and nothing is touched."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from basicsr.archs import build_network

from esc_arch.cli import main
from esc_arch.ops import cpu as operators
from esc_arch.ops.cpu import building


@pytest.fixture
def check(work_folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs the command on options, or on the text of a file, under the name a.yml."""

    def run(options: Any, *arguments: str) -> tuple[int, str, str]:
        text = options if isinstance(options, str) else yaml.safe_dump(options, sort_keys=False)
        Path("a.yml").write_text(text, encoding="utf-8")
        capsys.readouterr()
        status = main(["check", "-opt", "a.yml", *arguments])
        return (status, *capsys.readouterr())

    return run


def parameters(options: Any) -> int:
    return sum(parameter.numel() for parameter in build_network(options["network_g"]).parameters())


def test_a_sound_training(check: Any, train_options: Any, take_snapshot: Any, work_folder: Path) -> None:
    before = take_snapshot(work_folder)
    status, out, err = check(train_options)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "OK  a.yml: datasets:train: 6 pairs, all sizes match scale 2 and gt_size 16",
        "OK  a.yml: datasets:val: 2 pairs, all sizes match scale 2",
        f"OK  a.yml: network_g: ESC can be built, {parameters(train_options):,} parameters",
        "OK  a.yml: ready for basicsr train",
    ]
    assert take_snapshot(work_folder).keys() - before.keys() == {"a.yml"}


def test_a_sound_test(check: Any, test_options: Any) -> None:
    test_options["val"] |= {"my_own": 1}
    status, out, err = check(test_options)
    assert (status, err) == (0, "")
    assert re.search(r"^a\.yml:\d+:3: val:my_own: unknown key; it will be ignored \(warning\)$", out, re.MULTILINE)
    assert out.endswith("OK  a.yml: ready for basicsr test\n")


def test_defaults_unlike_the_published_ones_are_said(check: Any, run_basicsr: Any, train_options: Any) -> None:
    del train_options["network_g"]["exp_ratio"]
    said = "network_g:exp_ratio: not given, so 1.25 is taken; the published code takes 2. Give it"
    status, out, _ = check(train_options)
    assert status == 0
    assert re.search(rf"^a\.yml:\d+:1: {re.escape(said)} .*\(warning\)$", out, re.MULTILINE)
    run = run_basicsr("train", train_options)
    assert run.status == 0
    assert said in run.err and said in run.log()


def test_factors_that_would_stay_zero(check: Any, train_options: Any) -> None:
    train_options["network_g"] |= {"attn_type": "FlashBias"}
    warning = "network_g:attn_type: FlashBias's factors start at zero, where their gradients are zero, too"
    assert warning in check(train_options)[1]
    torch.save(build_network(train_options["network_g"]).state_dict(), "factors.pth")
    train_options["path"]["pretrain_network_g"] = "factors.pth"
    assert warning not in check(train_options)[1]


NO_BACKWARD = "PyTorch's flex attention has no backward pass on the CPU"
RIB = {"type": "ESCRIB", "attn_type": "RIB", "rank": 4, "rib_hidden_dim": 8, "rib_n_freqs": 2}


@pytest.mark.parametrize(
    ("changes", "key", "reason"),
    [
        ({"attn_type": "Flex"}, "attn_type: flex", NO_BACKWARD),
        ({"attn_type": "flex_flash"}, "attn_type: flex_flash", f"{NO_BACKWARD}.*runs on cuda, not on cpu"),
        ({"attn_type": "flash"}, "attn_type: flash", "take biases that are a product of two factors"),
        ({"attn_type": "cpu"}, "attn_type: cpu", r"needs g\+\+ or clang\+\+"),
        ({"attn_type": "FlashBias", "rank": 4, "backend": "flex"}, "backend: flex", NO_BACKWARD),
        ({**RIB, "backend": "Flex"}, "backend: flex", NO_BACKWARD),
        ({**RIB, "backend": "triton"}, "backend: triton", "its kernels read a table of biases, not factors"),
    ],
)
def test_a_backend_that_cannot_train(
    changes: Any, key: str, reason: str, check: Any, train_options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(building, "find_compiler", lambda: None)
    monkeypatch.setattr(operators._State, "reasons", None)
    train_options["network_g"] |= changes
    status, _, err = check(train_options)
    assert status == 2
    line = (
        rf"a\.yml:\d+:3: network_g:{key} given, which cannot train here: .*{reason}.*\. Give auto to have one chosen$"
    )
    assert re.search(line, err, re.MULTILINE)
    assert err.endswith("1 problem(s)\n")
    assert check(train_options, "--no-data")[0] == 0  # another machine may have what it takes
    train_options["network_g"]["backend" if "backend" in key else "attn_type"] = "auto"
    assert check(train_options)[0] == 0


def test_a_backend_that_can(check: Any, train_options: Any, test_options: Any, native: Any) -> None:
    """Flex attention has no gradients on the CPU, and none are wanted in a test or of frozen layers."""
    for backend in ("naive", "SDPA", "cpu"):
        train_options["network_g"]["attn_type"] = backend
        assert check(train_options)[0] == 0, backend
    test_options["network_g"]["attn_type"] = "Flex"
    assert check(test_options)[0] == 0
    train_options["network_g"]["attn_type"] = "Flex"
    train_options["train"]["freeze"] = ["blocks.*", "proj.*"]
    assert check(train_options)[0] == 0


def test_a_backend_on_a_gpu(check: Any, train_options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a GPU's backends are the device and the type of the features, for which none is touched."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    train_options["num_gpu"] = "auto"
    train_options["network_g"] |= {"attn_type": "FlashBias", "rank": 4, "backend": "flash"}
    assert check(train_options)[0] == 0
    train_options["train"]["amp"] = "fp16"
    status, _, err = check(train_options)
    assert status == 2
    assert "flash kernels need a GPU of compute capability 8.0 or newer, not 7.5" in err
    train_options["network_g"]["backend"] = "cpu"
    assert "it runs on cpu, not on cuda" in check(train_options)[2]


def test_for_what(check: Any, train_options: Any, test_options: Any) -> None:
    status, _, err = check(train_options, "--for", "test")
    assert status == 2 and "datasets:train: a training set cannot be tested" in err
    status, _, err = check(test_options, "--for", "train")
    assert status == 2 and "train: missing; training needs this section" in err


TEXT = """\
name: no
model_type: ESCModel
scale: 4
datasets:
  train: {type: PairedImageDataset, dataroot_gt: nowhere, gt_size: 15, batch_size_per_gpu: 0, use_hflips: true}
network_g:
  type: ESC
  upscaling_factor: 2
train:
  total_iters: 5
  optim_g: {type: Adam}
  scheduler: {type: MultiStepLR, milestones: [3]}
  pixel_opt:
    type: L1Los
val:
  save_img: 'false'
  metrics:
    psnr: {type: calculate_psnr}
"""


def test_all_mistakes_with_their_places(check: Any) -> None:
    status, out, err = check(TEXT, "--force_yml", "manual_seed=-1", "train:ema_decya=0.9")
    assert status == 2 and "OK" not in out
    lines = err.splitlines()
    assert lines[-1] == "a.yml: 15 problem(s)" and len(lines) == 16
    places = {tuple(line.split(": ", 2)[:2]) for line in lines[:-1]}
    column = {
        key: TEXT.splitlines()[4].index(key) + 1 for key in ("dataroot_gt", "gt_size", "batch_size", "use_hflips")
    }
    assert places == {
        ("a.yml:1:1", "name"),
        ("a.yml:5:3", "datasets:train:dataroot_lq"),
        (f"a.yml:5:{column['dataroot_gt']}", "datasets:train:dataroot_gt"),
        (f"a.yml:5:{column['gt_size']}", "datasets:train:gt_size"),
        (f"a.yml:5:{column['batch_size']}", "datasets:train:batch_size_per_gpu"),
        (f"a.yml:5:{column['use_hflips']}", "datasets:train:use_hflips"),
        ("a.yml:8:3", "network_g:upscaling_factor"),
        ("a.yml:9:1", "train:total_iter"),
        ("a.yml:10:3", "train:total_iters"),
        ("a.yml:11:3", "train:optim_g:lr"),
        ("a.yml:14:5", "train:pixel_opt:type"),
        ("a.yml:16:3", "val:save_img"),
        ("a.yml:18:5", "val:metrics:psnr:crop_border"),
        ("--force_yml manual_seed=-1", "manual_seed"),
        ("--force_yml train:ema_decya=0.9", "train:ema_decya"),
    }


def test_words_that_yaml_takes_for_something_else(check: Any) -> None:
    _, _, err = check(TEXT)
    assert err.splitlines()[0] == (
        "a.yml:1:1: name: False given; must be a folder's name without / or control characters, 200 bytes at "
        "most, quoted if it is a number. YAML reads no as false: write 'no', in quotes, if it is text"
    )


def test_an_infinite_learning_rate(check: Any, train_options: Any) -> None:
    train_options["train"]["optim_g"]["lr"] = float("inf")
    assert "train:optim_g:lr: inf given; must be a finite number" in check(train_options)[2]


def test_odd_numbers_are_told(check: Any, train_options: Any) -> None:
    train_options["manual_seed"] = "SEED"
    text = yaml.safe_dump(train_options, sort_keys=False)
    status, out, _ = check(text.replace("SEED", "0123"))
    line = text[: text.index("SEED")].count("\n") + 1
    assert status == 0
    assert (
        f"a.yml:{line}:1: manual_seed: YAML reads 0123 as 83: write '0123', in quotes, if it is text (warning)" in out
    )


def test_keys_that_are_given_twice_are_told(check: Any, train_options: Any) -> None:
    text = yaml.safe_dump(train_options, sort_keys=False)
    first = text[: text.index("manual_seed:")].count("\n") + 1
    lines = text.count("\n")
    status, out, err = check(f"{text}manual_seed: 7\n", "--json")
    (result,) = json.loads(out)["files"]
    assert (status, err) == (0, "")
    assert result["warnings"] == [
        {
            "line": lines + 1,
            "column": 1,
            "force_yml": None,
            "key": "manual_seed",
            "message": f"is also given in line {first}; the last one counts",
        }
    ]


def test_json(check: Any, train_options: Any) -> None:
    train_options["train"]["total_iter"] = 0
    train_options["my_own"] = 1
    status, out, err = check(train_options, "--json", "--force_yml", "val:save_img=maybe")
    (result,) = json.loads(out)["files"]
    lines = Path("a.yml").read_text().splitlines()
    assert (status, err, result["file"], result["for"], result["ok"]) == (2, "", "a.yml", "train", False)
    forced, total = sorted(result["errors"], key=lambda error: error["key"], reverse=True)
    assert total == {
        "line": lines.index("  total_iter: 0") + 1,
        "column": 3,
        "force_yml": None,
        "key": "train:total_iter",
        "message": "0 given; must be a whole number from 1 to 1000000000, such as 500000",
    }
    assert (forced["line"], forced["force_yml"], forced["key"]) == (None, "val:save_img=maybe", "val:save_img")
    (warning,) = result["warnings"]
    assert (warning["key"], warning["line"]) == ("my_own", lines.index("my_own: 1") + 1)
    assert result["checked"][0].startswith("datasets:train: 6 pairs")


def test_json_of_a_file_that_is_no_yaml(check: Any) -> None:
    status, out, _ = check("a: 1\nb: [1\nc: 2\n", "--json")
    (result,) = json.loads(out)["files"]
    (error,) = result["errors"]
    assert status == 2 and result["for"] is None and not result["ok"]
    assert (error["line"], error["column"], error["key"]) == (3, 2, "")
    assert error["message"].startswith("option file a.yml:3:2: ")


def test_several_files(check: Any, train_options: Any, capsys: pytest.CaptureFixture[str]) -> None:
    check(train_options)
    Path("b.yml").write_text("name: x\n")
    assert main(["check", "-opt", "a.yml", "none.yml", "b.yml"]) == 2
    out, err = capsys.readouterr()
    assert "OK  a.yml: ready for basicsr train" in out
    assert "option file none.yml does not exist" in err and "none.yml: 1 problem(s)" in err
    assert "b.yml:1:1: datasets: None given" in err


def test_without_data(check: Any, train_options: Any) -> None:
    for dataset in train_options["datasets"].values():
        dataset |= {"dataroot_gt": "nowhere", "dataroot_lq": "nowhere"}
    train_options["path"]["pretrain_network_g"] = "nowhere.pth"
    train_options["num_gpu"] = 64
    status, out, err = check(train_options, "--no-data")
    assert (status, err) == (0, "")
    assert out.splitlines()[0].startswith("OK  a.yml: network_g: ESC can be built")
    assert check(train_options)[0] == 2


def test_states_of_an_earlier_run_that_cannot_be_read(check: Any, train_options: Any, work_folder: Path) -> None:
    states = work_folder / "experiments" / train_options["name"] / "training_states"
    states.parent.mkdir(parents=True)
    states.touch()  # a file, or a folder without permission, which root would not meet
    status, _, err = check(train_options, "--auto_resume")
    assert status == 2 and re.search(r"path:training_states: .*training_states cannot be written", err)


def test_weights(check: Any, train_options: Any) -> None:
    net = build_network(train_options["network_g"])
    torch.save({"params": net.state_dict()}, "fits.pth")
    train_options["path"]["pretrain_network_g"] = "fits.pth"
    assert "OK  a.yml: path:pretrain_network_g: fits.pth (params) fits network_g" in check(train_options)[1]
    train_options["network_g"]["dim"] = 12
    status, _, err = check(train_options)
    assert status == 2 and re.search(r"^a\.yml:\d+:3: path:pretrain_network_g: fits\.pth does not fit ESC", err, re.M)
    train_options["path"]["strict_load_g"] = False
    assert check(train_options)[0] == 0


def test_networks_that_only_memory_tells(check: Any, train_options: Any) -> None:
    """Another package's constructor is asked with memory for weights, which the checks before a run do not do."""
    train_options["model_type"] = "SwinIRModel"
    train_options["network_g"] = {"type": "SwinIR", "upscale": 2, "depths": [1], "embed_dim": 8, "num_heads": [2]}
    train_options["network_g"] |= {"window_size": 8, "img_size": 8}
    status, out, _ = check(train_options)
    assert status == 0 and re.search(r"network_g: SwinIR can be built, \d", out)
    train_options["network_g"]["num_heads"] = []
    status, _, err = check(train_options)
    assert status == 2 and "network_g: SwinIR cannot be built: IndexError: list index out of range" in err


def test_unknown_sections_that_are_forced(check: Any, train_options: Any) -> None:
    status, _, err = check(train_options, "--force_yml", "trian:ema_decay=0.9", "datasets:vall:type=PairedImageDataset")
    assert status == 2
    assert "--force_yml trian:ema_decay=0.9: trian: unknown key. Did you mean" in err
    assert "--force_yml datasets:vall:type=PairedImageDataset: datasets:vall: not known when training" in err


def test_train_and_test_say_the_same(run_basicsr: Any, train_options: Any, test_options: Any) -> None:
    train_options["val"]["save_imgs"] = True
    run = run_basicsr("train", train_options)
    assert run.status == 2
    line = (run.folder / "trial.yml").read_text().splitlines().index("  save_imgs: true") + 1
    assert run.err == (
        "basicsr train: trial.yml: 1 problem(s):\n"
        f"trial.yml:{line}:3: val:save_imgs: unknown key. Did you mean 'save_img'?\n"
    )
    run = run_basicsr("test", test_options, "--force_yml", "scael=2", "my_own=1")
    assert run.status == 2
    assert "Note: --force_yml my_own=1: my_own: unknown key; it will be ignored.\n" in run.err
    assert "\n--force_yml scael=2: scael: unknown key. Did you mean 'scale'?" in run.err


def test_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"].startswith("Option file")


def test_what_a_short_training_does_not_get_to(check: Any, train_options: Any) -> None:
    train_options["train"] |= {"ema_decay": 0.999, "warmup_iter": 5}
    status, out, _ = check(train_options)
    assert status == 0
    assert "train:warmup_iter: 5 given, more than total_iter 4: the learning rate does not get to lr" in out
    assert "train:ema_decay: 0.999 given: after total_iter 4 the average still has 100% of the weights before" in out
    train_options["train"] |= {"ema_decay": 0.999, "total_iter": 5000}
    assert "(warning)" not in check(train_options)[1]


def test_missing_data_are_one_block_with_the_commands_that_make_them(
    work_folder: Path, train_options: Any, run_basicsr: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    sections, val = train_options["datasets"], train_options["datasets"].pop("val")
    for kind, name in (("HR", "gt"), ("LR_bicubic_X2", "lq")):
        sections["train"][f"dataroot_{name}"] = f"data/my sets/DIV2K_{kind}_sub.lmdb"
    sections["train"]["io_backend"] = {"type": "lmdb"}
    for name in ("Set5", "B100"):
        roots = {"dataroot_gt": f"data/{name}/HR", "dataroot_lq": f"data/{name}/LR_bicubic/X2"}
        sections[f"val_{name}"] = val | roots | {"name": name}
    train_options["train"]["total_itr"] = 1
    run = run_basicsr("train", train_options)
    first, other, *block = run.err.splitlines()
    assert first == "basicsr train: trial.yml: 7 problem(s):"
    assert "train:total_itr: unknown key" in other
    assert block == [
        f"Missing: 6 folders or LMDBs of images, the first is {work_folder}/data/my sets/DIV2K_HR_sub.lmdb. Make them, "
        "FOLDER being where your HR images are:",
        "  basicsr prepare train -i FOLDER -o 'data/my sets' --name DIV2K",
        "  for NAME in Set5 B100; do basicsr prepare benchmark -i FOLDER/$NAME -o data/$NAME; done",
        "or remove their sections of the option file. basicsr check --no-data checks the rest of it.",
    ]
    assert main(["check", "trial.yml", "--opt", "trial.yml"]) == 2
    assert capsys.readouterr().err.splitlines()[-4:] == block  # once for both
    sections["train"]["dataroot_gt"] = "datasets/demo/train_HR_sub.lmdb"
    assert "  basicsr prepare demo\n" in run_basicsr("check", train_options).err


def test_mistakes_show_the_usage_of_the_verb(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "a.yml", "--no-dta"])
    assert re.match(r"usage: basicsr check (.|\n)*: unrecognized arguments: --no-dta\n", capsys.readouterr().err)


def test_it_needs_something_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 2
    assert "name option files, as in basicsr check options/train_ESC_x2.yml" in capsys.readouterr().err
