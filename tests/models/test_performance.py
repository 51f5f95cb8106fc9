"""The options of speed and memory: what they change is how a step is computed, never what it is."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from esc_arch import ESC, ESCModel, UserError
from esc_arch.models import esc_model
from esc_arch.models.performance import PerformanceOptions, performance_problems
from esc_arch.modules.conv_attn import _PooledKernel
from esc_arch.modules.norm import LayerNorm
from esc_arch.options import check_options

Make = Callable[..., Any]


def batch(seed: int = 0, size: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "lq": torch.rand(size, 3, 8, 8, generator=generator),
        "gt": torch.rand(size, 3, 16, 16, generator=generator),
    }


@pytest.fixture
def train(make_model: Make, train_options: Any) -> Callable[..., tuple[Any, list[float]]]:
    """Trains some steps with options of `train:`; returns the model and the losses."""

    def run(steps: int = 3, **options: Any) -> tuple[Any, list[float]]:
        torch.manual_seed(0)
        optimizer = {"type": "SGD", "lr": 0.1}
        model = make_model(train=copy.deepcopy(train_options["train"]) | {"optim_g": optimizer} | options)
        with torch.no_grad():  # untrained, the dynamic kernels are zero
            for parameter in model.net_g.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
        losses = []
        for step in range(1, steps + 1):
            model.update_learning_rate(step)
            model.feed_data(batch(step))
            model.optimize_parameters(step)
            losses.append(model.get_current_log()["l_pix"])
        return model, losses

    return run


def difference(one: Any, other: Any) -> float:
    """The largest between the weights of two models."""
    pairs = zip(one.net_g.parameters(), other.net_g.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


EXACT = [
    {"channels_last": True},
    {"activation_checkpointing": True},
    {"accumulate_grad": 2},
    {"accumulate_grad": 4, "pixel_opt": {"type": "L1Loss", "reduction": "sum", "loss_weight": 1e-3}},
    {"gradient_clip": 1e9},
    {"tf32": False},
    {"nonfinite": "skip"},
    {"accumulate_grad": 2, "losses": {"fft": {"type": "FFTLoss", "loss_weight": 0.1}}},
]


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_the_step_stays_the_same(options: Any, train: Any) -> None:
    same = {key: options[key] for key in ("pixel_opt", "losses") if key in options}
    plain, expected = train(**same)
    fast, losses = train(**options)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert difference(plain, fast) < 1e-5
    assert difference(plain, train(steps=2, **same)[0]) > 1e-4  # the third step alone moves that much


def test_options_are_at_work(train: Any) -> None:
    model, _ = train(channels_last=True, activation_checkpointing=True)
    assert model.net_g.checkpointing and not model.net_g_ema.checkpointing
    for net in (model.net_g, model.net_g_ema):
        assert net.proj.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.lq.is_contiguous(memory_format=torch.channels_last)


def test_checkpointing_keeps_less_for_the_backward_pass(train: Any) -> None:
    def kept(**options: Any) -> int:
        model, _ = train(steps=1, **options)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            model.net_g(batch()["lq"])
        return sum(sizes)

    assert kept(activation_checkpointing=True) < 0.5 * kept()


@pytest.mark.parametrize("clip", [0.01, 0.5])
def test_gradients_are_clipped(clip: float, train: Any) -> None:
    model, _ = train(steps=1, gradient_clip=clip)
    norm = torch.stack([p.grad.norm() for p in model.net_g.parameters()]).norm()
    assert float(norm) == pytest.approx(clip, rel=1e-4)


@pytest.mark.parametrize(("name", "factor"), [("ESRModel", 0.5), ("esc_arch.ESRModel", 0.5), ("ESCModel", 1)])
def test_the_published_model_halves_the_clip(
    name: str, factor: float, make_model: Make, train_options: Any, basicsr_log: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("esc_arch.models.esc_model.CLIP_HALVES_AFTER", 2)
    model = make_model(model_type=name, train=train_options["train"] | {"gradient_clip": 0.01})
    for step in (1, 2, 3, 4):
        model.update_learning_rate(step)
        model.feed_data(batch(step))
        model.optimize_parameters(step)
        norm = torch.stack([p.grad.norm() for p in model.net_g.parameters()]).norm()
        assert float(norm) == pytest.approx(0.01 * (factor if step > 2 else 1), rel=1e-4)
    assert ("gradient_clip is halved after 2 iterations" in basicsr_log.text) == (factor < 1)


@pytest.mark.parametrize("name", ["ESRModel", "esc_arch.ESRModel"])
def test_the_published_name_of_mixed_precision(name: str, make_model: Make, train_options: Any) -> None:
    model = make_model(model_type=name, train=train_options["train"] | {"use_amp": True})
    assert model.speed == PerformanceOptions(amp="fp16") and model.scaler.is_enabled()
    for given in ({"use_amp": False}, {"use_amp": None}, {}):
        assert PerformanceOptions.of({"model_type": name, "train": given}) == PerformanceOptions()


@pytest.mark.parametrize("name", ["ESRModel", "esc_arch.ESRModel"])
def test_what_published_files_may_give(name: str, train_options: Any) -> None:
    train_options |= {"model_type": name}
    train_options["train"] |= {
        "use_amp": True, "amp": "fp16", "use_ema": True, "gradient_clip": 1.0,
        "wave_opt": None, "mesa_opt": None, "reset_momentum_iter": 0,
    }  # fmt: skip
    assert list(performance_problems(train_options, ESC)) == []
    train_options["train"]["amp"] = "bf16"
    (problem,) = performance_problems(train_options, ESC)
    assert str(problem).startswith("train:use_amp: it is amp: fp16, and amp: bf16 is given, too. Remove one")


def test_parts_of_a_batch_are_run_one_after_the_other(train: Any) -> None:
    model, _ = train(steps=1, accumulate_grad=2)
    sizes: list[int] = []
    model.net_g.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    model.feed_data(batch())
    model.optimize_parameters(2)
    assert sizes == [2, 2]


# --- mixed precision ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_follows_float32(amp: str, train: Any) -> None:
    _, expected = train(steps=6)
    model, losses = train(steps=6, amp=amp)
    assert losses == pytest.approx(expected, rel=1e-2)
    assert losses != expected
    for tensor in (*model.net_g.parameters(), *model.net_g_ema.parameters()):
        assert tensor.dtype == torch.float32
    assert model.output.dtype == torch.float32
    assert model.scaler.is_enabled() == (amp == "fp16")


def test_what_stays_in_float32(train: Any) -> None:
    """The list in docs/training.md: types of what goes in and comes out of each kind of layer."""
    model, _ = train(steps=1, amp="bf16")
    seen: dict[str, set[torch.dtype]] = {}

    def note(kind: str) -> Any:
        return lambda _, __, output: seen.setdefault(kind, set()).add(output.dtype)

    for module in model.net_g.modules():
        if isinstance(module, LayerNorm | _PooledKernel | nn.AdaptiveAvgPool2d):
            module.register_forward_hook(note(type(module).__name__))
    model.net_g.blocks[0].conv_out.register_forward_hook(note("conv_out"))
    model.feed_data(batch())
    model.optimize_parameters(2)
    assert seen["LayerNorm"] == seen["_PooledKernel"] == seen["AdaptiveAvgPool2d"] == {torch.float32}
    assert seen["conv_out"] == {torch.bfloat16}


def test_validation_is_in_float32(train: Any, train_options: Any) -> None:
    for ema in (0, 0.5):
        model, _ = train(steps=1, amp="bf16", ema_decay=ema)
        image = batch(size=1)["lq"]
        net = copy.deepcopy(model.net_g_ema if ema else model.net_g).eval()
        with torch.no_grad():
            expected = ESC.forward(net, image)
        model.feed_data({"lq": image})
        model.test()
        assert torch.equal(model.output, expected)


def test_a_copy_of_a_low_precision_network_is_its_own(train: Any) -> None:
    model, _ = train(steps=1, amp="bf16")
    copied = copy.deepcopy(model.net_g)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
        image = torch.zeros(1, 3, 8, 8)
        assert copied(image).abs().max() == 0 != model.net_g(image).abs().max()


def test_the_scaler_is_saved_and_taken_back(train: Any, tmp_path: Any) -> None:
    model, _ = train(amp="fp16")
    model.scaler.update(new_scale=1234.0)
    model.skipped = 7
    model.save(0, 3)
    state = torch.load(tmp_path / "states" / "3.state", weights_only=True)
    other, _ = train(amp="fp16")
    other.resume_training(state)
    assert (other.scaler.get_scale(), other.skipped) == (1234.0, 7)


# --- compiling ------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_code_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything of torch.compile but inductor, which takes a minute."""
    compile_in_place = nn.Module.compile

    def trace(self: nn.Module, *, mode: str | None, dynamic: bool) -> None:
        compile_in_place(self, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(nn.Module, "compile", trace)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("without_code_generation")
@pytest.mark.parametrize("ema", [0.5, 0])
def test_steps_are_compiled_once(ema: float, run_basicsr: Any, train_options: Any) -> None:
    """Not again for each step, validation image size, or after a validation."""
    from torch._dynamo.utils import counters

    counters.clear()
    train_options["train"] |= {"compile": True, "ema_decay": ema, "total_iter": 6}
    run = run_basicsr("train", train_options)
    assert run.status == 0, run.err
    assert counters["stats"]["unique_graphs"] == 1
    assert not any("_orig_mod" in name for name in run.weights())


@pytest.mark.usefixtures("without_code_generation")
def test_compiled_steps_are_the_same(train: Any) -> None:
    plain, _ = train()
    compiled, _ = train(compile=True, amp=None)
    assert compiled.net_g._compiled_call_impl is not None
    assert difference(plain, compiled) < 1e-5


def test_the_mode_is_handed_on(train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(nn.Module, "compile", lambda _, **options: asked.append(options))
    PerformanceOptions(compile="max-autotune").prepare(nn.Identity(), torch.device("cpu"))
    assert asked == [{"mode": "max-autotune", "dynamic": False}]


def test_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for choice, precision in ((True, "high"), (False, "highest")):
            PerformanceOptions(tf32=choice).set_globals()
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (precision, choice)
            PerformanceOptions().set_globals()
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# --- what is not a number (fault 41) ----------------------------------------------------------------------------------


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes the loss of some iterations not a number."""

    def arrange(*iterations: int) -> None:
        losses_of = ESCModel.losses_of

        def spoiled(self: Any, *args: Any, **kwargs: Any) -> Any:
            losses = losses_of(self, *args, **kwargs)
            return {k: v * math.nan for k, v in losses.items()} if self._iteration in iterations else losses

        monkeypatch.setattr(ESCModel, "losses_of", spoiled)

    return arrange


def test_41_it_is_found_within_a_log_interval(spoil: Any, run_basicsr: Any, train_options: Any) -> None:
    spoil(3)
    train_options["train"] |= {"total_iter": 20}
    train_options["logger"] |= {"print_freq": 5, "save_checkpoint_freq": 2}
    train_options["val"]["val_freq"] = 100
    run = run_basicsr("train", train_options)
    assert run.status == 2
    # It was met when a checkpoint was to be saved, before the log at 5
    assert re.search(r"Training stopped at iteration 4: weights of net_g are infinite", run.err)
    assert f"The last state is {run.experiment() / 'training_states' / '2.state'}" in run.err
    assert sorted(os.listdir(run.experiment() / "models")) == ["net_g_2.pth"]


def test_41_the_log_names_the_iteration_where_it_began(spoil: Any, run_basicsr: Any, train_options: Any) -> None:
    spoil(3)
    train_options["train"] |= {"total_iter": 20}
    train_options["logger"] |= {"print_freq": 5, "save_checkpoint_freq": 100}
    train_options["val"]["val_freq"] = 100
    run = run_basicsr("train", train_options)
    assert run.status == 2
    assert "Training stopped at iteration 3: l_pix is nan. Nothing was saved before" in run.err


def test_41_skipped_steps_change_nothing_and_are_counted(spoil: Any, run_basicsr: Any, train_options: Any) -> None:
    spoil(2, 4)
    train_options["train"] |= {"total_iter": 6, "nonfinite": "skip"}
    run = run_basicsr("train", train_options)
    assert run.status == 0, run.err
    assert all(value.isfinite().all() for value in run.weights().values())
    assert re.findall(r"skipped: (\S+)", run.log()) == ["1.0000e+00"] * 2 + ["2.0000e+00"] * 3
    first, second = (run.weights(4, key) for key in ("params", "params_ema"))
    assert not torch.equal(first["proj.weight"], run.weights(6)["proj.weight"])
    assert not torch.equal(second["proj.weight"], first["proj.weight"])


def test_a_skipped_step_leaves_weights_and_average(spoil: Any, train: Any) -> None:
    spoil(3)
    model, _ = train(steps=2, nonfinite="skip")
    before = copy.deepcopy([model.net_g.state_dict(), model.net_g_ema.state_dict()])
    model.update_learning_rate(3)
    model.feed_data(batch())
    model.optimize_parameters(3)
    assert model.skipped == 1
    for net, weights in zip((model.net_g, model.net_g_ema), before, strict=True):
        assert all(torch.equal(net.state_dict()[name], value) for name, value in weights.items())


def test_too_many_skipped_steps_end_the_training(spoil: Any, train: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(esc_model, "MOST_SKIPPED", 3)
    spoil(*range(1, 10))
    with pytest.raises(UserError, match=r"stopped at iteration 3: the gradients of 3 steps in a row were infinite"):
        train(steps=5, nonfinite="skip")


# --- wrong options ----------------------------------------------------------------------------------------------------

WRONG = [
    ({"accumulate_grad": 3}, "train:accumulate_grad: 3 given; it must divide datasets:train:batch_size_per_gpu, 2"),
    ({"wave_opt": {"type": "WaveletLoss"}}, "train:wave_opt: not supported. Remove it; "),
    ({"mesa_opt": {"mesa_weight": 1}}, "train:mesa_opt: not supported. Remove it; "),
    ({"reset_momentum_iter": 1000}, "train:reset_momentum_iter: not supported. Remove it; a new run from a checkpoint"),
    ({"use_amp": True}, "train:use_amp: ESRModel has it. Give amp: fp16 or amp: bf16"),
    ({"use_ema": False}, "train:use_ema: False given, and ema_decay is 0.5. Remove use_ema, or give ema_decay: 0"),
    ({"use_ema": True, "ema_decay": 0}, "train:use_ema: True given, and ema_decay is 0. Remove use_ema, or give ema"),
    (
        {"accumulate_grad": 2, "perceptual_opt": {"type": "PerceptualLoss", "layer_weights": {}, "criterion": "fro"}},
        "train:accumulate_grad: does not go with perceptual_opt:criterion: fro",
    ),
]


@pytest.mark.parametrize(("options", "message"), WRONG, ids=lambda case: str(case)[:40])
def test_wrong_options_are_told_before_the_run(options: Any, message: str, train_options: Any) -> None:
    train_options["train"] |= options
    assert any(str(problem).startswith(message) for problem in performance_problems(train_options, ESC))
    assert any(str(problem).startswith(message) for problem in check_options(train_options, is_train=True))


def test_values_of_a_wrong_type_are_told_before_the_run(run_basicsr: Any, train_options: Any) -> None:
    keys = {
        "amp": "fp8",
        "compile": "fast",
        "nonfinite": "ignore",
        "channels_last": "on",
        "tf32": "yes",
        "activation_checkpointing": 2,
        "gradient_clip": 0,
    }
    train_options["train"] |= keys | {"accumulate_grad": 0}
    run = run_basicsr("train", train_options)
    assert run.status == 2 and "8 problem(s)" in run.err
    for key in (*keys, "accumulate_grad"):
        assert re.search(rf"train:{key}: .* given; must be ", run.err)


def test_checkpointing_of_other_networks_is_refused(train_options: Any) -> None:
    train_options["train"]["activation_checkpointing"] = True
    train_options["network_g"] = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "upscale": 2}
    problems = check_options(train_options, is_train=True)
    message = "activation_checkpointing: only for networks of the ESC family, not for EDSR"
    assert any(message in str(problem) for problem in problems)


@pytest.mark.parametrize("options", [{}, {"amp": None, "compile": None, "tf32": None, "accumulate_grad": None}])
def test_nothing_given_is_nothing_done(options: Any, train_options: Any) -> None:
    train_options["train"] |= options
    assert PerformanceOptions.of(train_options) == PerformanceOptions()
    assert list(performance_problems(train_options, ESC)) == []
