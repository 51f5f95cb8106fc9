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
NO_MUON = f"Muon comes with PyTorch 2.9, and this is {torch.__version__}"


class ConvMuon(torch.optim.Optimizer):
    """`torch.optim.Muon` for kernels of convolutions, and AdamW for everything else, as one optimiser.

    A kernel is to Muon the matrix (out channels, in channels * height * width): Jordan et al.,
    https://kellerjordan.github.io/posts/muon/. The arithmetic of both rules is torch's own.

    Args:
        params: groups with a key ``rule``, muon or adamw, as `muon_groups` makes them. Those with a learning rate of
            their own are given it in terms of `lr`; AdamW's then differ from `adamw_lr` by the same factor.
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
        muon = {
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        adam = {"betas": adamw_betas, "eps": adamw_eps, "weight_decay": adamw_weight_decay}
        probe = [torch.zeros(1, 1)]  # torch's own constructors know which values are allowed
        torch.optim.Muon(probe, lr=lr, **muon)  # type: ignore[arg-type]
        torch.optim.AdamW(probe, lr=adamw_lr, **adam)  # type: ignore[arg-type]
        groups = []
        for group in params:
            of_muon = group["rule"] == "muon"
            factor = group.get("lr", lr) / lr
            groups.append((muon if of_muon else adam) | group | {"lr": (lr if of_muon else adamw_lr) * factor})
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.grad is not None]
            (self._muon_step if group["rule"] == "muon" else self._adamw_step)(trained, group)
        return loss

    def _muon_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        from torch.optim._muon import muon

        # Copies where a kernel is laid out channels last; the momentum stays a plain matrix, so that its state can be
        # resumed with either layout
        matrices = [parameter.flatten(1) for parameter in parameters]
        gradients = [parameter.grad.flatten(1) for parameter in parameters if parameter.grad is not None]
        for parameter, matrix in zip(parameters, matrices, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(
                    matrix, memory_format=torch.contiguous_format
                )
        muon(
            matrices,
            gradients,
            [self.state[parameter]["momentum_buffer"] for parameter in parameters],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=group["nesterov"],
            ns_coefficients=tuple(group["ns_coefficients"]),
            eps=group["eps"],
            ns_steps=group["ns_steps"],
            adjust_lr_fn=group["adjust_lr_fn"],
            has_complex=False,
        )
        for parameter, matrix in zip(parameters, matrices, strict=True):
            if matrix.data_ptr() != parameter.data_ptr():
                parameter.copy_(matrix.view(parameter.shape))

    def _adamw_step(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        states = [self.state[parameter] for parameter in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def hidden_kernels(net: nn.Module) -> list[nn.Parameter]:
    """The parameters of a network that Muon is for: kernels and matrices between its first and its last convolution.

    Those of convolutions over more than one channel, a large kernel that layers share among them, and of linear
    layers. Left out are biases, norms, depth-wise kernels and tables of position biases; and, as torch's
    documentation says, what takes the input and what makes the output: the first and the last of these layers.
    (Networks of the family count in their earlier order, so that states of earlier versions keep their groups.)
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
        of_muon = [parameter for parameter in group["params"] if id(parameter) in hidden]
        others = [parameter for parameter in group["params"] if id(parameter) not in hidden]
        for rule, parameters in (("muon", of_muon), ("adamw", others)):
            if parameters:
                yield group | {"params": parameters, "rule": rule}


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
        nets: the networks that they are of; Muon tells by them what each parameter is.
        options: of the class; lists stand for tuples. On the CPU `fused` is true unless it, or `foreach`, is given:
            one pass over parameters and states in place of ten.

    Raises:
        UserError: torch.optim has no such class, or one that needs another training loop.
        ValueError, TypeError: options that the class does not take.
    """
    cls: Any = OPTIMIZERS.get(kind)
    if cls is None:
        hint = f" {NO_MUON}." if kind == "Muon" else ""
        raise UserError(f"The optimiser {kind!r} is not in torch.optim, which has: {', '.join(OPTIMIZERS)}.{hint}")
    params = list(muon_groups(params, nets) if cls is ConvMuon else params)
    chosen = options.keys() & {"fused", "foreach", "differentiable"}
    if "fused" in inspect.signature(cls).parameters and not chosen and _fuses(params):
        options["fused"] = True
    optimizer: torch.optim.Optimizer = cls(params, **options)
    return optimizer


def type_of(optimizer: torch.optim.Optimizer) -> str:
    """An optimiser's type by the names of option files."""
    return next((name for name, cls in OPTIMIZERS.items() if cls is type(optimizer)), type(optimizer).__name__)


def other_type(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> str | None:
    """The type of the optimiser that a state was saved by, if it is another than this one's.

    Args:
        state: a state dict; where it does not say the type (``type``), the names of its rule's numbers do.
    """
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
    exact = [name for name, rule in rules.items() if rule == before]
    close = [name for name, rule in rules.items() if rule.keys() - {_DECOUPLED} == before.keys() - {_DECOUPLED}]
    return " or ".join(exact or close) or "another optimiser"


def _rule(groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The names of a rule's numbers, and the one value among them that changes the rule."""
    keys = {key for group in groups for key in group if key not in _HOW}
    return dict.fromkeys(keys) | {key: groups[0].get(key) for key in keys & {_DECOUPLED}}


def _fuses(params: list[Any]) -> bool:
    """Whether PyTorch's fused rules take these parameters, or groups of them, and are faster than its others."""
    parameters = [each for entry in params for each in (entry["params"] if isinstance(entry, dict) else [entry])]
    return all(each.device.type == "cpu" and each.dtype == torch.float32 for each in parameters)
