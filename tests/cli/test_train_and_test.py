"""`basicsr train` and `basicsr test` from option files, on the CPU: what they leave, and that they can be continued."""

from __future__ import annotations

import logging
import os
import re
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import basicsr
import cv2
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from esc_arch import ESC, cli
from esc_arch.models.esc_model import ESCModel


@pytest.fixture
def lmdb_options(train_options: Any, photographs: Any) -> Any:
    """Training and two validation sets from the same LMDBs (fault 13)."""
    lmdbs = {
        "dataroot_gt": str(photographs.gt_lmdb),
        "dataroot_lq": str(photographs.lq_lmdb),
        "io_backend": {"type": "lmdb"},
    }
    sets = train_options["datasets"]
    for section in sets.values():
        del section["filename_tmpl"]
        section |= lmdbs
    sets["val_2"] = sets["val"] | {"name": "Again"}
    return train_options


def new_network(options: Any) -> ESC:
    return ESC(**{key: value for key, value in options["network_g"].items() if key != "type"})


def values(log: str, name: str) -> list[float]:
    """Every value of a metric or loss that a log reports."""
    return [float(value) for value in re.findall(rf"\b{name}: ([\d.]+(?:e[-+]\d+)?)", log)]


def iterations(log: str) -> list[int]:
    """The iterations that a log reports."""
    return [int(value) for value in re.findall(r"\[epoch: *\d+, iter: +(\d+)", log)]


# --- training -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("model_type", "data"),
    [("SRModel", "folders"), ("SwinIRModel", "lmdb"), ("ESCModel", "lmdb"), ("ESRModel", "folders")],
)
def test_training_leaves_checkpoints_states_and_a_log(
    model_type: str, data: str, workers: int, run_basicsr: Any, request: pytest.FixtureRequest
) -> None:
    options = request.getfixturevalue("train_options" if data == "folders" else "lmdb_options")
    options["model_type"] = model_type
    options["datasets"]["train"]["num_worker_per_gpu"] = workers
    run = run_basicsr("train", options)
    assert run.status == 0, run.err

    root = run.experiment()
    assert {path.name for path in (root / "models").iterdir()} == {
        "net_g_2.pth", "net_g_4.pth", "net_g_latest.pth"
    }  # fmt: skip
    assert {path.name for path in (root / "training_states").iterdir()} == {"2.state", "4.state"}
    assert {path.name for path in run.folder.iterdir()} == {"experiments", "trial.yml"}
    assert "name: trial" in (root / "trial.yml").read_text()

    start = run.err.partition("iter:       1,")[0]
    assert len(start.splitlines()) <= 15
    assert "Data: 6 images in batches of 2; validation on " in start
    assert f"in the log: {next(root.glob('*.log'))}" in start
    log = run.log()
    assert f"Model [{model_type if model_type != 'ESRModel' else 'ESCModel'}] is created." in log
    assert iterations(log) == [1, 2, 3, 4]
    assert "-1 day" not in log
    assert "End of training" in log
    assert re.search(r"esc_arch \S+ replaces in basicsr 1\.4\.2:\n\tbasicsr\.", log)
    sets = len(options["datasets"]) - 1
    assert len(values(log, "psnr")) == len(values(log, "ssim")) == 2 * sets
    assert min(values(log, "psnr")) > 10

    for key in ("params", "params_ema"):
        new_network(options).load_state_dict(run.weights("latest", key), strict=True)
    raw, average, early = run.weights(), run.weights(key="params_ema"), run.weights(2)
    assert not torch.equal(raw["proj.weight"], average["proj.weight"])
    assert not torch.equal(raw["proj.weight"], early["proj.weight"])
    assert all(torch.equal(raw[name], tensor) for name, tensor in run.weights(4).items())


def test_training_logs_to_tensorboard(run_basicsr: Any, train_options: Any) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    train_options["logger"]["use_tb_logger"] = True
    run = run_basicsr("train", train_options)
    events = accumulator.EventAccumulator(str(run.folder / "tb_logger" / "trial")).Reload()
    losses = events.Scalars("losses/l_pix")
    assert [event.step for event in losses] == [1, 2, 3, 4]
    assert [event.value for event in losses] == pytest.approx(values(run.log(), "l_pix"), rel=1e-3)
    assert events.Scalars("metrics/Cuts/psnr")[0].value == pytest.approx(values(run.log(), "psnr")[0], abs=1e-4)


