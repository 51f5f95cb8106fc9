"""Optimisers by name: those of torch.optim, and its Muon for networks of convolutions."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

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
    https://kellerjordan.github.io/posts/muon/. Both rules are computed by torch's own optimisers.

    Args:
        params: groups with a key ``rule``, muon or adamw, as `muon_groups` makes them. Where a group has a learning
            rate of its own, AdamW's differs from `adamw_lr` by the same factor as Muon's from `lr`.
        lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: of Muon, see there.
        adamw_lr: learning rate of AdamW's parameters; None for `lr`. With ``adjust_lr_fn: match_rms_adamw`` one rate
            suits both.
        adamw_betas, adamw_eps, adamw_weight_decay: of AdamW.

    ValueError for what torch's optimisers refuse, and for an lr of 0.
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
        probe = [torch.zeros(1, 1)]  # torch's own constructors check the values; parameters come with each step
        self._muon = torch.optim.Muon(
            probe, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn
        )
        self._adamw = torch.optim.AdamW(probe, adamw_lr, adamw_betas, adamw_eps, adamw_weight_decay)
        defaults = {"muon": self._muon.defaults, "adamw": self._adamw.defaults}
        rules = [(group, defaults[group["rule"]]) for group in params]
        groups = [rule | group | {"lr": rule["lr"] * (group.get("lr", lr) / lr)} for group, rule in rules]
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        adamw, muon = self._adamw, self._muon
        adamw.state = self.state
        adamw.param_groups = [adamw.defaults | group for group in self.param_groups if group["rule"] == "adamw"]
        loss: float | None = adamw.step(closure)
        matrices = {}
        for group in (group for group in self.param_groups if group["rule"] == "muon"):
            of_group = []
            for parameter in (each for each in group["params"] if each.grad is not None):
                # A copy where a kernel is laid out channels last; the momentum stays a plain matrix, so that its state
                # can be resumed with either layout
                matrix = matrices[parameter] = parameter.flatten(1)
                matrix.grad = parameter.grad.flatten(1)
                if not self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(matrix.contiguous())
                muon.state[matrix] = self.state[parameter]
                of_group.append(matrix)
            muon.param_groups.append(muon.defaults | group | {"params": of_group})
        muon.step()
        muon.param_groups, muon.state = [], defaultdict(dict)  # or gradients would stay in memory
        for parameter, matrix in matrices.items():
            if matrix.data_ptr() != parameter.data_ptr():
                parameter.copy_(matrix.view(parameter.shape))
        return loss


def hidden_kernels(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that Muon is for: kernels and matrices between a network's first and its last layer.

    These are of convolutions over more than one channel, large kernels that layers share, and linear layers; not
    biases, norms, depth-wise kernels and tables of position biases. (Networks of the family count in their earlier
    order, so that states of earlier versions keep their groups.)
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
    """The optimiser that an option file names; UserError if there is none, or it needs another training loop.

    `params` are parameters of `nets`, or groups of them with options of their own, such as ``lr``. The class raises
    ValueError or TypeError for invalid options. On the CPU `fused` is true unless it, or `foreach`, is given: one pass
    over parameters and states in place of ten.
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
