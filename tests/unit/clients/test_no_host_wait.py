"""The GPU path reads no tensor values: with meta tensors, which have none, a read would fail."""

from contextlib import nullcontext

import pytest
import torch

from fedsgcg.clients.methods.amplitude import (
    mix_amplitude,
    mix_window_amplitudes,
    window_amplitudes,
)
from fedsgcg.common.sgcg.loss import class_moments, reduce_labels, sgcg_loss


@pytest.fixture(autouse=True)
def _no_autocast(monkeypatch):
    """Meta tensors know no autocast, whose only effect here is that there is none."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def pixels(A=8, K=3, N=50):
    labels = torch.randint(0, K, (N,), device="meta")
    return (
        torch.randn(N, A, device="meta"),
        labels,
        torch.randn(K, A, device="meta"),
        torch.randn(K, A, A, device="meta"),
    )


def test_the_judge_notices_a_wait():
    with pytest.raises(RuntimeError, match="meta"):
        torch.ones(3, device="meta").sum().item()


@pytest.mark.parametrize("form", ["full", "diagonal", "none"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("unit_norm", [False, True])
def test_loss_and_gradient_check_their_input_without_a_wait(form, reduction, unit_norm):
    active = torch.ones(3, dtype=torch.bool, device="meta")
    options = {
        "covariance_form": form,
        "reduction": reduction,
        "unit_norm": unit_norm,
        "active": active,
    }
    features, *rest = pixels()
    loss = sgcg_loss(features.requires_grad_(), *rest, temperature=0.5, **options)
    assert loss.shape == (() if reduction == "mean" else (50,))
    loss.sum().backward()
    assert features.grad.shape == features.shape


def test_shapes_types_and_settings_are_still_refused():
    features, labels, mean, covariance = pixels()
    for change, message in (
        (
            (features[:, :7], labels, mean, covariance),
            r"mean: found shape \(3, 8\), expected \(any, 7\)",
        ),
        (
            (features, labels[:-1], mean, covariance),
            r"labels: found shape \(49,\), expected \(50\)",
        ),
        ((features, labels, mean.half(), covariance), "mean: found torch.float16"),
        ((features, labels, mean, covariance[:, :, :7]), r"covariance: found shape \(3, 8, 7\)"),
    ):
        with pytest.raises(ValueError, match=message):
            sgcg_loss(*change, temperature=0.5)
    with pytest.raises(ValueError, match="temperature: found 0"):
        sgcg_loss(features, labels, mean, covariance, temperature=0)


def test_moments_labels_and_mixing_do_not_wait():
    features, labels, *_ = pixels()
    assert all(part.device.type == "meta" for part in class_moments(features, labels, 3))
    assert reduce_labels(labels.view(2, 5, 5), 5, 3).shape == (2, 1, 1)
    images, ratio = torch.randn(2, 3, 32, 48, device="meta"), torch.rand(2, device="meta")
    assert mix_amplitude(images, images, ratio).shape == images.shape
    assert mix_window_amplitudes(images, window_amplitudes(images), ratio).shape == images.shape
