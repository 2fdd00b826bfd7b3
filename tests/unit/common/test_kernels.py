"""The Triton kernels against float64 on a CPU; without a GPU they run in Triton's interpreter."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedsgcg.common.sgcg import loss as sgcg
from fedsgcg.common.sgcg import moments
from fedsgcg.common.sgcg.loss import class_moments, sgcg_loss

pytest.importorskip("triton", reason="Triton is optional")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """Public functions take the kernels for whatever these accept, on a CPU too."""

    def fits(features, widest=None):
        return features.dtype != torch.float64 and (widest is None or features.shape[1] <= widest)

    monkeypatch.setattr(sgcg, "triton_kernels", fits)
    monkeypatch.setattr(moments, "triton_kernels", fits)


def problem(N, A, K, seed=0, size=1.0):
    """Features, labels with ignored pixels, mean and positive covariance, in float32."""
    generator = torch.Generator().manual_seed(seed)
    features = size * torch.randn(N, A, generator=generator)
    labels = torch.randint(0, K, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < 0.2] = 255
    root = torch.randn(K, A, A, generator=generator) / A**0.5
    return features, labels, size * torch.randn(K, A, generator=generator), root @ root.mT


def both(features, labels, mean, covariance, **options):
    """Loss and gradient of the kernel and of the law, all in float64 on the CPU."""
    results = []
    for dtype, device in ((torch.float32, DEVICE), (torch.float64, "cpu")):
        leaf = (
            features.to(device, dtype if dtype == torch.float64 else features.dtype)
            .detach()
            .requires_grad_()
        )
        active = options.get("active")
        here = options | {"active": None if active is None else active.to(device)}
        loss = sgcg_loss(leaf, labels.to(device), mean.to(device), covariance.to(device), **here)
        weights = torch.linspace(0.5, 2, max(loss.numel(), 1), device=device, dtype=loss.dtype)[
            : loss.numel()
        ]
        (gradient,) = torch.autograd.grad((loss.flatten() * weights).sum(), leaf)
        results += [loss.detach().double().cpu(), gradient.double().cpu()]
    return results


def assert_same(found, digits=1e-6):
    loss, gradient, wanted, slope = found
    assert loss.shape == wanted.shape
    assert float((loss - wanted).abs().max()) <= digits * (1 + float(wanted.abs().max()))
    assert float((gradient - slope).norm()) <= 3 * digits * float(slope.norm()) + 1e-12


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("unit_norm", [False, True])
@pytest.mark.parametrize(
    ("N", "A", "K"), [(300, 32, 3), (130, 7, 5), (129, 1, 1), (70, 33, 2), (64, 128, 2), (1, 16, 4)]
)
def test_loss_and_gradient_follow_the_law(N, A, K, unit_norm, reduction):
    features, labels, mean, covariance = problem(N, A, K)
    labels[0] = 0
    options = {
        "temperature": 0.5 if unit_norm else 3.0,
        "unit_norm": unit_norm,
        "reduction": reduction,
    }
    assert_same(both(features, labels, mean, covariance, **options))


@pytest.mark.parametrize(
    "active", [[True, False, True], [False, True, False], [False, False, False]]
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inactive_classes_take_no_part(active, reduction):
    features, labels, mean, covariance = problem(150, 6, 3)
    options = {"temperature": 1.0, "active": torch.tensor(active), "reduction": reduction}
    found = both(features, labels, mean, covariance, **options)
    assert_same(found)
    kept = torch.tensor([y != 255 and active[y] for y in labels.tolist()])
    assert (found[1][~kept] == 0).all()
    if not any(active):
        assert (found[0] == 0).all()


def test_an_empty_selection_and_no_pixel_give_zero_that_stays_connected():
    features, _, mean, covariance = problem(10, 4, 2)
    for chosen in (features, features[:0]):
        leaf = chosen.to(DEVICE).requires_grad_()
        labels = torch.full((len(chosen),), 255, device=DEVICE)
        loss = sgcg_loss(leaf, labels, mean.to(DEVICE), covariance.to(DEVICE), temperature=1.0)
        loss.backward()
        assert loss.item() == 0
        assert leaf.grad.shape == leaf.shape
        assert (leaf.grad == 0).all()


def test_logits_far_above_1e4_stay_finite_and_right():
    features, labels, mean, covariance = problem(100, 8, 3, size=100.0)
    found = both(features, labels, mean, covariance, temperature=0.5)
    assert found[2] > 1e4
    assert_same(found)


def test_a_pixel_of_zeros_keeps_the_gradient_of_the_normalisation():
    features, labels, mean, covariance = problem(5, 8, 2)
    features[2], labels[2] = 0, 1
    assert_same(both(features, labels, mean, covariance, temperature=0.5, unit_norm=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_computed_in_float32(dtype):
    features, labels, mean, covariance = problem(200, 32, 3)
    loss, gradient, wanted, slope = both(
        features.to(dtype), labels, mean, covariance, temperature=0.5, unit_norm=True
    )
    assert abs(loss - wanted) <= 1e-6 * wanted
    assert (
        gradient - slope
    ).norm() <= 8e-3 * slope.norm()  # rounded once to the type of the features


def test_label_types_strides_and_another_ignore_index_do_not_matter():
    features, labels, mean, covariance = problem(90, 12, 3)
    wanted = sgcg_loss(features.double(), labels, mean, covariance, temperature=1.0)
    wide = torch.cat([features, features], 1).to(DEVICE)[:, :12]
    arguments = mean.to(DEVICE), covariance.to(DEVICE)
    for pixels in (wide, features.T.contiguous().T.to(DEVICE)):
        for kind in (torch.uint8, torch.int16, torch.int64):
            found = sgcg_loss(pixels, labels.to(DEVICE, kind), *arguments, temperature=1.0)
            torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-6, atol=1e-6)
    moved = torch.where(labels == 255, -100, labels).to(DEVICE)
    found = sgcg_loss(wide, moved, *arguments, temperature=1.0, ignore_index=-100)
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-6, atol=1e-6)


def test_a_nan_is_not_hidden_by_the_kernel():
    features, labels, mean, covariance = problem(40, 4, 2)
    features[3, 1], labels[3] = math.nan, 255
    found = sgcg_loss(
        *(part.to(DEVICE) for part in (features, labels, mean, covariance)), temperature=1.0
    )
    assert found.isnan()


@pytest.mark.parametrize(("form", "width"), [("diagonal", 8), ("none", 8), ("full", 129)])
def test_what_the_kernel_does_not_hold_takes_the_torch_form(monkeypatch, form, width):
    from fedsgcg.common.sgcg import kernels

    monkeypatch.setattr(kernels, "pixel_losses", None)
    features, labels, mean, covariance = (part.to(DEVICE) for part in problem(20, width, 2))
    assert sgcg_loss(
        features, labels, mean, covariance, temperature=5.0, covariance_form=form
    ).isfinite()


@pytest.mark.parametrize(
    ("N", "A", "K"), [(500, 32, 3), (130, 7, 4), (1, 1, 1), (300, 70, 2), (9000, 3, 2), (0, 3, 2)]
)
def test_moments_follow_the_law(N, A, K):
    features, labels, *_ = problem(N, A, K)
    labels[: N // 2][labels[: N // 2] == K - 1] = 255
    count, mean, scatter = (
        part.cpu() for part in class_moments(features.to(DEVICE), labels.to(DEVICE), K)
    )
    wanted = class_moments(features.double(), labels, K)
    assert torch.equal(count, wanted[0])
    torch.testing.assert_close(mean, wanted[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        scatter, wanted[2], rtol=1e-6, atol=1e-6 * (1 + float(wanted[2].abs().max()))
    )
    assert torch.equal(scatter, scatter.mT)


def test_moments_keep_their_digits_far_from_the_origin():
    features, labels, *_ = problem(3000, 5, 2)
    features = 1e3 + 1e-2 * features
    _, mean, scatter = (
        part.cpu() for part in class_moments(features.to(DEVICE), labels.to(DEVICE), 2)
    )
    _, exact_mean, exact = class_moments(features.double(), labels, 2)
    assert (scatter - exact).norm() <= 1e-7 * exact.norm()
    assert (mean - exact_mean).abs().max() <= 1e-9


@pytest.mark.skipif(DEVICE == "cuda", reason="replaces a product of Triton's interpreter")
@pytest.mark.parametrize("centre", [0.0, 100.0])
@pytest.mark.parametrize("spread", ["normal", "two values"])
def test_moments_hold_their_bound_in_whatever_order_a_tile_is_summed(monkeypatch, centre, spread):
    from triton.runtime import interpreter

    def dot(self, a, b, d, *options):
        """Add in the worst order: from the first to the last row of the tile, in float32."""
        sums = np.cumsum(a.data[:, :, None] * b.data[None], axis=1, dtype=np.float32)[:, -1]
        return interpreter.TensorHandle(sums + d.data, d.dtype.scalar)

    called = []
    monkeypatch.setattr(
        interpreter.InterpreterBuilder, "create_dot", lambda *given: called.append(1) or dot(*given)
    )
    features, labels, *_ = problem(3000, 5, 2)
    features = centre + 1e-2 * (features.sign() if spread == "two values" else features)
    count, mean, scatter = class_moments(features, labels, 2)
    assert called
    rows = [features[labels == k].numpy().astype(np.longdouble) for k in range(2)]
    exact = np.stack([(own - own.mean(0)).T @ (own - own.mean(0)) for own in rows])
    deviation = np.sqrt(np.diagonal(exact, axis1=1, axis2=2))
    assert (
        abs(scatter.numpy() - exact) <= 1e-5 * deviation[:, :, None] * deviation[:, None, :]
    ).all()
    means = np.stack([own.mean(0) for own in rows])
    assert (abs(mean.numpy() - means) <= 1e-5 * deviation / np.sqrt(count.numpy())[:, None]).all()


def test_a_class_seen_by_one_pixel_and_an_absent_class():
    features = torch.tensor([[1.0, 2.0], [3.0, 5.0], [7.0, 7.0]])
    count, mean, scatter = class_moments(
        features.to(DEVICE), torch.tensor([0, 0, 2], device=DEVICE), 4
    )
    assert count.tolist() == [2, 0, 1, 0]
    assert mean.tolist() == [[2, 3.5], [0, 0], [7, 7], [0, 0]]
    assert scatter[0].tolist() == [[2, 3], [3, 4.5]]
    assert (scatter[1:] == 0).all()


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fedsgcg.common.sgcg import kernels

TYPES = dict(
    features="*{0}", labels="*i64", mean="*fp32", covariance="*fp32", shift="*fp32",
    losses="*fp32", kept="*i32", gradient="*{0}", active="*i8", inverse="fp32", counts="*i64",
    first="*fp64", second="*fp64",
)

def build(kernel, dtype, warps, **fixed):
    kinds = {name: TYPES.get(name, "i32").format(dtype) for name in kernel.arg_names}
    signature = {name: "constexpr" if name in fixed else kind for name, kind in kinds.items()}
    constants = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
    source = ASTSource(kernel, signature, constants)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    print(kernel.__name__, dtype, fixed, "shared bytes", built.metadata.shared)
    assert built.asm["cubin"] and built.metadata.shared <= 227 * 1024

for dtype in ("fp32", "bf16"):
    for width, rows in kernels.LOSS_ROWS.items():
        fixed = dict(A=width, WIDTH=width, ROWS=rows, PRECISION="tf32x3")
        fixed |= dict(UNIT_NORM=True, GRADIENT=True)
        build(kernels._loss_kernel, dtype, 8 if width >= 64 else 4, **fixed)
    build(kernels._sums_kernel, dtype, 4, A=70, ROWS=64, COLUMNS=64)
    build(kernels._scatter_kernel, dtype, 4, A=70, ROWS=64, COLUMNS=64, PRECISION="tf32x3")
"""


@pytest.mark.slow
def test_the_kernels_compile_for_hopper_where_there_is_none(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("shared bytes") == 12
