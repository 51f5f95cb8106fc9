"""A whole network as CUDA graphs: for inference at recurring sizes, without the cost of launching each kernel.

A graph is recorded for each shape, type and layout of input. Replaying it runs the same kernels on the same numbers, so
the result is that of the network itself, to the last bit where its kernels are deterministic.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from esc_arch.errors import UserError

__all__ = ["GraphedNetwork"]

#: Calls before recording: libraries and kernels choose their algorithms in the first ones.
WARM_UP_CALLS = 3
#: A graph, its input and its output.
_Recording = tuple[torch.cuda.CUDAGraph, Tensor, Tensor]


class GraphedNetwork:
    """Calls a network by replaying CUDA graphs.

    The first call with a shape takes several times as long as the network itself. The precision of float32 is the one
    set then; each setting of autocast has graphs of its own. Weights that changed (`load_state_dict`, an optimiser's
    step, `to`) are noticed, and everything is recorded again. After replacing Parameters by others, call `forget`.

    Args:
        net: in evaluation mode, on a CUDA device; also one that torch.compile made.
        keep: shapes to keep, each with the memory that the network needs for it; beyond, the least recently used one
            is dropped.
    """

    def __init__(self, net: nn.Module, *, keep: int = 4) -> None:
        self.net = net
        self.keep = keep
        self.forget()

    def forget(self) -> None:
        """Drop all graphs and their memory."""
        self._recordings: dict[tuple[object, ...], _Recording] = {}  # the least recently used first
        self._weights: list[Tensor] = []
        self._versions: list[tuple[int, int]] = []

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        """The network's output (B, 3, H * s, W * s) at scale s for `image` (B, 3, H, W), in memory of its own.

        Raises:
            UserError: the input is not on a CUDA device, or the network is in training mode.
        """
        if self._versions != _versions(self._weights):
            self.forget()
        if self.net.training:
            raise UserError("CUDA graphs are for inference; this network is in training mode: call net.eval() first.")
        device = image.device.type
        autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        key = (image.shape, image.stride(), image.dtype, image.device, *autocast)
        recording = self._recordings.pop(key) if key in self._recordings else None
        graph, static, output = self._recordings[key] = recording or self._record(image)
        while len(self._recordings) > self.keep:
            del self._recordings[next(iter(self._recordings))]
        static.copy_(image)
        graph.replay()
        return output.clone(memory_format=torch.preserve_format)

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
        return graph, static, output


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
