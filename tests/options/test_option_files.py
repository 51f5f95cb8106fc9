"""Reading, forcing, completing and checking options, up to what BasicSR's pipelines are given."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from basicsr.models.sr_model import SRModel
from basicsr.utils.registry import MODEL_REGISTRY
from PIL import Image

import esc_arch  # noqa: F401  makes basicsr importable
from esc_arch import options
from esc_arch.cli.arguments import add_arguments
from esc_arch.errors import UserError
from esc_arch.options import apply_force_yml, load_yaml, parse_options
from esc_arch.training import distributed
from esc_arch.training.distributed import resolve_launcher

TRAIN_FILE = """
name: trial
model_type: SRModel
scale: 2
datasets:
  train: {type: PairedImageDataset, dataroot_gt: gt, dataroot_lq: lq, gt_size: 16, batch_size_per_gpu: 1}
  val: {name: Set1, type: PairedImageDataset, dataroot_gt: gt, dataroot_lq: lq}
network_g: {type: EDSR, num_in_ch: 3, num_out_ch: 3, num_feat: 4, num_block: 1, upscale: 2}
train:
  total_iter: !!float 1e2
  optim_g: {type: AdamW, lr: 5e-4, betas: [0.9, 0.99]}
  scheduler: {type: MultiStepLR, milestones: [50], gamma: 0.5}
  pixel_opt: {type: L1Loss}
"""
TEST_FILE = """
name: trial
model_type: SRModel
scale: 2
datasets:
  test_1: {type: PairedImageDataset, dataroot_gt: gt, dataroot_lq: lq}
network_g: {type: EDSR, num_in_ch: 3, num_out_ch: 3, num_feat: 4, num_block: 1, upscale: 2}
"""
TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with two pairs of images and without CUDA or a launcher's variables."""
    for name, side in (("gt", 32), ("lq", 16)):
        (tmp_path / name).mkdir()
        for image in ("a.png", "b.png"):
            Image.new("RGB", (side, side)).save(tmp_path / name / image)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for variable in (*TORCHRUN, "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser, "train")
    return parser.parse_args(flags)


def parse(text: str, *flags: str, is_train: bool = True) -> dict[str, Any]:
    Path("options.yml").write_text(text, encoding="utf-8")
    return parse_options(os.getcwd(), is_train, arguments("-opt", "options.yml", *flags))[0]


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-4", 5e-4),
        ("1E+3", 1000.0),
        ("1.5e3", 1500.0),
        ("-.5e2", -50.0),
        ("!!float 5e-4", 5e-4),
        ("!!float 3", 3.0),
        ("12", 12),
        ("e4", "e4"),
        ("4x", "4x"),
        ("'5e-4'", "5e-4"),
        ("[1e-4, 2]", [1e-4, 2]),
        ("~", None),
    ],
)
def test_values(text: str, value: Any) -> None:
    read = load_yaml(f"key: {text}\n")["key"]
    assert read == value and type(read) is type(value)


def test_files_are_utf8_with_or_without_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "a.yml"
    for mark in ("\ufeff", ""):
        file.write_bytes(f"{mark}name: été  # 超解像\r\n".encode())
        assert load_yaml(file) == {"name": "été"}


