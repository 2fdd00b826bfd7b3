"""The SgCG loss, forward and backward, against einsum, ISDA, SePiCo and the bare GEMM.

Tried for the CPU implementation and slower in paired runs (AVX-512 core, one thread): one product
with all covariances side by side (the product is faster, but the passes over its strided result
cost 5 to 20 % of the total), a transposed layout, batched products, vecdot and batched row products
for the quadratic terms, a batched product for the gradient, chunks of 1 MiB (the overhead of twenty
operations outweighs the cache). The remaining cost above the GEMM is four to five passes over the
products, which only a fused kernel would avoid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fedsgcg.common.sgcg.loss import sgcg_loss
from tests.benchmarks import peers
from tests.benchmarks.harness import at_least, extra_memory, one_thread, paired, ratio, row, show

TEMPERATURE = 0.5
CASES = ((65536, 32, 3), (65536, 64, 3), (16384, 64, 19), (16384, 256, 3), (4096, 256, 19))
MAX_GATHER_ELEMENTS = 1 << 28
PART = "sgcg_loss forward+backward"


def inputs(
    N: int, A: int, K: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return unit-length post-ReLU features, as from the network, labels, means and covariances."""
    generator = torch.Generator().manual_seed(0)
    features = torch.nn.functional.normalize(
        torch.randn(N, A, generator=generator, dtype=dtype).relu()
    )
    labels = torch.randint(0, K, (N,), generator=generator)
    root = torch.randn(K, A, A, generator=generator, dtype=dtype) / A
    return (
        features,
        labels,
        torch.randn(K, A, generator=generator, dtype=dtype) / A**0.5,
        root @ root.mT,
    )


def run() -> list[dict[str, Any]]:
    """Measure every case and return the rows."""
    with one_thread():
        return show([line for case in CASES for line in _case(*case)])


def _case(N: int, A: int, K: int) -> list[dict[str, Any]]:
    features, labels, mean, covariance = inputs(N, A, K)
    leaf = features.clone().requires_grad_()
    stacked = covariance.permute(1, 0, 2).reshape(A, K * A).contiguous()
    product = torch.empty(N, K * A)

    def ours() -> Tensor:
        return _gradient(leaf, sgcg_loss(leaf, labels, mean, covariance, temperature=TEMPERATURE))

    def peer(loss: Any) -> Any:
        return lambda: _gradient(leaf, loss(leaf, labels, mean, covariance, TEMPERATURE))

    variants = {
        "ours": ours,
        "einsum": peer(peers.einsum_loss),
        "diagonal": peer(peers.diagonal_loss),
        "gemm": lambda: torch.mm(features, stacked, out=product),
    }
    case = f"N={N} A={A} K={K}"
    rows = _rows(case, paired(variants), (N, A, K), extra_memory(ours))
    if N * A * A <= MAX_GATHER_ELEMENTS:
        times = paired({"ours": ours, "gather": peer(peers.gather_loss)}, rounds=3)
        rows.append(
            row(PART, case, "gather of Sigma_y / ours", ratio(times, "gather", "ours"), "x")
        )
    return rows


def _rows(
    case: str, times: dict[str, list[float]], shape: tuple[int, int, int], memory: float
) -> list[dict[str, Any]]:
    N, A, K = shape
    einsum, ceiling = ratio(times, "einsum", "ours"), ratio(times, "gemm", "ours")
    wanted = 4.0 if (N, A, K) == (65536, 32, 3) else None
    share = 0.8 if A >= 256 else {64: 0.5}.get(A)
    room = (1.5 * N * A * 4) / 2**20 + 4
    return [
        row(PART, case, "einsum / ours", einsum, "x", *_judged(einsum, wanted, "≥ 4x")),
        row(
            PART,
            case,
            "share of the GEMM ceiling",
            ceiling,
            "",
            *_judged(ceiling, share, f"≥ {share}"),
        ),
        row(PART, case, "GEMM ceiling", _speed(times["gemm"], 2 * N * K * A**2), "GFLOP/s"),
        row(PART, case, "SePiCo's diagonal / ours", ratio(times, "diagonal", "ours"), "x"),
        row(PART, case, "extra memory", memory, "MiB", f"≤ {room:.1f} MiB", memory <= room),
        row(
            PART, case, "ours", ratio({**times, "1": [1.0] * len(times["ours"])}, "ours", "1"), "ms"
        ),
    ]


def _speed(milliseconds: list[float], operations: int) -> tuple[float, float, float]:
    """Return median and quartiles of 1e9 operations per second."""
    return ratio(
        {"work": [operations / 1e6] * len(milliseconds), "time": milliseconds}, "work", "time"
    )


def _judged(
    value: tuple[float, float, float], target: float | None, text: str
) -> tuple[str, bool | None]:
    return ("", None) if target is None else (text, at_least(value, target))


def _gradient(leaf: Tensor, loss: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient
