"""A training step as one CUDA graph: a small U-Net is bound by launching its kernels, not by running them.

An eager step of this network is 1 500 to 2 000 launches (performance.md 4). Captured once for each shape of a batch,
it is one. On a CPU a step is simply called.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

WARM_STEPS: Final = 3
"""Steps of a shape that run eagerly first: they choose algorithms and make the optimiser's moments."""

Step = Callable[..., Tensor]


def adam(
    groups: Sequence[dict[str, Any]], rate: float, weight_decay: float, device: torch.device
) -> torch.optim.Adam:
    """Make the fused Adam; on a GPU rate and step counter lie there, so that a step can be captured.

    Args:
        groups: Parameter groups; each may have a `factor` that scales its rate.
        rate: Learning rate to begin with.
        weight_decay: L2 penalty.
        device: Where the parameters lie.
    """
    on_gpu = device.type == "cuda"
    own = [dict(group) for group in groups]
    for group in own:  # a tensor of its own for each: the default would be shared
        group["lr"] = (
            torch.tensor(rate * group.get("factor", 1.0), device=device) if on_gpu else rate
        )
    return torch.optim.Adam(own, lr=rate, weight_decay=weight_decay, fused=True, capturable=on_gpu)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the rate, without a wait where the rate is a tensor on a device."""
    for group in optimizer.param_groups:
        value = rate * group.get("factor", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


class Replay:
    """Calls a step, on a GPU as a captured graph from the fourth call of a shape on.

    The first calls are real steps too, so a run takes the same steps on the same batches with and without a graph.

    Args:
        step: Takes tensors, trains, returns a tensor of figures. It reads no value back to the host, draws no random
            numbers, and sets the gradients to None first. What else it uses (weights, prototypes, the optimiser's
            state) must stay at its place in memory and may be overwritten in place.
        clear: Sets the gradients to None; a graph needs gradients of its own.
        device: Where it computes.
    """

    def __init__(self, step: Step, clear: Callable[[], None], device: torch.device) -> None:
        self._step, self._clear, self._device = step, clear, device
        self._seen: dict[Hashable, int] = {}
        self._captured: dict[Hashable, tuple[list[Tensor], Callable[[], Tensor]]] = {}

    def __call__(self, *tensors: Tensor, key: Hashable = ()) -> Tensor:
        """Take one step.

        Args:
            tensors: What the step takes, on the device.
            key: Whatever else the step depends on that is not a tensor (sizes of the domains, parts of a batch).

        Returns:
            The step's figures; they stay valid.
        """
        if self._device.type == "cpu":
            return self._step(*tensors)
        shape = key, *((tensor.shape, tensor.dtype, tensor.stride()) for tensor in tensors)
        if shape not in self._captured:
            self._seen[shape] = self._seen.get(shape, 0) + 1
            if self._seen[shape] <= WARM_STEPS:
                return self._beside(lambda: self._step(*tensors))
            inputs = [tensor.clone() for tensor in tensors]
            self._clear()
            self._captured[shape] = inputs, self._capture(lambda: self._step(*inputs))
        inputs, replay = self._captured[shape]
        for own, given in zip(inputs, tensors, strict=True):
            own.copy_(given)
        return replay().clone()

    def _beside(self, work: Callable[[], Tensor]) -> Tensor:
        """Run on a side stream, where a capture looks for what was allocated before it."""
        main = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(main)
        with torch.cuda.stream(side):
            figures = work()
        main.wait_stream(side)
        figures.record_stream(main)
        return figures

    def _capture(self, work: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Record the launches of `work`, which does not run yet; the result runs them all at once."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, capture_error_mode="thread_local"
        ):  # another thread may be sending batches
            figures = work()

        def replay() -> Tensor:
            graph.replay()
            return figures

        return replay