@pytest.mark.parametrize(
    "tag",
    ["!!python/object/apply:os.system ['touch {mark}']", "!!python/name:os.system", "!!python/tuple [1]", "!own 1"],
)
def test_tags_are_refused_and_run_nothing(tmp_path: Path, tag: str) -> None:
    mark, file = tmp_path / "mark", tmp_path / "a.yml"
    file.write_text(f"name: x\nkey: {tag.format(mark=mark)}\n")
    message = r"a\.yml:2:6: the tag '!+[\w/:.]+' is not allowed: .*Write a plain value without the tag"
    with pytest.raises(UserError, match=message):
        load_yaml(file)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.yml is empty. Write the options"),
        (b"# nothing\n", "a.yml is empty"),
        (b"- 1\n", "a.yml holds list at its top level; it must be 'key: value' lines"),
        (b"name: \xff\xfe\n", "a.yml is not UTF-8 text: invalid start byte at byte 6. Save it as UTF-8"),
        (b"a: 1\nb: [1, 2\nc: 3\n", r"a.yml:3:2: .*expected ',' or '\]'"),
        (b"a: *b\n", "a.yml:1:4: .*undefined alias"),
        (
            b"a: !!float word\n",
            "a.yml:1:4: 'word' cannot be read as !!float: could not convert string to float: 'word'",
        ),
        (b"a: \x01\n", "a.yml: .*(control|special) characters are not allowed"),
    ],
)
def test_unusable_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.yml").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_yaml(tmp_path / "a.yml")


def chain(levels: int) -> str:
    """Mappings that each have two aliases to the one before: 2 ** levels values."""
    return "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{l: *a{n - 1}, r: *a{n - 1}}}\n" for n in range(1, levels + 1))


def merges(levels: int) -> str:
    return "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, levels + 1))


def lists(levels: int) -> str:
    return "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, levels + 1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: " + "[" * 2000, r"a\.yml(:1:\d+)?: more than 100 levels of lists and mappings"),
        ("a: " + "{a: " * 101 + "}" * 101, r"a\.yml:1:\d+: more than 100 levels"),
        ("a: &a {b: {c: *a}}", r"a\.yml:1:4: more than 100 levels .* an alias \(\*NAME\) that leads back to itself"),
        ("a: &a [*a]", r"a\.yml:1:4: more than 100 levels"),
        ("a: &a {<<: *a}", r"a\.yml: more than 100 levels"),
        (merges(40), r"a\.yml: its aliases \(\*NAME\) expand to more than 100000 values"),
        (lists(40), r"a\.yml: its aliases \(\*NAME\) expand to more than 100000 values"),
        (chain(40), r"a\.yml: its aliases \(\*NAME\) expand to more than 100000 values; write fewer"),
        (
            "a0: &a0 [1]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 200)),
            r"a\.yml:\d+:\d+: more than 100 levels",
        ),
        ("a: 2024-13-45", r"a\.yml:1:4: '2024-13-45' cannot be read as !!timestamp: month must be in 1..12"),
        ("a: !!bool z", r"a\.yml:1:4: 'z' cannot be read as !!bool$"),
        ("a: !!int ''", r"a\.yml:1:4: '' cannot be read as !!int$"),
        ("a: !!timestamp z", r"a\.yml:1:4: 'z' cannot be read as !!timestamp$"),
    ],
)
def test_files_that_would_crash_or_hang(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.yml").write_text(text)
    with pytest.raises(UserError, match=message):
        load_yaml(tmp_path / "a.yml")


def test_aliases_may_be_used(tmp_path: Path) -> None:
    assert load_yaml("a: &a {x: 1}\nb: *a\n") == {"a": {"x": 1}, "b": {"x": 1}}
    assert len(load_yaml(chain(10))) == 11


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no\.yml does not exist \(looked for /"):
        load_yaml(tmp_path / "no.yml")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory. Give the path of a \.yml file"):
        load_yaml(tmp_path)


def test_duplicate_keys_warn_and_the_last_counts(caplog: pytest.LogCaptureFixture) -> None:
    text = "base: &base {x: 1, y: 1}\na:\n  <<: *base\n  x: 2\nb:\n  z: 1\n  z: 2\n"
    with caplog.at_level(logging.WARNING, logger="basicsr"):
        read = load_yaml(text)
    assert read["a"] == {"x": 2, "y": 1} and read["b"] == {"z": 2}
    assert caplog.messages == ["the option text:7:3: b:z: is also given in line 6; the last one counts."]


# --- --force_yml -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ("train:ema_decay=0.999", {"train": {"ema_decay": 0.999}}),
        ("train:lr=1e-4", {"train": {"lr": 1e-4}}),
        ("train : warmup_iter = -1", {"train": {"warmup_iter": -1}}),
        ("betas=[0.9, 0.99]", {"betas": [0.9, 0.99]}),
        ("x=true", {"x": True}),
        ("x=none", {"x": None}),
        ("x=None", {"x": None}),
        ("x=~", {"x": None}),
        ("x=", {"x": None}),
        ("x='none'", {"x": "none"}),
        ("x='{}x4'", {"x": "{}x4"}),
        ("x=!!float 5e3", {"x": 5000.0}),
        ("path:resume_state=a=b.state", {"path": {"resume_state": "a=b.state"}}),
        ("path:resume_state=C:/a.state", {"path": {"resume_state": "C:/a.state"}}),
        ("datasets:train:gt_size=64", {"datasets": {"train": {"gt_size": 64}}}),
        ("val:save_img=true", {"val": {"save_img": True}}),
    ],
)
def test_force_yml(entry: str, expected: dict[str, Any]) -> None:
    opt: dict[str, Any] = {"val": None}
    apply_force_yml(opt, [entry])
    assert opt == {"val": None} | expected