def test_training_needs_no_validation_and_no_average(run_basicsr: Any, train_options: Any) -> None:
    del train_options["val"], train_options["datasets"]["val"], train_options["train"]["ema_decay"]
    run = run_basicsr("train", train_options)
    assert run.status == 0, run.err
    content = torch.load(run.experiment() / "models" / "net_g_latest.pth", weights_only=True)
    assert content.keys() == {"params"}
    new_network(train_options).load_state_dict(content["params"], strict=True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_seeded_run_repeats_exactly(workers: int, run_basicsr: Any, train_options: Any) -> None:
    train_options["datasets"]["train"]["num_worker_per_gpu"] = workers
    weights = []
    for name, seed in (("first", 5), ("second", 5), ("third", 6)):
        run = run_basicsr("train", train_options | {"name": name, "manual_seed": seed})
        weights.append(run.weights(name=name))
    first, second, third = weights
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["proj.weight"], third["proj.weight"])


def test_all_iterations_are_done_though_batches_are_incomplete(run_basicsr: Any, train_options: Any) -> None:
    """BasicSR alone ends after 5: it counts 2 iterations for an epoch of 6 images in batches of 4, which has 1."""
    train_options["datasets"]["train"]["batch_size_per_gpu"] = 4
    train_options["train"]["total_iter"] = 8
    assert iterations(run_basicsr("train", train_options).log()) == list(range(1, 9))


@pytest.mark.parametrize("num_gpu", [0, "auto"])
def test_the_number_of_gpus_may_be_left_to_the_machine(num_gpu: Any, run_basicsr: Any, train_options: Any) -> None:
    run = run_basicsr("train", train_options | {"num_gpu": num_gpu})
    assert run.status == 0, run.err
    asked = torch.cuda.device_count() if num_gpu == "auto" else 0
    assert re.search(rf"^ *num_gpu: {asked}$", run.log(), re.MULTILINE)


def test_an_earlier_experiment_of_the_same_name_is_kept(
    run_basicsr: Any, train_options: Any, take_snapshot: Any
) -> None:
    train_options["logger"]["use_tb_logger"] = True
    first = run_basicsr("train", train_options)
    before = {folder: take_snapshot(first.folder / folder / "trial") for folder in ("experiments", "tb_logger")}
    assert run_basicsr("train", train_options).status == 0
    for folder, content in before.items():
        (archived,) = (first.folder / folder).glob("trial_archived_*")
        assert take_snapshot(archived) == content


# --- the command's arguments --------------------------------------------------------------------------------------


def test_debug_changes_the_name_and_validates_every_8_iterations(run_basicsr: Any, train_options: Any) -> None:
    train_options["train"]["total_iter"] = 8
    train_options["val"]["val_freq"] = 1000
    train_options["logger"] = {"print_freq": 1000, "save_checkpoint_freq": 1000, "use_tb_logger": True}
    run = run_basicsr("train", train_options, "--debug")
    assert run.status == 0, run.err
    assert {path.name for path in run.folder.iterdir()} == {"experiments", "trial.yml"}
    assert [path.name for path in run.folder.glob("experiments/[!.]*")] == ["debug_trial"]
    log = run.log("debug_trial")
    assert iterations(log) == list(range(1, 9))
    assert (run.experiment("debug_trial") / "training_states" / "8.state").is_file()
    assert len(values(log, "psnr")) == 1  # that of iteration 8 is the one at the end, too


def test_force_yml_changes_options(run_basicsr: Any, train_options: Any) -> None:
    run = run_basicsr(
        "train", train_options, "--force_yml", "name=other", "train:total_iter=2", "train:optim_g:lr=1e-4",
        "logger:save_checkpoint_freq=1",
    )  # fmt: skip
    assert run.status == 0, run.err
    assert [path.name for path in run.folder.glob("experiments/[!.]*")] == ["other"]
    log = run.log("other")
    assert iterations(log) == [1, 2]
    assert re.findall(r"lr:\(([^,]+),", log) == ["1.000e-04"] * 2
    assert (run.experiment("other") / "models" / "net_g_1.pth").is_file()


def test_training_needs_no_command_line(run_basicsr: Any, train_options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """BasicSR's pipelines read sys.argv; here another program may be the caller."""
    monkeypatch.setattr("sys.argv", ["program", "--of", "another", "kind"])
    assert run_basicsr("train", train_options).status == 0


def test_what_operators_say_stands_in_the_log(
    run_basicsr: Any, train_options: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not know BasicSR, whose log it is."""
    logger, validate = logging.getLogger("esc_arch.ops.cpu"), ESCModel.validation

    def validation(*args: Any) -> None:
        logger.info("a note from below")
        validate(*args)

    monkeypatch.setattr(ESCModel, "validation", validation)
    run = run_basicsr("train", train_options)
    assert run.status == 0, run.err
    assert run.log().count("INFO: a note from below") == 3
    assert not logging.getLogger("esc_arch").handlers and not logger.isEnabledFor(logging.INFO)


def test_the_console_command_is_the_same() -> None:
    commands = [entry for entry in entry_points(group="console_scripts") if entry.value.startswith("esc_arch")]
    if not commands:
        pytest.skip("esc_arch is not installed")
    assert [(command.name, command.load()) for command in commands] == [("basicsr", cli.main)]


def test_a_new_process_writes_where_it_is_run_and_nowhere_else(run_basicsr: Any, train_options: Any) -> None:
    packages = Path(basicsr.__file__).parents[1]

    def installed() -> set[str]:
        return set(os.listdir(packages)) | {str(p) for p in (packages / "basicsr").rglob("*") if p.suffix != ".pyc"}

    before = installed()
    train_options["logger"]["use_tb_logger"] = True
    run = run_basicsr.in_new_process("train", train_options)
    assert run.status == 0, run.err
    assert "Traceback" not in run.err
    assert {path.name for path in run.folder.iterdir()} == {"experiments", "tb_logger", "trial.yml"}
    new_network(train_options).load_state_dict(run.weights(), strict=True)
    assert installed() == before
    pytest.importorskip("matplotlib")
    height, width, _ = cv2.imread(str(run.experiment() / "training.png")).shape
    assert width > height > 500  # of four panels; other tests draw none


# --- going on -----------------------------------------------------------------------------------------------------


def stop_after_2_and_go_on_to_6(run_basicsr: Any, options: Any, **path: str) -> Any:
    """A run of 2 iterations, with its states, and the options that continue it to 6."""
    options["path"] |= path
    options["train"]["total_iter"] = 2
    assert run_basicsr("train", options).status == 0
    options["train"]["total_iter"] = 6


def optimizer_steps(state: Path) -> set[float]:
    content = torch.load(state, weights_only=True)
    return {float(entry["step"]) for entry in content["optimizers"][0]["state"].values()}


@pytest.mark.parametrize("way", ["auto_resume", "resume_state"])
@pytest.mark.parametrize("root", [None, "elsewhere/runs"])
def test_a_run_is_continued_on_the_cpu(
    way: str, root: str | None, run_basicsr: Any, train_options: Any, take_snapshot: Any
) -> None:
    """Faults 6 and 7: from the last state, in its own folder, wherever that is, without archiving it."""
    stop_after_2_and_go_on_to_6(run_basicsr, train_options, **({"experiments_root": root} if root else {}))
    folder = run_basicsr.folder / (root or "experiments")
    saved = take_snapshot(folder / "trial" / "models")
    if way == "resume_state":
        train_options["path"]["resume_state"] = str(folder / "trial" / "training_states" / "2.state")
    run = run_basicsr("train", train_options, *(["--auto_resume"] if way == "auto_resume" else []))
    assert run.status == 0, run.err
    log = run.log(of=root or "experiments")
    assert "Resuming training from epoch: 0, iter: 2." in log
    assert iterations(log) == [3, 4, 5, 6]
    # the scheduler counts on, too: its milestone is at 3
    assert re.findall(r"lr:\(([^,]+),", log) == ["1.000e-03"] + ["5.000e-04"] * 3
    assert optimizer_steps(folder / "trial" / "training_states" / "6.state") == {6.0}
    assert [path.name for path in folder.iterdir() if path.name[0] != "."] == ["trial"]
    now = take_snapshot(folder / "trial" / "models")
    assert now["net_g_2.pth"] == saved["net_g_2.pth"]
    assert now["net_g_latest.pth"] != saved["net_g_latest.pth"]


def test_continuing_begins_with_the_saved_weights(run_basicsr: Any, train_options: Any) -> None:
    """Raw and averaged ones: with a learning rate of 0 nothing moves but the average towards the raw weights."""
    stop_after_2_and_go_on_to_6(run_basicsr, train_options)
    train_options["train"]["total_iter"] = 3
    state = run_basicsr.folder / "experiments" / "trial" / "training_states" / "2.state"
    content = torch.load(state, weights_only=True)
    for group in content["optimizers"][0]["param_groups"]:
        group["lr"] = group["initial_lr"] = 0.0
    torch.save(content, state)
    run = run_basicsr("train", train_options, "--auto_resume")
    raw, average = (run.weights(2, key) for key in ("params", "params_ema"))
    for name, tensor in run.weights().items():
        assert torch.equal(tensor, raw[name])
        expected = average[name].lerp(raw[name], 0.5)
        torch.testing.assert_close(run.weights(key="params_ema")[name], expected)


def test_auto_resume_without_an_earlier_run_begins_one(run_basicsr: Any, train_options: Any) -> None:
    run = run_basicsr("train", train_options, "--auto_resume")
    assert run.status == 0, run.err
    assert iterations(run.log()) == [1, 2, 3, 4]


@pytest.mark.parametrize("damage", ["cut short", "empty", "not a state"])
def test_auto_resume_skips_an_unreadable_state(damage: str, run_basicsr: Any, train_options: Any) -> None:
    """Fault 8: what a kill while saving leaves behind."""
    assert run_basicsr("train", train_options).status == 0
    states = run_basicsr.folder / "experiments" / "trial" / "training_states"
    spoil(states / "4.state", damage)
    train_options["train"]["total_iter"] = 6
    run = run_basicsr("train", train_options, "--auto_resume")
    assert run.status == 0, run.err
    assert iterations(run.log()) == [3, 4, 5, 6]
    assert re.search(r"--auto_resume skips a state: .*4\.state", run.err)


def test_auto_resume_without_any_readable_state_changes_nothing(
    run_basicsr: Any, train_options: Any, take_snapshot: Any
) -> None:
    """Fault 8: starting over would archive the very run that was to go on."""
    assert run_basicsr("train", train_options).status == 0
    for path in (run_basicsr.folder / "experiments" / "trial" / "training_states").iterdir():
        spoil(path, "cut short")
    before = take_snapshot(run_basicsr.folder)
    run = run_basicsr("train", train_options, "--auto_resume")
    assert run.status == 2
    assert "found no usable state" in run.err
    assert "2.state" in run.err
    assert "4.state" in run.err
    assert take_snapshot(run_basicsr.folder) == before


def spoil(state: Path, damage: str) -> None:
    content = state.read_bytes()
    if damage == "not a state":
        torch.save({"params": {"weight": torch.zeros(1)}}, state)
    else:
        state.write_bytes(content[: len(content) // 2] if damage == "cut short" else b"")


# --- testing ------------------------------------------------------------------------------------------------------


def y_of(picture: Path) -> Any:
    """The luma (BT.601) of a picture, without a border of 2 pixels, in float64."""
    blue, green, red = cv2.split(cv2.imread(str(picture)).astype("float64"))
    return (16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255)[2:-2, 2:-2]


@pytest.mark.parametrize("key", ["params", "params_ema"])
def test_testing_measures_what_training_saved(
    key: str, run_basicsr: Any, train_options: Any, test_options: Any, photographs: Any
) -> None:
    run = run_basicsr("train", train_options)
    trained = values(run.log(), "psnr")[-1]
    test_options["path"] = {"pretrain_network_g": "experiments/trial/models/net_g_latest.pth", "param_key_g": key}
    run = run_basicsr("test", test_options)
    assert run.status == 0, run.err
    assert "Best:" not in run.err
    pictures = run.folder / "results" / "trial" / "visualization"
    assert run.err.endswith(f"Results are in {pictures}\n")
    (psnr,) = values(run.log(of="results"), "psnr")
    assert (psnr == trained) == (key == "params_ema")  # training validates the average

    results = sorted((pictures / "Cuts").iterdir())
    assert [path.name for path in results] == ["val0x2_trial.png", "val1x2_trial.png"]
    truths = [photographs.val_gt / "val0.png", photographs.val_gt / "val1.png"]
    measured = [
        peak_signal_noise_ratio(y_of(truth), y_of(result), data_range=255)
        for truth, result in zip(truths, results, strict=True)
    ]
    assert psnr == pytest.approx(sum(measured) / 2, abs=2e-4)
    assert {path.name for path in run.folder.iterdir()} == {"experiments", "results", "trial.yml"}


def test_weights_whose_results_are_no_numbers(run_basicsr: Any, test_options: Any, work_folder: Path) -> None:
    weights = ESC(**{key: value for key, value in test_options["network_g"].items() if key != "type"}).state_dict()
    torch.save({"params": {name: torch.full_like(value, 1e30) for name, value in weights.items()}}, "huge.pth")
    test_options["path"] = {"pretrain_network_g": "huge.pth"}
    run = run_basicsr("test", test_options)
    assert run.status == 2 and "has infinite or NaN pixels: the weights are broken. Use others." in run.err
    assert not list(work_folder.glob("results/trial/visualization/**/*.png"))


def test_a_test_repeated_keeps_the_first_results(run_basicsr: Any, test_options: Any, take_snapshot: Any) -> None:
    run = run_basicsr("test", test_options, "--force_yml", "val:suffix=mine")
    assert (run.folder / "results/trial/visualization/Cuts/val0x2_mine.png").is_file()
    before = take_snapshot(run.folder / "results" / "trial")
    run_basicsr("test", test_options)
    (archived,) = (run.folder / "results").glob("trial_archived_*")
    assert take_snapshot(archived) == before


@pytest.mark.parametrize("model_type", ["ESCModel", "SRModel"])
@pytest.mark.parametrize(
    ("changes", "kept", "tested"),
    [
        ({}, ("params", "params_ema"), "params_ema"),
        ({}, ("params",), "params"),
        ({}, (), None),
        ({"path": {"param_key_g": "params"}}, ("params", "params_ema"), "params"),
        ({"path": {"param_key_g": "params_ema"}}, ("params", "params_ema"), "params_ema"),
        ({"train": {"use_ema": False}}, ("params", "params_ema"), "params"),
        ({"train": {"use_ema": True}}, ("params", "params_ema"), "params_ema"),
    ],
)
def test_what_is_tested_is_what_validation_used(
    model_type: str, changes: Any, kept: Any, tested: str | None, run_basicsr: Any, test_options: Any
) -> None:
    """The averaged weights where there are some, unless the file says otherwise; the log says which."""
    torch.manual_seed(0)
    first, second = new_network(test_options).state_dict(), new_network(test_options).state_dict()
    both = {"params": first, "params_ema": second}
    torch.save({key: both[key] for key in kept} or second, run_basicsr.folder / "net.pth")
    torch.save(both[tested or "params_ema"], run_basicsr.folder / "expected.pth")
    figures = []
    for name, file in (("given", "net.pth"), ("expected", "expected.pth")):
        opt = test_options | {"name": name, "model_type": model_type}
        opt["path"] = {"pretrain_network_g": file} | (changes.get("path", {}) if name == "given" else {})
        if name == "given" and "train" in changes:
            opt["train"] = changes["train"]
        run = run_basicsr("test", opt)
        assert run.status == 0, run.err
        figures.append(values(run.log(name, of="results"), "psnr"))
        if name == "given" and tested:
            assert re.search(rf"(Using|using) '{tested}'", run.log(name, of="results"))
    assert figures[0] == figures[1] != []
