"""benchmarks/inference.py and attention.py print what they promise; what they measure is not tested."""

from __future__ import annotations

import importlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fresh import run_script
from torch import Tensor

from esc_arch.modules.window_attention import WindowAttention
from esc_arch.ops.window_attention import Bias, dense_bias, flex

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = {"dim": 8, "pdim": 4, "kernel_size": 3, "n_blocks": 1, "conv_blocks": 1, "window_size": 4, "num_heads": 2}
QUICK = ["--quick", "--device", "cpu"]
NETWORK = [
    *QUICK, "--networks", "ESC", "--scales", "4", "--output", "64x48", "--force_yml",
    *(f"network_g:{key}={value}" for key, value in TINY.items()),
]  # fmt: skip
ATTENTION = [*QUICK, "--windows", "4", "--map", "18x10", "--heads", "2", "--head-dim", "4"]
HEAD = ["first, s", "ms", "against naive", "against flex", "MiB", "error", "roofline, ms", "of roofline"]


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """benchmarks/common.py, with what the scripts set for their process put back afterwards."""
    threads, disabled = torch.get_num_threads(), logging.root.manager.disable
    torch.set_num_threads(1)  # the networks are tiny
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = importlib.import_module("common")
    monkeypatch.setattr(module, "prepare_operators", lambda: "C++ operators as they are")  # they take half a minute
    monkeypatch.setattr(flex, "_compiled", lambda: attend)  # and so does this
    monkeypatch.setattr(module, "gc", SimpleNamespace(collect=lambda: None))  # of all that tests have imported
    yield module
    logging.disable(disabled)
    torch.set_num_threads(threads)


@pytest.fixture
def inference(common: ModuleType) -> ModuleType:
    return importlib.import_module("inference")


@pytest.fixture
def attention(common: ModuleType) -> ModuleType:
    return importlib.import_module("attention")


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Bias, window: int, _: str | None) -> Tensor:
    """What flex attention computes."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=dense_bias(bias, window).to(q.dtype))


def rows(text: str) -> dict[str, dict[str, str]]:
    """The lines of the only table in a text: by their first cells, and by the names of the columns."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    head, rule, *body = lines
    assert set(rule) == {"---"}
    return {line[0]: dict(zip(head[1:], line[1:], strict=True)) for line in body}


# --- what a network costs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scale", "expected"), [(4, 148.65e9), (2, 589.8e9)])
def test_multiply_adds_of_base_esc_at_hd(inference: ModuleType, scale: int, expected: float) -> None:
    args = inference.parse_arguments([])
    height, width = inference.lr_size(args, scale)
    costs = inference.costs_of(inference.make_network(args, "ESC", scale), height, width)
    assert costs.multiply_adds == pytest.approx(expected, rel=1e-3)
    # Of 169 taps 28 differ, in 25 layers of 16 channels
    assert costs.multiply_adds - costs.symmetric == (169 - 28) * 25 * 16**2 * height * width


def test_costs_do_not_depend_on_how_a_network_is_computed(inference: ModuleType, common: ModuleType) -> None:
    net = inference.make_network(inference.parse_arguments(NETWORK), "ESC", 4)
    counted = inference.costs_of(net, 12, 16)
    common.set_attention(net.to(torch.bfloat16), "sdpa")
    assert inference.costs_of(net, 12, 16) == counted
    assert {module.attn_type for module in net.modules() if isinstance(module, WindowAttention)} == {"sdpa"}


def test_costs_of_layers_by_hand(inference: ModuleType) -> None:
    """Multiply-adds of networks are tested in tests/tools/benchmark/test_counting.py."""
    from costs import costs_of, window_attention_costs

    from esc_arch.modules import ConvAttn

    # 8 channels of 6 x 5 pixels: four windows of 4 x 4, two products of 16 x 16 x 8 in each
    costs = window_attention_costs((8, 6, 5), 4)
    assert (costs.multiply_adds, costs.numbers) == (4 * 2 * 16 * 16 * 8, 4 * 8 * 30)
    layer = ConvAttn(dim=6, pdim=4, kernel_size=5, own_kernel=True)
    costs = costs_of(torch.nn.Sequential(torch.nn.Conv2d(3, 6, 1), layer), 6, 5)
    weights = sum(parameter.numel() for parameter in layer.parameters())
    assert costs.numbers == 30 * (3 + 6) + 3 * 6 + 6 + 30 * (6 + 6) + weights
    assert costs.multiply_adds - costs.symmetric == 30 * 4**2 * (25 - 6)


def test_the_roofline_is_the_higher_of_arithmetic_and_memory(common: ModuleType) -> None:
    ceilings = common.Ceilings(bandwidth=100.0, multiply_adds={"fp32": 10.0, "tf32": 20.0, "bf16": 40.0})
    assert ceilings.least_seconds(50, 1, "fp32") == 5
    assert ceilings.least_seconds(50, 1, "default") == 2.5
    assert ceilings.least_seconds(50, 1000, "fp32") == 40
    assert ceilings.least_seconds(50, 1000, "bf16") == 20