def test_force_yml_keeps_the_rest() -> None:
    opt = {"train": {"a": 1, "b": 2}}
    apply_force_yml(opt, ["train:a=3", "train:c=4"])
    assert opt == {"train": {"a": 3, "b": 2, "c": 4}}


def test_force_yml_null_removes_a_key() -> None:
    opt = {"train": {"scheduler": {"type": "x", "milestones": [1]}}}
    apply_force_yml(opt, ["train:scheduler:milestones=null", "train:amp=null", "train:scheduler:gamma=~"])
    assert opt == {"train": {"scheduler": {"type": "x", "gamma": None}}}


def test_force_yml_takes_a_data_set_out() -> None:
    opt = {"datasets": {"val": {"type": "x"}, "val_2": {"name": "y"}}, "val": {}}
    apply_force_yml(opt, ["datasets:val_2=none", "datasets:val_3=~", "val=None", "datasets:val:type=none"])
    assert opt == {"datasets": {"val": {"type": None}, "val_3": None}, "val": None}


@pytest.mark.parametrize(
    ("entry", "value"),
    [("x:y=[1, a, ~]", [1, "a", None]), ("x:y={b: 5e-4, c: [1]}", {"b": 5e-4, "c": [1]}), ("x:y=[]", [])],
)
def test_force_yml_takes_lists_and_mappings(entry: str, value: Any) -> None:
    opt: dict[str, Any] = {}
    apply_force_yml(opt, [entry])
    assert opt == {"x": {"y": value}}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("train:x", "entry 'train:x' cannot be read: --force_yml takes KEY.*=VALUE, such as train:ema_decay=0.999"),
        ("=1", "entry '=1' cannot be read"),
        ("train:=1", "entry 'train:=1' cannot be read"),
        ("name:x=1", "leads through name, which is 'trial' and no mapping.*every KEY but the last names a mapping"),
        ("x={}x4", "'x={}x4':1:3: .*such as train.*to give text with special characters: \"KEY='TEXT'"),
        ("x=!!python/object/apply:os.system [ls]", "the tag '!!python/object/apply:os.system' is not allowed"),
    ],
)
def test_force_yml_mistakes(entry: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        apply_force_yml({"name": "trial"}, [entry])


@pytest.mark.parametrize(
    "entry",
    [
        'x"]=1; __import__("os").system("touch mark"); opt["y=1',
        "x=[__import__('os').system('touch mark')]",
        "x=__import__('os').system('touch mark')",
    ],
)
def test_force_yml_runs_nothing(folder: Path, entry: str) -> None:
    opt: dict[str, Any] = {}
    apply_force_yml(opt, [entry])
    assert not (folder / "mark").exists() and len(opt) == 1


# --- the launcher ----------------------------------------------------------------------------------------------


def test_flags() -> None:
    given = arguments("--opt", "a.yml", "--local-rank", "3", "--force_yml", "a=1", "b=-1", "--debug", "--auto_resume")
    assert (given.local_rank, given.force_yml, given.debug, given.auto_resume) == (3, ["a=1", "b=-1"], True, True)
    assert arguments("-opt", "a.yml", "--local_rank=2", "--launcher", "slurm").local_rank == 2
    plain = vars(arguments("-opt", "a.yml"))
    assert plain == {
        "opt": "a.yml", "launcher": "none",
        "no_build": False, "auto_resume": False, "debug": False, "local_rank": 0, "force_yml": None,
        "imports": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("launcher", "environ", "resolved"),
    [
        ("none", {}, "none"),
        ("none", TORCHRUN | {"WORLD_SIZE": "1"}, "none"),
        ("none", {"RANK": "0", "WORLD_SIZE": "2"}, "none"),
        ("none", TORCHRUN, "pytorch"),
        ("pytorch", TORCHRUN | {"WORLD_SIZE": "1"}, "pytorch"),
        ("slurm", {"SLURM_PROCID": "0", "SLURM_NTASKS": "2", "SLURM_NODELIST": "a"}, "slurm"),
    ],
)
def test_resolve_launcher(launcher: str, environ: dict[str, str], resolved: str) -> None:
    assert resolve_launcher(launcher, environ) == resolved


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ("pytorch", "RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT, which are not set; start it with: torchrun "),
        ("slurm", "SLURM_PROCID, SLURM_NTASKS, SLURM_NODELIST, which are not set; start it inside .* with: srun "),
    ],
)
def test_launcher_without_its_environment(launcher: str, message: str) -> None:
    with pytest.raises(UserError, match=f"--launcher {launcher} needs the environment variables {message}"):
        resolve_launcher(launcher, {})


