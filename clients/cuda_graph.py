"""Replays a training step as one CUDA graph.

For a small U-Net, launching kernels takes longer than running them: an eager step has 1 500 to 2
000 launches, a captured one has a single launch. A step is captured once for each batch shape. On a
CPU it is called directly.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

WARM_STEPS: Final = 3
"""Eager steps before a capture; they select algorithms and allocate optimiser state."""

Step = Callable[..., Tensor]


def adam(
    groups: Sequence[dict[str, Any]], rate: float, weight_decay: float, device: torch.device
) -> torch.optim.Adam:
    """Build a fused Adam whose step can be captured, with rate and step counter on the GPU.

    Args:
        groups: Parameter groups; an optional `factor` scales a group's rate.
        rate: Initial learning rate.
        weight_decay: L2 penalty.
        device: Device of the parameters.
    """
    on_gpu = device.type == "cuda"
    own = [dict(group) for group in groups]
    for group in own:
        # Each group needs its own tensor; the default rate would be shared.
        scaled = rate * group.get("factor", 1.0)
        group["lr"] = torch.tensor(scaled, device=device) if on_gpu else rate
    return torch.optim.Adam(own, lr=rate, weight_decay=weight_decay, fused=True, capturable=on_gpu)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set every group's learning rate without synchronising with the device."""
    for group in optimizer.param_groups:
        value = rate * group.get("factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


class Replay:
    """Calls a step; on a GPU, from the fourth call with a shape on, as a captured graph.

    The first calls are real steps, so a run takes the same steps on the same batches with and
    without a graph.

    Args:
        step: Takes tensors, trains, returns a tensor of metrics. It must not read values back to
            the host nor draw random numbers, and must set the gradients to None first. Whatever
            else it uses (weights, prototypes, optimiser state) must keep its address in memory and
            may be overwritten in place.
        clear: Sets the gradients to None, because a graph allocates its own.
        device: Device of the step.
    """

    def __init__(self, step: Step, clear: Callable[[], None], device: torch.device) -> None:
        self._step = step
        self._clear = clear
        self._device = device
        self._seen: dict[Hashable, int] = {}
        self._captured: dict[Hashable, tuple[list[Tensor], Callable[[], Tensor]]] = {}

    def __call__(self, *tensors: Tensor, key: Hashable = ()) -> Tensor:
        """Take one step.

        Args:
            tensors: The step's arguments, on the device.
            key: Other inputs that determine the step (sizes of the domains, parts of a batch).

        Returns:
            The step's metrics, copied out of the graph's memory.
        """
        if self._device.type == "cpu":
            return self._step(*tensors)
        shape = key, *((tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors)
        if shape not in self._captured:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= WARM_STEPS:
                return self._on_side_stream(lambda: self._step(*tensors))
            inputs = [tensor.clone() for tensor in tensors]
            self._clear()
            self._captured[shape] = inputs, self._capture(lambda: self._step(*inputs))
        inputs, replay = self._captured[shape]
        for own, given in zip(inputs, tensors, strict=True):
            own.copy_(given)
        return replay().clone()

    def _on_side_stream(self, work: Callable[[], Tensor]) -> Tensor:
        """Run on a side stream, as CUDA graphs require of the steps before a capture."""
        main = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            figures = work()
        main.wait_stream(side)
        figures.record_stream(main)
        return figures

    def _capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record the launches of `work` without running them; return their replay."""
        graph = torch.cuda.CUDAGraph()
        # Thread-local, because another thread may be sending batches to the device.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            figures = work()

        def replay() -> Tensor:
            graph.replay()
            return figures

        return replay
