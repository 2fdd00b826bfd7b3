"""The U-Net has RAM-DSIR's shape, and its weights depend on the seed alone."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from fedsgcg.common.errors import FedsgcgError
from fedsgcg.common.networks import NETWORKS, UNet, build_network, initialise
from fedsgcg.common.settings.plan import NetworkSettings


def parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_base_width_16_has_the_published_parameter_counts():
    network = UNet(in_channels=3, out_channels=2, base_width=16)
    assert parameters(network.encoder) == 1_967_904
    assert parameters(network.decoder) == 1_217_362
    assert parameters(network) == 3_185_266


def test_encoder_maps_have_widths_16_to_256_at_strides_1_to_16():
    maps = UNet(base_width=16).encoder(torch.zeros(1, 3, 64, 32))
    assert [tuple(m.shape[1:]) for m in maps] == [
        (16, 64, 32),
        (32, 32, 16),
        (64, 16, 8),
        (128, 8, 4),
        (256, 4, 2),
    ]


def test_the_first_convolution_of_an_encoder_block_has_no_relu():
    network = UNet(base_width=16)
    kinds = [
        type(layer).__name__
        for layer in network.encoder.blocks[0].modules()
        if not list(layer.children())
    ]
    assert kinds == [
        "Conv2d",
        "BatchNorm2d",
        "Conv2d",
        "BatchNorm2d",
        "ReLU",
        "Conv2d",
        "BatchNorm2d",
        "ReLU",
    ]


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 48), (80, 16)])
def test_any_multiple_of_16_gives_logits_and_penultimate_map_of_that_size(norm, height, width):
    network = UNet(in_channels=1, out_channels=3, base_width=8, norm=norm)
    logits, penultimate = network(torch.randn(2, 1, height, width))
    assert logits.shape == (2, 3, height, width)
    assert penultimate.shape == (2, 16, height, width)
    assert penultimate.min() >= 0
    assert logits.isfinite().all()


@pytest.mark.parametrize("shape", [(2, 3, 40, 32), (2, 3, 32, 24), (3, 32, 32)])
def test_other_sizes_are_refused_with_the_shape_found(shape):
    with pytest.raises(ValueError, match="images: found shape"):
        UNet(base_width=4)(torch.zeros(shape))


def test_logits_are_the_head_of_the_penultimate_map():
    network = UNet(base_width=8).eval()
    logits, penultimate = network(torch.randn(1, 3, 32, 32))
    torch.testing.assert_close(network.decoder.head(penultimate), logits)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_decoder_block_equals_interpolating_before_the_1x1_convolution(norm):
    block = UNet(base_width=8, norm=norm).double().decoder.blocks[1]
    nn.init.normal_(block.narrow.bias)
    features, skip = torch.randn(2, 128, 5, 7).double(), torch.randn(2, 32, 10, 14).double()
    wide = functional.interpolate(
        block.reduce(features), scale_factor=2, mode="bilinear", align_corners=False
    )
    up = functional.relu(block.narrow_norm(block.narrow(wide)))
    torch.testing.assert_close(
        block(features, skip), block.join(torch.cat([skip, up], 1)), rtol=1e-10, atol=1e-12
    )


def test_every_parameter_receives_a_gradient():
    network = UNet(base_width=4)
    network(torch.randn(2, 3, 32, 32))[0].square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_initialisation_depends_on_the_seed_alone_and_leaves_the_global_generator_untouched():
    settings = NetworkSettings(base_width=4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = build_network(settings, 3, 2, generator_seed=7)
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    second, third = build_network(settings, 3, 2, 7), build_network(settings, 3, 2, 8)
    state = first.state_dict()
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in state.items())
    assert not torch.equal(state["decoder.head.weight"], third.state_dict()["decoder.head.weight"])


@pytest.mark.parametrize("norm", ["batch", "group", "instance"])
def test_a_built_network_has_finite_weights_zero_biases_and_fresh_norms(norm):
    network = build_network(NetworkSettings(base_width=8, norm=norm), 3, 2, 0)
    for name, value in network.state_dict().items():
        assert value.device.type == "cpu"
        assert value.isfinite().all(), name
        if name.endswith("running_var"):
            assert (value == 1).all()
        elif name.endswith(("running_mean", "num_batches_tracked", ".bias")):
            assert (value == 0).all()


def test_convolutions_are_kaiming_normal_over_fan_out():
    network = UNet(base_width=16)
    initialise(network, torch.Generator().manual_seed(0))
    weight = network.encoder.blocks[4][1][0].weight  # 256 -> 256 channels, 3 x 3: fan-out 2304
    assert weight.std().item() == pytest.approx((2 / 2304) ** 0.5, rel=0.01)
    assert weight.mean().item() == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("width", [4, 12, 20])
def test_group_norm_divides_every_width(width):
    assert UNet(base_width=width, norm="group")(torch.randn(1, 3, 16, 16))[0].shape == (
        1,
        2,
        16,
        16,
    )


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="norm: found 'layer'"):
        UNet(norm="layer")
    with pytest.raises(ValueError, match="base_width: found 3"):
        UNet(base_width=3)
    with pytest.raises(FedsgcgError, match="vnet"):
        NetworkSettings(name="vnet")
    assert {"unet": UNet} == NETWORKS


PREDICTS = """
import sys, torch
from fedsgcg.clients.device import choose_device
from fedsgcg.common.networks import build_network
from fedsgcg.common.settings.plan import NetworkSettings
choose_device("cpu")
with torch.inference_mode():
    network = build_network(NetworkSettings(base_width=4), 3, 2, generator_seed=7).eval()
    network(torch.zeros(1, 3, 32, 32))
print(torch.are_deterministic_algorithms_enabled(), "torch._dynamo" in sys.modules)
"""


def test_a_process_that_does_not_train_is_deterministic_and_does_not_load_torchs_compiler():
    done = subprocess.run(
        [sys.executable, "-c", PREDICTS], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["True", "False"]