def test_notes_are_printed_by_rank_0_only(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: Any) -> None:
    resolve_launcher("none", TORCHRUN)
    assert capsys.readouterr().err == "Note: started by torchrun with 2 processes: using --launcher pytorch.\n"
    monkeypatch.setenv("RANK", "1")
    resolve_launcher("none", TORCHRUN)
    assert capsys.readouterr().err == ""


@pytest.fixture
def joined(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the process group was asked to be; the start method is left alone."""
    asked: dict[str, Any] = {}
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda **given: asked.update(given))
    for name in ("open_control_group", "own_connection", "_get_default_store", "FailureMonitor", "_monitor"):
        monkeypatch.setattr(distributed.launch, name, MagicMock())
    for name in ("PrefixStore", "get_rank", "get_world_size"):
        monkeypatch.setattr(torch.distributed, name, MagicMock())
    monkeypatch.setattr(torch.multiprocessing, "get_start_method", lambda allow_none: None)
    monkeypatch.setattr(torch.multiprocessing, "set_start_method", lambda method: asked.update(start=method))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.update(device=device))
    return asked


def test_init_dist_without_cuda(joined: dict[str, Any]) -> None:
    distributed.init_dist("pytorch", backend="nccl", rank=0)
    assert joined == {"start": "spawn", "backend": "gloo", "rank": 0}


def test_init_dist_with_cuda(joined: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "5")
    monkeypatch.setenv("LOCAL_RANK", "1")
    distributed.init_dist("pytorch")
    assert joined == {"start": "spawn", "backend": "nccl", "device": 1}
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"process 2 of this machine has no GPU: there are 2\. Use .*_per_node=2"):
        distributed.init_dist("pytorch")


@pytest.mark.parametrize(
    ("local", "gpus", "port", "expected"), [("2", 1, 1234, ("0", "1234")), (None, 4, None, ("3", "29500"))]
)
def test_init_dist_slurm(joined: Any, monkeypatch: Any, local: Any, gpus: int, port: Any, expected: Any) -> None:
    environment = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_NODELIST": "n[1-2]"}
    environment |= {"SLURM_LOCALID": local} if local else {}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 0, stdout="n1\nn2\n")
    )
    distributed.init_dist("slurm", port=port)
    assert (str(joined["device"]), environment["MASTER_PORT"]) == expected
    assert [environment[name] for name in ("MASTER_ADDR", "WORLD_SIZE", "RANK")] == ["n1", "8", "3"]


def test_init_dist_slurm_without_scontrol(joined: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def no_program(command: list[str], **_: Any) -> None:
        raise FileNotFoundError(command[0])

    monkeypatch.setattr(subprocess, "run", no_program)
    monkeypatch.setattr(os, "environ", {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", "SLURM_NODELIST": "n; touch mark"})
    with pytest.raises(UserError, match="--launcher slurm: scontrol show hostname n; touch mark does not name a host"):
        distributed.init_dist("slurm")


# --- parse_options ---------------------------------------------------------------------------------------------


def test_training_options(folder: Path) -> None:
    opt = parse(TRAIN_FILE)
    assert (opt["num_gpu"], opt["dist"], opt["rank"], opt["world_size"]) == (0, False, 0, 1)
    assert (opt["is_train"], opt["auto_resume"]) == (True, False)
    assert 1 <= opt["manual_seed"] <= 10000
    assert opt["logger"] == {"print_freq": 100, "save_checkpoint_freq": 5000, "use_tb_logger": False}
    assert "val" not in opt
    train, val = opt["datasets"]["train"], opt["datasets"]["val"]
    assert (train["phase"], train["scale"], train["name"]) == ("train", 2, "train")
    assert train["io_backend"] == {"type": "disk"}
    assert (train["use_hflip"], train["use_rot"], train["num_worker_per_gpu"]) == (True, True, 4)
    assert (val["phase"], val["name"]) == ("val", "Set1") and "use_hflip" not in val
    root = str(folder / "experiments" / "trial")
    assert opt["path"] == {
        "experiments_root": root,
        "models": f"{root}/models",
        "training_states": f"{root}/training_states",
        "log": root,
        "visualization": f"{root}/visualization",
    }
    assert sorted(os.listdir(folder)) == ["gt", "lq", "options.yml"]


def test_test_options(folder: Path) -> None:
    opt = parse(TEST_FILE, is_train=False)
    assert opt["val"]["save_img"] is False and opt["val"]["suffix"] is None
    assert opt["datasets"]["test_1"]["phase"] == "test" and opt["datasets"]["test_1"]["name"] == "test_1"
    root = str(folder / "results" / "trial")
    assert opt["path"] == {"results_root": root, "log": root, "visualization": f"{root}/visualization"}


def test_the_files_own_values_stay(folder: Path) -> None:
    text = TRAIN_FILE + "val: {val_freq: 10, suffix: x}\nlogger: {print_freq: 3}\nmanual_seed: 7\nnum_gpu: 0\n"
    opt = parse(text, "--force_yml", "datasets:train:use_rot=false", "val:save_img=true", "train:ema_decay=0.9")
    assert opt["val"] == {"val_freq": 10, "save_img": True, "suffix": "x"}
    assert opt["logger"]["print_freq"] == 3 and opt["logger"]["save_checkpoint_freq"] == 5000
    assert opt["datasets"]["train"]["use_rot"] is False and opt["train"]["ema_decay"] == 0.9
    first = torch.rand(1)
    parse(text)
    assert opt["manual_seed"] == 7 and torch.equal(torch.rand(1), first)


def test_flips_by_their_old_name(folder: Path) -> None:
    opt = parse(TRAIN_FILE.replace("gt_size: 16", "gt_size: 16, use_flip: false"))
    assert opt["datasets"]["train"]["use_hflip"] is False


@pytest.mark.parametrize(
    ("is_train", "key", "text"), [(True, "experiments_root", TRAIN_FILE), (False, "results_root", TEST_FILE)]
)
def test_roots_of_newer_files_are_bases(folder: Path, monkeypatch: Any, is_train: bool, key: str, text: str) -> None:
    monkeypatch.setenv("HOME", str(folder / "home"))
    both = "path: {experiments_root: ~/runs, results_root: ~/runs}\n"
    opt = parse(text + both, is_train=is_train)
    assert opt["path"][key] == opt["path"]["log"] == str(folder / "home" / "runs" / "trial")
    assert len({"experiments_root", "results_root"} & opt["path"].keys()) == 1  # BasicSR would make the other
    relative = parse(text + both.replace("~/", ""), is_train=is_train)
    assert relative["path"][key] == str(folder / "runs" / "trial")


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    torch.save({"params": {"conv_first.bias": torch.zeros(4)}}, folder / "a.pth")
    text = TRAIN_FILE.replace("dataroot_gt: gt", "dataroot_gt: ~/gt").replace("dataroot_lq: lq", "dataroot_lq: ~/lq")
    paths = "pretrain_network_g: ~/a.pth, strict_load_g: false, resume_state: ~, ignore_resume_networks: [network_d]"
    opt = parse(f"{text}path: {{{paths}}}\n")
    assert opt["datasets"]["train"]["dataroot_gt"] == str(folder / "gt")
    assert opt["path"]["pretrain_network_g"] == str(folder / "a.pth")
    assert opt["path"]["strict_load_g"] is False and opt["path"]["resume_state"] is None
    assert opt["path"]["ignore_resume_networks"] == ["network_d"]


def test_unknown_path_keys_are_dropped(folder: Path, capsys: pytest.CaptureFixture) -> None:
    opt = parse(TRAIN_FILE + "path: {zzz: ~, param_key_g: params_ema}\n")
    assert "zzz" not in opt["path"]
    assert opt["path"]["param_key_g"] == "params_ema"
    line = TRAIN_FILE.count("\n") + 1
    assert capsys.readouterr().err == f"Note: options.yml:{line}:8: path:zzz: unknown key; it will be ignored.\n"


def test_path_keys_that_a_model_reads_stay(folder: Path, capsys: pytest.CaptureFixture) -> None:
    class ModelWithPath(SRModel):
        def __init__(self, opt: Any) -> None:
            super().__init__(opt)
            self.features = opt["path"]["features"]

    MODEL_REGISTRY.register(ModelWithPath)
    try:
        opt = parse(TRAIN_FILE.replace("SRModel", "ModelWithPath") + "path: {features: ~/x}\n")
    finally:
        del MODEL_REGISTRY._obj_map["ModelWithPath"]
    assert opt["path"]["features"] == os.path.expanduser("~/x") and capsys.readouterr().err == ""


def test_a_null_ema_decay_means_no_average(folder: Path) -> None:
    assert parse(TRAIN_FILE, "--force_yml", "train:ema_decay=~")["train"]["ema_decay"] == 0
    assert parse(TRAIN_FILE, "--force_yml", "train:ema_decay=0.9")["train"]["ema_decay"] == 0.9


def test_debug(folder: Path) -> None:
    opt = parse(TRAIN_FILE + "val: {}\n", "--debug")
    assert opt["name"] == "debug_trial" and opt["path"]["log"].endswith("experiments/debug_trial")
    assert opt["val"]["val_freq"] == opt["logger"]["save_checkpoint_freq"] == 8 and opt["logger"]["print_freq"] == 1
    # BasicSR's rule: a name with debug in it is enough for the frequencies.
    opt = parse(TRAIN_FILE.replace("name: trial", "name: my_debug"))
    assert opt["name"] == "my_debug" and opt["logger"]["print_freq"] == 1
    assert parse(TEST_FILE, "--debug", is_train=False)["name"] == "debug_trial"


LOADING = "prefetch_mode: cuda, pin_memory: {pin}, persistent_workers: true, num_worker_per_gpu: 0, batch_size_per_gpu"


@pytest.mark.parametrize(
    ("cuda", "pin", "expected", "notes"),
    [
        (False, "true", ("cpu", False, False), ["persistent_workers is off", "prefetch_mode is cpu"]),
        (True, "false", ("cuda", True, False), ["persistent_workers is off", "pin_memory is on"]),
        (True, "true", ("cuda", True, False), ["persistent_workers is off"]),
    ],
)
def test_loading_is_adapted(
    folder: Path, capsys: pytest.CaptureFixture, monkeypatch: Any, cuda: bool, pin: str, expected: Any, notes: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    train = parse(TRAIN_FILE.replace("batch_size_per_gpu", LOADING.format(pin=pin)))["datasets"]["train"]
    assert (train["prefetch_mode"], train["pin_memory"], train["persistent_workers"]) == expected
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(notes)
    for line, note in zip(printed, notes, strict=True):
        assert line.startswith(f"Note: datasets:train:{note}: ")


def test_validation_never_has_workers(folder: Path, capsys: pytest.CaptureFixture) -> None:
    opt = parse(TRAIN_FILE.replace("{name: Set1", "{num_worker_per_gpu: 4, persistent_workers: true, name: Set1"))
    assert opt["datasets"]["val"]["persistent_workers"] is False
    assert "datasets:val:persistent_workers is off: there are no workers" in capsys.readouterr().err


def test_a_null_list_of_a_single_image_dataset_is_none(folder: Path) -> None:
    text = TEST_FILE.replace("type: Paired", "meta_info_file: ~, type: Single")
    assert "meta_info_file" not in parse(text, is_train=False)["datasets"]["test_1"]


def test_all_problems_in_one_error_and_nothing_is_written(folder: Path) -> None:
    text = TRAIN_FILE.replace("SRModel", "SRModle").replace("gt_size: 16", "gt_size: 15").replace("L1Loss", "L1Los")
    with pytest.raises(UserError) as caught:
        parse(text)
    lines = str(caught.value).splitlines()
    assert lines[0] == "options.yml: 3 problem(s):" and len(lines) == 4
    places = [line.split(": ", 2)[:2] for line in lines[1:]]
    assert places == [
        ["options.yml:3:1", "model_type"],
        [f"options.yml:6:{text.splitlines()[5].index('gt_size') + 1}", "datasets:train:gt_size"],
        ["options.yml:13:15", "train:pixel_opt:type"],
    ]
    assert sorted(os.listdir(folder)) == ["gt", "lq", "options.yml"]


def test_shape_is_checked_before_defaults(folder: Path) -> None:
    with pytest.raises(
        UserError, match=r"options.yml: 2 problem\(s\):\n.*:1:1: name: None .*\n.*:1:1: datasets: None given"
    ):
        parse("model_type: SRModel\n")


@pytest.mark.parametrize(("launcher", "passed"), [("slurm", {"backend": "nccl", "port": 1}), ("pytorch", {})])
def test_distributed(folder: Path, monkeypatch: Any, launcher: str, passed: dict[str, Any]) -> None:
    asked = []
    monkeypatch.setattr(options, "init_dist", lambda name, **given: asked.append((name, given)))
    monkeypatch.setattr(options, "resolve_launcher", lambda name, environ: launcher)
    monkeypatch.setattr(options, "get_dist_info", lambda: (3, 4))
    opt = parse(TRAIN_FILE + "dist_params: {backend: nccl, port: 1}\nmanual_seed: 5\n")
    drawn = torch.rand(1)
    assert asked == [(launcher, passed)] and (opt["dist"], opt["rank"], opt["world_size"]) == (True, 3, 4)
    assert torch.equal(drawn, torch.rand(1, generator=torch.Generator().manual_seed(5 + 3)))