# --- the scripts ----------------------------------------------------------------------------------------------------


def test_networks_are_compared(inference: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    assert inference.main([*NETWORK, "--no-memory", "--json", str(file)]) == 0
    out = capsys.readouterr().out
    assert f"torch {torch.__version__}" in out and "C++ operators as they are" in out
    assert "ESC x4 on cpu, LR image 16 x 12" in out
    assert "torch.compile takes minutes for each network and scale: add --compile" in out
    assert "flash kernels take biases that are a product of two factors" in out
    table = rows(out)
    assert list(table)[:3] == ["naive", "flex", "SwinIR-light"]
    assert {"sdpa", "sdpa, channels_last", "auto, channels_last", "auto, channels_last, bf16"} <= {*table}
    assert list(table["naive"]) == HEAD
    assert table["naive"]["against naive"] == table["flex"]["against flex"] == "1.00"
    assert float(table["sdpa"]["against flex"]) > 0
    for label, row in table.items():
        if label == "SwinIR-light":
            assert row["error"] == "-"
        else:
            assert 0 < float(row["error"]) < (0.5 if "bf16" in label else 1e-4), label
    assert float(table["naive, bf16"]["error"]) > 1e-3
    record = json.loads(file.read_text())
    (measured,) = record["tables"]
    assert measured["image"] == [12, 16] and measured["costs"]["multiply_adds"] > 0
    assert len(measured["trials"][0]["seconds"]) == 2


def test_attention_is_compared(attention: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert attention.main([*ATTENTION, "--no-memory", "--passes", "forward"]) == 0
    out = capsys.readouterr().out
    assert "Window 4, forward on cpu, 2 heads of 4, map 18 x 10" in out
    table = rows(out)
    assert {"naive, fp32", "flex, fp32", "sdpa, fp32, channels_last", "naive, bf16"} <= {*table}
    assert list(table["naive, fp32"]) == HEAD
    assert table["flex, fp32"]["against flex"] == "1.00"
    assert all(0 < float(row["error"]) < (0.05 if "bf16" in label else 1e-5) for label, row in table.items())


def test_attention_is_compared_backward(attention: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--no-memory", "--passes", "both", "--only", "sdpa", "factors"]
    assert attention.main([*ATTENTION, *arguments]) == 0
    out = capsys.readouterr().out
    assert "Window 4, forward and backward on cpu" in out
    assert "- flex, fp32. flex: PyTorch's flex attention has no backward pass on the CPU" in out
    table = rows(out)
    assert "flex, fp32" not in table
    assert table["sdpa, fp32"]["against flex"] == "-"
    assert float(table["sdpa, fp32"]["against naive"]) > 0
    assert all(0 < float(row["error"]) < (0.05 if "bf16" in label else 1e-5) for label, row in table.items())


def test_errors_of_gradients_count(attention: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is right forward and wrong backward must show."""
    args = attention.parse_arguments(ATTENTION)
    setting = attention.Setting("naive, fp32", "naive")
    exact = attention.in_float64(args, 4, (4, 8), setting)
    assert [part.shape for part in exact] == [(1, 8, 4, 8), (1, 24, 4, 8), (2, 49)]
    trial = attention.Trial("naive, fp32")
    wrong = (exact[0], exact[1] + 0.1 * exact[1].abs().max(), exact[2])
    context = attention.partial(attention.running, setting, args, 4, True)
    attention.warm_up(trial, context, (4, 8), (4, 8), wrong)
    assert trial.error == pytest.approx(0.1, rel=0.2)


@pytest.mark.parametrize("name", ["inference", "attention"])
def test_memory_is_that_of_a_process_of_its_own(
    request: pytest.FixtureRequest, common: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = request.getfixturevalue(name)
    monkeypatch.setattr(common, "subprocess", SimpleNamespace(run=run_script, PIPE=subprocess.PIPE))
    if name == "inference":
        args = module.parse_arguments([*NETWORK, "network_g:window_size=16"])
        args.output = 512, 512
        own = module.own_arguments(args, "ESC", 4, module.settings_for("cpu", False)[0])
    else:
        args = module.parse_arguments([*ATTENTION, "--windows", "32", "--map", "96x96"])
        own = module.own_arguments(args, 32, False, module.settings_for("cpu")[0])
    trial = common.Trial("naive")
    common.measure_in_own_process(trial, module.__file__, own)
    assert trial.failure is None and trial.refusal is None
    assert trial.first > 0
    if common.high_water() is not None:
        # The scores alone: of 64 windows of 256 tokens, and of 9 windows of 1024 tokens, for two heads
        scores = 4 * 2 * (64 * 256**2 if name == "inference" else 9 * 1024**2)
        assert scores < trial.memory < 12 * scores


def test_a_process_that_ends_is_a_failure(common: ModuleType, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import os, sys\nos.kill(os.getpid(), 9) if sys.argv[1] == 'kill' else exit(3)")
    trials = [common.Trial(argument) for argument in ("kill", "exit")]
    for trial in trials:
        common.measure_in_own_process(trial, str(script), [trial.label])
    assert [trial.failure for trial in trials] == ["out of memory", "failed, see above"]


def test_failures_leave_the_others_their_figures(common: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise RuntimeError("attn_type x cannot run here. x: it is for y. Use attn_type: auto to have one chosen.")

    def break_down() -> None:
        raise RuntimeError("a kernel does not compile")

    def fill() -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    trials = [common.Trial(label) for label in ("a", "b", "refused", "refused too", "broken", "full")]
    for trial, action in zip(trials, (lambda: None, lambda: None, refuse, refuse, break_down, fill), strict=True):
        trial.attempt(action)
    trials[0].seconds, trials[1].seconds = [2.0, 4.0, 9.0], [1.0, 1.0, 3.0]
    text = common.latency_table(trials, ("a", "full"), [0.5] * 6)
    assert "- refused / refused too. x: it is for y" in text
    table = rows(text)
    assert table["b"]["against naive"] == "3.00"  # the median of 2, 4 and 3
    assert table["b"]["ms"] == "1000 (1000 to 3000)" and table["b"]["of roofline"] == "50%"
    assert table["b"]["against flex"] == "-"
    assert table["broken"]["ms"] == "RuntimeError, see above"
    assert table["full"]["ms"] == "out of memory"
    assert "a kernel does not compile" in capsys.readouterr().err


def test_both_allocators(common: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "7")
    script, file = tmp_path / "script.py", tmp_path / "all.json"
    script.write_text(
        "import json, os, sys\n"
        "assert '--both-allocators' not in sys.argv\n"
        "open(sys.argv[-1], 'w').write(json.dumps([os.environ.get('MALLOC_MMAP_MAX_'), sys.argv[1:3]]))\n"
    )
    arguments = ["--quick", "--both-allocators", "--json", str(file)]
    assert common.run_with_both_allocators(str(script), arguments, file) == 0
    assert json.loads(file.read_text()) == {"R": ["0", ["--quick", "--json"]], "D": [None, ["--quick", "--json"]]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.json", "script.py"]
    script.write_text("raise SystemExit(3)")
    assert common.run_with_both_allocators(str(script), [], None) == 3


def test_settings_of_a_gpu(inference: ModuleType) -> None:
    labels = {setting.label: setting for setting in inference.settings_for("cuda", True)}
    assert {"flex, tf32", "triton, fp16", "auto, channels_last, bf16, compiled, CUDA graph"} <= {*labels}
    default = labels["flex, PyTorch's default (convolutions in TF32)"]
    assert default.precision == "default" and default.attention == "flex"
    assert labels["naive"].orders["ConvAttn"] == ("reference",)
    assert labels["auto, channels_last"].orders == {}
    low = labels["auto, channels_last, fp16, weights too, compiled, CUDA graph"]
    assert (low.all_low, low.mode, low.channels_last) == (True, "compiled graph", True)


def test_compilation_is_fresh(common: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    with common.fresh_compilation():
        assert not any(Path(os.environ["TRITON_CACHE_DIR"]).iterdir())
        assert torch._dynamo.config.recompile_limit == 64
    assert os.environ["TRITON_CACHE_DIR"] == "mine"


def test_precisions_are_put_back(common: ModuleType) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for name, expected in (("tf32", ("high", True)), ("fp32", ("highest", False)), ("default", before)):
        with common.tf32_of(name):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == expected
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_a_network_that_is_not_there(inference: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        inference.parse_arguments(["--networks", "ESC-huge"])
    assert "--networks: ESC-huge has no option file; there are ESC, ESC-DFLIP, ESC-FP" in capsys.readouterr().err


def test_a_scale_without_option_file_is_said(inference: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main([*QUICK, "--networks", "ESC-Real", "--scales", "3"]) == 0
    assert "There is no ESC-Real x3." in capsys.readouterr().out


def test_the_convolutions_of_convattn_are_compared() -> None:
    command = [sys.executable, str(BENCHMARKS / "conv_attn.py"), "--quick", "--rounds", "2"]
    done = run_script(command)
    assert done.returncode == 0, done.stderr
    assert "| ms (times as fast) | reference |" in done.stdout
    assert "| channels_last, 1x16x24x32, forward and backward | " in done.stdout
    errors = [float(cell) for cell in done.stdout.splitlines()[-1].split("|")[2:-1]]
    assert len(errors) >= 4 and max(errors) < 1e-5
