"""Which parameter each entry of an optimiser's state belongs to.

PyTorch's states identify parameters by their places alone, in the order in which the optimiser got them. Ours add names
(``param_names`` of each group, as optimisers of named parameters do) and the optimiser's type. States without names
are in the order of the published networks, which is that of the networks here, or were saved by an early version of
this package, whose networks had another (`earlier_order`). The shapes tell: of a ConvFFN the third tensor is a 3 x 3
kernel, of a ConvAttn a 1 x 1 one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from esc_arch.archs.base import ESCFamily, earlier_order
from esc_arch.modules import FactorBiasWindowAttention

from .optimizers import other_type, type_of

__all__ = ["in_order_of", "named_state"]

#: How many misfits a message lists.
LISTED = 3
#: What optimisers keep per row and per column of a parameter (Adafactor).
_FACTORED = ("row_var", "col_var")

Names = list[list[str]]  # of the parameters of each group


def named_state(model: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state with the names of its parameters and its type."""
    state: dict[str, Any] = optimizer.state_dict()
    groups = zip(state["param_groups"], _named_parameters(model, optimizer), strict=True)
    named = [{**group, "param_names": list(parameters)} for group, parameters in groups]
    return {**state, "param_groups": named, "type": type_of(optimizer)}


def in_order_of(model: Any, states: Sequence[Mapping[str, Any]], *, earlier: bool) -> list[dict[str, Any]]:
    """The states of a model's optimisers, as it can load them: each entry in the place of its parameter.

    Where states without names fit in both orders, they are in the `earlier` one, or not. ValueError if they are of
    other optimisers, parameters or groups.
    """
    if len(states) != len(model.optimizers):
        raise ValueError(f"it has {len(states)} optimisers, and the option file makes {len(model.optimizers)}")
    pairs = zip(model.optimizers, states, strict=True)
    return [_in_order(model, optimizer, state, earlier) for optimizer, state in pairs]


def _in_order(model: Any, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], earlier: bool) -> dict[str, Any]:
    option = next((key for key, value in vars(model).items() if value is optimizer), "").replace("optimizer_", "optim_")
    if (other := other_type(optimizer, state)) is not None:
        raise ValueError(f"train: {option}: type is {type_of(optimizer)}, and the state was saved by {other}")
    named, groups = _named_parameters(model, optimizer), state["param_groups"]
    names: Names = [list(parameters) for parameters in named]
    shapes = {name: parameter.shape for parameters in named for name, parameter in parameters.items()}
    if "type" in state:
        candidates = [[group["param_names"] for group in groups]]
    else:
        candidates = [names, _earlier_order(model, names)][:: -1 if earlier else 1]
    found = [(candidate, list(_misfits(candidate, state, names, shapes))) for candidate in candidates]
    order, misfits = min(found, key=lambda pair: len(pair[1]))
    if misfits:
        more = f"; and {len(misfits) - LISTED} more" if len(misfits) > LISTED else ""
        raise ValueError(f"{option}: {'; '.join(misfits[:LISTED])}{more}")
    entries = {
        name: dict(state["state"][place])
        for of_group, group in zip(order, groups, strict=True)
        for name, place in zip(of_group, group["params"], strict=True)
        if place in state["state"]
    }
    if order is not names and "type" not in state:
        _rescale_factors(model, entries)
    places = {name: place for place, name in enumerate(shapes)}
    return {
        "state": {place: entries[name] for name, place in places.items() if name in entries},
        "param_groups": [
            {key: value for key, value in group.items() if key != "param_names"}
            | {"params": [places[name] for name in of_group]}
            for group, of_group in zip(groups, names, strict=True)
        ],
    }


def _misfits(order: Names, state: Mapping[str, Any], names: Names, shapes: Mapping[str, torch.Size]) -> Iterator[str]:
    """What does not fit the parameters `names` of an optimiser, if a state's entries are in this order."""
    groups = state["param_groups"]
    saved, wanted = [len(group["params"]) for group in groups], [len(of_group) for of_group in names]
    if "type" in state:
        before, now = (
            {name: number for number, of_group in enumerate(side) for name in of_group} for side in (order, names)
        )
        yield from (f"{name} is trained now and was not" for name in now if name not in before)
        yield from (f"{name} was trained and is not now" for name in before if name not in now)
        yield from (f"{name} is in another group" for name in now if before.get(name, now[name]) != now[name])
    elif saved != wanted:
        sizes = [" + ".join(map(str, side)) for side in (saved, wanted)]
        yield f"it is of {sizes[0]} parameter tensors, and the option file trains {sizes[1]}"
    if saved != wanted:
        return
    for of_group, group in zip(order, groups, strict=True):
        for name, place in zip(of_group, group["params"], strict=True):
            for key, value in state["state"].get(place, {}).items():
                if name in shapes and isinstance(value, Tensor) and not _fits(key, value.shape, shapes[name]):
                    yield f"{name} is {tuple(shapes[name])}, and its {key} {tuple(value.shape)}"


def _fits(key: str, shape: torch.Size, parameter: torch.Size) -> bool:
    if key in _FACTORED:
        return len(shape) == len(parameter) and all(a in (1, b) for a, b in zip(shape, parameter, strict=True))
    # ConvMuon's are matrices; counters of steps have one element
    return shape.numel() == 1 or shape == parameter or shape == (*parameter[:1], parameter[1:].numel())


def _rescale_factors(model: Any, entries: dict[str, Any]) -> None:
    """FlashBias's q factors, which earlier versions divided by sqrt(rank) when used: gradients have grown by that."""
    for network, net in _networks(model).items():
        for path, module in net.named_modules():
            entry = entries.get(f"{network}.{path}.flashbias_q")
            if entry is not None and isinstance(module, FactorBiasWindowAttention) and not module.scaled:
                rank = module.flashbias_q.shape[-1]
                for key, value in entry.items():
                    if isinstance(value, Tensor) and value.ndim:
                        entry[key] = value * (rank if "sq" in key else rank**0.5)


def _networks(model: Any) -> dict[str, nn.Module]:
    return {name: model.get_bare_model(net) for name, net in vars(model).items() if isinstance(net, nn.Module)}


def _named_parameters(model: Any, optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    """The parameters of each group, by name with the network's before it (`net_g.proj.weight`)."""
    known = {
        id(parameter): f"{network}.{name}"
        for network, net in reversed(_networks(model).items())  # of several names the first counts
        for name, parameter in net.named_parameters()
    }
    return [
        {known.get(id(each), f"parameter {number}.{place}"): each for place, each in enumerate(group["params"])}
        for number, group in enumerate(optimizer.param_groups)
    ]


def _earlier_order(model: Any, names: Names) -> Names:
    """The same names, in the order of earlier versions."""
    places = {
        f"{network}.{name}": place
        for network, net in _networks(model).items()
        if isinstance(net, ESCFamily)
        for place, name in enumerate(earlier_order(net))
    }
    return [sorted(of_group, key=lambda name: places.get(name, 0)) for of_group in names]
