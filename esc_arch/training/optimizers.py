"""Optimisers by name: those of torch.optim, and its Muon for networks of convolutions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from esc_arch.archs.base import ESCFamily, earlier_order
from esc_arch.errors import UserError

__all__ = [
    "NO_MUON",
    "OPTIMIZERS",
    "ConvMuon",
    "build_optimizer",
    "hidden_kernels",
    "muon_groups",
    "other_type",
    "type_of",
]

#: What BasicSR's loop cannot drive: one asks for the loss again and again, the other wants sparse gradients.
_UNUSABLE = ("LBFGS", "SparseAdam")
#: Keys of groups that say how a rule is computed, not which it is; they differ between versions of PyTorch.
_HOW = {"params", "param_names", "initial_lr", "foreach", "fused", "capturable", "differentiable", "maximize"}
#: The one that tells AdamW from Adam.
_DECOUPLED = "decoupled_weight_decay"
#: Options of ConvMuon's groups for Muon.
_MUON = ("weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
NO_MUON = f"Muon comes with PyTorch 2.9, and this is {torch.__version__}"


class ConvMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` for kernels of convolutions, and AdamW for everything else, as one optimiser.

    A kernel is to Muon the matrix (out channels, in channels * height * width): Jordan et al.,
    https://kellerjordan.github.io/posts/muon/. The arithmetic of both rules is torch's own.

    Args:
        params: groups with a key ``rule``, muon or adamw, as `muon_groups` makes them. Where a group has a learning
            rate of its own, AdamW's differs from `adamw_lr` by the same factor as Muon's from `lr`.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: of Muon, see there.
        adamw_lr: learning rate of AdamW's parameters; None for `lr`. With ``adjust_lr_fn: match_rms_adamw`` one rate
            suits both.
        adamw_betas, adamw_eps, adamw_weight_decay: of AdamW.

    Raises:
        ValueError: a value that torch's optimisers refuse, or an lr of 0.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        adamw_lr: float | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.01,
    ) -> None:
        if not lr > 0:
            raise ValueError(f"lr is {lr}; Muon's must be above 0.")
        adamw_lr = lr if adamw_lr is None else adamw_lr
        values = (weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn)
        muon: dict[str, Any] = dict(zip(_MUON, values, strict=True))
        adam: dict[str, Any] = {"betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay}
        probe = [torch.zeros(1, 1)]  # torch's own constructors check the values
        torch.optim.Muon(probe, lr=lr, **muon)
        torch.optim.AdamW(probe, lr=adamw_lr, **adam)
        groups = []
        for group in params:
            options, rate = (muon, lr) if group["rule"] == "muon" else (adam, adamw_lr)
            groups.append(options | group | {"lr": rate * (group.get("lr", lr) / lr)})
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = [parameter.grad for parameter in parameters]
            (self._muon_step if group["rule"] == "muon" else self._adamw_step)(group, parameters, gradients)
        return loss

    def _muon_step(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        from torch.optim._muon import muon

        # Copies where a kernel is laid out channels last; the momentum stays a plain matrix, so that its state can be
        # resumed with either layout
        matrices = [parameter.flatten(1) for parameter in parameters]
        for parameter, matrix in zip(parameters, matrices, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                momentum = torch.zeros_like(matrix, memory_format=torch.contiguous_format)
                self.state[parameter]["momentum_buffer"] = momentum
        muon(
            matrices,
            [gradient.flatten(1) for gradient in gradients],
            [self.state[parameter]["momentum_buffer"] for parameter in parameters],
            lr=group["lr"],
            has_complex=False,
            **{key: group[key] for key in _MUON} | {"ns_coefficients": tuple(group["ns_coefficients"])},
        )
        for parameter, matrix in zip(parameters, matrices, strict=True):
            if matrix.data_ptr() != parameter.data_ptr():
                parameter.copy_(matrix.view(parameter.shape))

    def _adamw_step(self, group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor]) -> None:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        averages, squares, steps = ([state[key] for state in states] for key in ("exp_avg", "exp_avg_sq", "step"))
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            gradients,
            averages,
            squares,
            [],
            steps,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def hidden_kernels(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that Muon is for: kernels and matrices between a network's first and its last convolution.

    These are of convolutions over more than one channel, large kernels that layers share, and linear layers; not
    biases, norms, depth-wise kernels and tables of position biases; and, as torch's documentation says, neither the
    layer that takes the input nor the one that makes the output. (Networks of the family count in their earlier order,
    so that states of earlier versions keep their groups.)
    """
    layers = {
        f"{name}.weight": module for name, module in net.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)
    }
    ordered = [name for name in earlier_order(net) if name in layers] if isinstance(net, ESCFamily) else list(layers)
    edges = {id(layers[name].weight) for name in ordered[:1] + ordered[-1:]}
    linear = {id(layer.weight) for layer in layers.values() if isinstance(layer, nn.Linear)}
    return [
        parameter
        for parameter in net.parameters()
        if id(parameter) not in edges and (id(parameter) in linear or (parameter.ndim == 4 and parameter.shape[1] > 1))
    ]


