"""A whole network as CUDA graphs: for inference at sizes that come again, without the cost of launching each kernel.

A graph is recorded for each shape, type and layout of input. Replaying it runs the same kernels on the same numbers, so
the result is that of the network itself, to the last bit where its kernels are deterministic.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor, nn

from esc_arch.errors import UserError

__all__ = ["GraphedNetwork", "graphed"]

#: Calls before recording: libraries and kernels choose their algorithms in the first ones.
WARM_UP_CALLS = 3


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    image: Tensor
    output: Tensor


class GraphedNetwork:
    """Calls a network by replaying CUDA graphs. Make one with `graphed`.

    Every kept shape holds the memory that the network needs for it. Weights that changed since (`load_state_dict`, an
    optimiser's step, `to`) are noticed, and everything is recorded again. After putting other Parameters in the place
    of some, call `forget`.
    """

    def __init__(self, net: nn.Module, *, keep: int) -> None:
        if keep < 1:
            raise UserError(f"keep is {keep}; at least 1 shape must be kept.")
        self.net = net
        self.keep = keep
        self._recordings: OrderedDict[tuple[object, ...], _Recording] = OrderedDict()
        self._weights: list[Tensor] = []
        self._versions: list[tuple[int, int]] = []

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """The network's output for this input, in memory of its own.

        Args:
            image: (B, 3, H, W), on a CUDA device.

        Returns:
            (B, 3, H * s, W * s) for a network of scale s.

        Raises:
            UserError: the input is not on a CUDA device, or the network is in training mode.
        """
        if self._versions != _versions(self._weights):
            self.forget()
        if self.net.training:
            raise UserError("CUDA graphs are for inference; this network is in training mode: call net.eval() first.")
        key = (image.shape, image.stride(), image.dtype, image.device, *_modes(image.device.type))
        recording = self._recordings.pop(key, None) or self._record(image)
        self._recordings[key] = recording
        while len(self._recordings) > self.keep:
            self._recordings.popitem(last=False)
        recording.image.copy_(image)
        recording.graph.replay()
        return recording.output.clone(memory_format=torch.preserve_format)

    def forget(self) -> None:
        """Drop all graphs and their memory."""
        self._recordings.clear()
        self._weights = []
        self._versions = []

    def _record(self, image: Tensor) -> _Recording:
        self._weights = [*self.net.parameters(), *self.net.buffers()]
        self._versions = _versions(self._weights)
        _check_devices([image, *self._weights])
        static = image.clone(memory_format=torch.preserve_format)
        with torch.cuda.device(image.device):
            # On a stream of its own, so that what libraries allocate at first use stays out of the graph
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP_CALLS):
                    self.net(static)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Weights that autocast has cast belong to its cache, not to the graph, which must cast its own
            torch.clear_autocast_cache()
            with torch.cuda.graph(graph):
                output = self.net(static)
            torch.clear_autocast_cache()
        return _Recording(graph, static, output)


def graphed(net: nn.Module, example: Tensor | None = None, *, keep: int = 4) -> GraphedNetwork:
    """The same network for inference, replayed as a CUDA graph for each shape of input.

    The first call with a shape takes several times as long as the network itself, later ones no launches. The
    precision of float32 counts as it is when a shape is first seen; each setting of autocast has graphs of its own.

    Args:
        net: in evaluation mode, on a CUDA device; also one that torch.compile made.
        example: an input to record at once, (B, 3, H, W).
        keep: shapes to keep; beyond, the one not used for longest is dropped.

    Raises:
        UserError: `keep` is below 1, or, given an example, as of a call.
    """
    network = GraphedNetwork(net, keep=keep)
    if example is not None:
        network(example)
    return network


def _versions(tensors: list[Tensor]) -> list[tuple[int, int]]:
    """What differs after a change: where the numbers are, and how often they were written to."""
    return [(tensor.data_ptr(), tensor._version) for tensor in tensors]


def _check_devices(tensors: list[Tensor]) -> None:
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1 or tensors[0].device.type != "cuda":
        raise UserError(
            "CUDA graphs need the network and its input on one CUDA device; here they are on "
            f"{' and '.join(sorted(map(str, devices)))}. Call the network itself instead."
        )


def _modes(device: str) -> tuple[object, ...]:
    """What else decides which kernels run."""
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
