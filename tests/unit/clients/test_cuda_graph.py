"""Prefetched batches and replayed steps equal plain ones, in the same order."""

import threading

import pytest
import torch

from fedsgcg.clients.cuda_graph import WARM_STEPS, Replay, adam, set_rate
from fedsgcg.clients.data.prefetch import prefetch, read_ahead, upload

CPU = torch.device("cpu")
CUDA = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def batches(count=7):
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        yield (
            torch.randn(2 + number % 2, 3, generator=generator),
            torch.tensor([number]),
            (number, "sizes"),
        )


def test_on_a_cpu_the_batches_pass_through_untouched():
    made = list(batches())
    for given, found in zip(made, prefetch(iter(made), CPU), strict=True):
        assert found is given
    assert upload(made[0][0], CPU) is made[0][0]


@pytest.mark.parametrize("ahead", [0, 1, 3, 50])
def test_reading_ahead_keeps_every_item_and_the_order(ahead):
    assert list(read_ahead(range(20), lambda number: number**2, ahead)) == [
        number**2 for number in range(20)
    ]
    assert list(read_ahead([], str, ahead)) == []


def test_reading_ahead_takes_no_more_than_it_may():
    taken = []

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    reader = read_ahead(items(), lambda number: number, ahead=3)
    assert next(reader) == 0
    reader.close()
    assert len(taken) <= 1 + 3


def test_an_error_comes_up_where_its_batch_would_have_come_and_the_thread_ends():
    def items():
        yield 1
        yield 2
        raise OSError("the cache is gone")

    reader = read_ahead(items(), lambda number: number, ahead=3)
    assert [next(reader), next(reader)] == [1, 2]
    with pytest.raises(OSError, match="the cache is gone"):
        next(reader)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def trainer(device, seed=0):
    """A small network with its step, as a session has it."""
    torch.manual_seed(seed)
    network = torch.nn.Sequential(
        torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1)
    ).to(device)
    groups = [
        {"params": network[0].parameters(), "factor": 0.5},
        {"params": network[1:].parameters(), "factor": 1.0},
    ]
    optimizer = adam(groups, 0.01, 0.0, device)

    def step(images, target):
        optimizer.zero_grad(set_to_none=True)
        loss = (network(images) - target).square().mean()
        loss.backward()
        optimizer.step()
        return torch.stack([loss.detach(), target.sum()])

    return network, optimizer, step


def run(device, wrap, steps=12):
    network, optimizer, step = trainer(device)
    call, figures = wrap(step, lambda: optimizer.zero_grad(set_to_none=True)), []
    generator = torch.Generator().manual_seed(1)
    for number in range(steps):
        set_rate(optimizer, 0.01 * (1 - number / steps))
        rows = 4 if number % 5 else 6  # two shapes of a batch
        images, target = (
            torch.randn(rows, 3, generator=generator),
            torch.randn(rows, 1, generator=generator),
        )
        figures.append(call(images.to(device), target.to(device)))
    return torch.stack(figures).cpu(), {
        name: tensor.cpu() for name, tensor in network.state_dict().items()
    }


def test_on_a_cpu_a_step_is_called_as_it_is():
    plain = run(CPU, lambda step, clear: step)
    replayed = run(CPU, lambda step, clear: Replay(step, clear, CPU))
    assert torch.equal(plain[0], replayed[0])
    assert all(torch.equal(tensor, replayed[1][name]) for name, tensor in plain[1].items())


def test_a_replay_takes_every_step_once_with_the_batch_that_was_given(monkeypatch):
    """The order of calls, copies and captures without a GPU; a capture just runs later."""
    captures = []

    def capture(self, work):
        captures.append(work)
        return work

    monkeypatch.setattr(Replay, "_on_side_stream", lambda self, work: work())
    monkeypatch.setattr(Replay, "_capture", capture)
    plain = run(CPU, lambda step, clear: step)
    replayed = run(CPU, lambda step, clear: Replay(step, clear, CUDA))
    assert torch.equal(plain[0], replayed[0])
    assert all(torch.equal(tensor, replayed[1][name]) for name, tensor in plain[1].items())
    assert (
        len(captures) == 1
    )  # twelve steps: nine of four rows, three of six, which never leave the warm-up


def test_what_is_no_tensor_has_graphs_of_its_own(monkeypatch):
    captures = []
    monkeypatch.setattr(Replay, "_on_side_stream", lambda self, work: work())
    monkeypatch.setattr(Replay, "_capture", lambda self, work: captures.append(work) or work)
    replay = Replay(lambda tensor: tensor + 1, lambda: None, CUDA)
    for _ in range(WARM_STEPS + 1):
        for key in ((4,), (1, 3)):
            assert replay(torch.zeros(4), key=key).sum() == 4
    assert len(captures) == 2


def test_every_group_keeps_its_share_of_the_rate():
    _, optimizer, _ = trainer(CPU)
    set_rate(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0)
    kept = [group["lr"] for group in optimizer.param_groups]
    set_rate(optimizer, 0.4)
    assert [float(rate) for rate in kept] == pytest.approx([0.2, 0.4])


@pytest.mark.gpu
@needs_gpu
def test_a_gpu_gets_the_same_batches_in_the_same_order():
    for given, found in zip(list(batches()), prefetch(batches(), CUDA), strict=True):
        assert torch.equal(found[0].cpu(), given[0])
        assert torch.equal(found[1].cpu(), given[1])
        assert found[0].device.type == "cuda"
        assert found[2] == given[2]


@pytest.mark.gpu
@needs_gpu
def test_captured_steps_train_as_eager_ones_do():
    plain = run(CUDA, lambda step, clear: step)
    replayed = run(CUDA, lambda step, clear: Replay(step, clear, CUDA))
    torch.testing.assert_close(replayed[0], plain[0], rtol=1e-5, atol=1e-6)
    for name, tensor in plain[1].items():
        torch.testing.assert_close(replayed[1][name], tensor, rtol=1e-4, atol=1e-5)