def muon_groups(params: Iterable[Any], nets: Iterable[nn.Module]) -> Iterator[dict[str, Any]]:
    """The groups of an optimiser, each divided in two: one for Muon (`hidden_kernels` of `nets`) and one for AdamW."""
    hidden = {id(parameter) for net in nets for parameter in hidden_kernels(net)}
    entries = list(params)
    for group in entries if entries and isinstance(entries[0], dict) else [{"params": entries}]:
        for rule in ("muon", "adamw"):
            of_rule = [each for each in group["params"] if (id(each) in hidden) == (rule == "muon")]
            if of_rule:
                yield group | {"params": of_rule, "rule": rule}


#: By the names of option files.
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name: entry
    for name, entry in vars(torch.optim).items()
    if inspect.isclass(entry)
    and issubclass(entry, torch.optim.Optimizer)
    and entry is not torch.optim.Optimizer
    and name not in _UNUSABLE
}
if "Muon" in OPTIMIZERS:
    OPTIMIZERS["Muon"] = ConvMuon


def build_optimizer(kind: str, params: Any, *, nets: Iterable[nn.Module], **options: Any) -> torch.optim.Optimizer:
    """The optimiser that an option file names.

    Args:
        kind: a class of torch.optim.
        params: parameters, or groups of them with options of their own, such as ``lr``.
        nets: the networks that they are of, by which Muon tells what each parameter is.
        options: of the class; lists stand for tuples. On the CPU `fused` is true unless it, or `foreach`, is given:
            one pass over parameters and states in place of ten.

    Raises:
        UserError: torch.optim has no such class, or one that needs another training loop.
        ValueError, TypeError: invalid options of the class.
    """
    cls: Any = OPTIMIZERS.get(kind)
    if cls is None:
        hint = f" {NO_MUON}." if kind == "Muon" else ""
        raise UserError(f"The optimiser {kind!r} is not in torch.optim, which has: {', '.join(OPTIMIZERS)}.{hint}")
    params = list(muon_groups(params, nets) if cls is ConvMuon else params)
    if "fused" in inspect.signature(cls).parameters and not options.keys() & {"fused", "foreach", "differentiable"}:
        each = [p for entry in params for p in (entry["params"] if isinstance(entry, dict) else [entry])]
        if all(p.device.type == "cpu" and p.dtype == torch.float32 for p in each):
            options["fused"] = True
    optimizer: torch.optim.Optimizer = cls(params, **options)
    return optimizer


def type_of(optimizer: torch.optim.Optimizer) -> str:
    """An optimiser's type by the names of option files."""
    return next((name for name, cls in OPTIMIZERS.items() if cls is type(optimizer)), type(optimizer).__name__)


def other_type(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> str | None:
    """The type of the optimiser that saved a state, if it is another: by its ``type``, or the keys of its groups."""
    if "type" in state:
        return None if state["type"] == type_of(optimizer) else str(state["type"])
    now, before = _rule(optimizer.param_groups), _rule(state["param_groups"])
    if isinstance(optimizer, torch.optim.Adam) and _DECOUPLED not in before:  # as before PyTorch 2.7
        now.pop(_DECOUPLED, None)
    if "rule" in before:  # whose groups differ with the parameters that are trained
        return None if "rule" in now else "Muon"
    if now == before:
        return None
    probe = [nn.Parameter(torch.zeros(1, 1))]
    rules = {name: _rule(build_optimizer(name, probe, nets=[], lr=1e-3).param_groups) for name in OPTIMIZERS}
    same = [name for name, rule in rules.items() if rule == before]
    return " or ".join(same) or f"another optimiser, with {', '.join(sorted(before))}"


def _rule(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys of a rule's options, and the one value among them that changes the rule."""
    keys = {key for group in groups for key in group if key not in _HOW}
    return dict.fromkeys(keys) | {key: groups[0].get(key) for key in keys & {_DECOUPLED}}
