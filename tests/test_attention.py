"""The attention modules compute what the paper and the released code say, without the full map."""

import pytest
import torch

from danet.ops import attention
from danet.ops.attention import ChannelAttention, PositionAttention

SIZES = [(6, 6), (5, 9), (1, 1), (2, 17)]


def position_formula(module, x):
    """Equations 1 and 2, one line each; builds the (B, N, N) map that the module avoids."""
    q, k, v = (conv(x).flatten(2) for conv in (module.query, module.key, module.value))
    weights = torch.einsum("bdi,bdj->bij", q, k).softmax(dim=-1)
    context = torch.einsum("bij,bcj->bci", weights, v)
    return module.gamma * context.view_as(x) + x


def channel_formula(module, x):
    """Equations 3 and 4; ``distance`` as the released code writes it: softmax(max - E)."""
    a = x.flatten(2)
    energy = torch.einsum("bin,bjn->bij", a, a)
    if module.energy == "distance":
        energy = energy.max(dim=-1, keepdim=True).values - energy
    context = torch.einsum("bij,bjn->bin", energy.softmax(dim=-1), a)
    return module.gamma * context.view_as(x) + x


@pytest.fixture(params=["one block", "blocks"])
def blocks(request, monkeypatch):
    """Runs a test with all queries at once, and with blocks of 7."""
    if request.param == "blocks":
        monkeypatch.setattr(attention, "QUERIES_PER_BLOCK", 7)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_position_attention_equals_the_formula_in_values_and_gradients(size):
    module = PositionAttention(16, reduction=4).double()
    torch.nn.init.constant_(module.gamma, 0.7)
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    wanted = [x, *module.parameters()]
    fast, slow = module(x), position_formula(module, x)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    upstream = torch.randn_like(fast)
    for got, expected in zip(
        torch.autograd.grad(fast, wanted, upstream),
        torch.autograd.grad(slow, wanted, upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("energy", ["distance", "similarity"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_channel_attention_equals_the_formula_in_values_and_gradients(energy, size):
    module = ChannelAttention(energy)
    torch.nn.init.constant_(module.gamma, -0.4)
    x = torch.randn(2, 8, *size, requires_grad=True)
    fast, slow = module(x), channel_formula(module, x)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(
        torch.autograd.grad(fast.sin().sum(), x), torch.autograd.grad(slow.sin().sum(), x)
    )


def test_the_two_energies_differ():
    x = torch.randn(1, 8, 4, 4)
    distance, similarity = ChannelAttention("distance"), ChannelAttention("similarity")
    for module in (distance, similarity):
        torch.nn.init.ones_(module.gamma)
    assert not torch.allclose(distance(x), similarity(x))


@pytest.mark.parametrize("module", [PositionAttention(16), ChannelAttention()], ids=type)
def test_a_fresh_module_is_the_identity(module):
    x = torch.randn(1, 16, 5, 5)
    assert torch.equal(module(x), x)


def test_rows_are_rows_of_the_softmax():
    module = PositionAttention(16, reduction=4)
    x = torch.randn(1, 16, 4, 5)
    q, k = module.query(x).flatten(2), module.key(x).flatten(2)
    full = torch.einsum("bdi,bdj->bij", q, k).softmax(dim=-1)
    rows = module.rows(x, torch.tensor([0, 13, 19]))
    assert rows.shape == (1, 3, 4, 5)
    torch.testing.assert_close(rows.flatten(2), full[:, [0, 13, 19]])


def test_saturated_features_stay_finite_under_half_precision():
    # At 64 x 128 positions of features around 4, energies pass 65504, the end of float16.
    x = 4 * torch.rand(1, 16, 64, 128, dtype=torch.float16)
    module = ChannelAttention()
    torch.nn.init.ones_(module.gamma)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.isfinite(module(x)).all()


def test_memory_of_the_backward_pass_holds_no_map(monkeypatch):
    """Counts the elements that autograd keeps: far fewer than N * N."""
    module = PositionAttention(8, reduction=4)
    x = torch.randn(1, 8, 48, 48, requires_grad=True)  # N = 2304
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        module(x)
    assert kept
    assert max(kept) < 2304 * 2304 / 100


def test_impossible_settings_are_named():
    with pytest.raises(ValueError, match="channels=20 is not divisible by reduction=8"):
        PositionAttention(20)
    with pytest.raises(ValueError, match="energy='dot'"):
        ChannelAttention("dot")
