"""A batch that does not fit is halved, and the step stays the same step."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from clients.memory import fitting, parts_of
from common.errors import FedsgcgError


def full() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_the_parts_together_give_the_gradient_of_the_batch(parts):
    torch.manual_seed(0)
    network = nn.Conv2d(3, 2, 3).double()
    images, labels = torch.randn(8, 3, 6, 6).double(), torch.randint(0, 2, (8, 4, 4))
    functional.cross_entropy(network(images), labels).backward()
    whole = [parameter.grad.clone() for parameter in network.parameters()]
    network.zero_grad()
    shares = []
    for some, truth, share in parts_of(images, labels, parts):
        (share * functional.cross_entropy(network(some), truth)).backward()
        shares.append(share)
    assert len(shares) == parts
    assert sum(shares) == pytest.approx(1)
    for parameter, expected in zip(network.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, expected)


@pytest.mark.parametrize(("size", "parts", "cut"), [(8, 4, [2, 2, 2, 2]), (5, 4, [3, 2]), (3, 2, [3]), (2, 4, [2])])
def test_no_part_is_a_single_slice(size, parts, cut):
    batch = torch.zeros(size, 3, 2, 2), torch.zeros(size, 2, 2)
    assert [len(images) for images, _, _ in parts_of(*batch, parts)] == cut


@pytest.mark.parametrize("fits", [1, 2, 4])
def test_a_step_is_done_in_as_few_parts_as_fit(fits):
    tried = []

    def step(parts: int) -> str:
        tried.append(parts)
        if parts < fits:
            raise full()
        return "done"

    result, halvings = fitting(step)
    assert (result, 2**halvings) == ("done", fits)
    assert tried == [parts for parts in (1, 2, 4) if parts <= fits]
    assert fitting(step, halvings) == ("done", halvings), "the next step begins where this one ended"


def test_what_never_fits_is_an_error_with_advice():
    def step(parts: int) -> None:
        raise full()

    with pytest.raises(FedsgcgError, match="SITE-502") as caught:
        fitting(step)
    assert "batch_size" in caught.value.problems[0].action


def test_other_errors_are_not_hidden():
    def step(parts: int) -> None:
        raise ValueError("another one")

    with pytest.raises(ValueError, match="another one"):
        fitting(step)
