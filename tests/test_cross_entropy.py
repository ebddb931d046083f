"""Cross entropy in pieces equals cross entropy of the upsampled logits, without holding them."""

import pytest
import torch
import torch.nn.functional as F
from conftest import LargestTensor

from danet.losses import OHEM, CrossEntropy
from danet.ops import cross_entropy
from danet.ops.cross_entropy import cross_entropy_sum
from danet.types import IGNORE

K = 5
WEIGHTS = (0.5, 2.0, 0.0, 1.5, 1.0)
PER_CHUNK = {"one image": 1, "two images": 2 * K * 33 * 49, "all": 2**24}


@pytest.fixture
def logits():
    return (2 * torch.randn(3, K, 5, 7)).requires_grad_()


@pytest.fixture
def target():
    target = torch.randint(0, K, (3, 33, 49))
    target[torch.rand(3, 33, 49) < 0.2] = IGNORE
    return target


@pytest.fixture(params=PER_CHUNK)
def _chunks(request, monkeypatch):
    monkeypatch.setattr(cross_entropy, "ELEMENTS_PER_CHUNK", PER_CHUNK[request.param])


def plain(logits, target, align_corners, **options):
    """The formula: all fine logits at once."""
    fine = F.interpolate(logits, target.shape[1:], mode="bilinear", align_corners=align_corners)
    return F.cross_entropy(fine, target, ignore_index=IGNORE, **options)


# Equal to the formula


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("weights", [None, WEIGHTS], ids=["plain", "weighted"])
def test_the_loss_and_its_gradient_are_those_of_upsampled_logits(
    logits, target, weights, align_corners
):
    target[1] = IGNORE  # between images with labels
    found = CrossEntropy(weights)(logits, target, align_corners=align_corners)
    factors = None if weights is None else torch.tensor(weights)
    wanted = plain(logits, target, align_corners, weight=factors)
    torch.testing.assert_close(found, wanted)
    got, expected = (torch.autograd.grad(3 * value, logits)[0] for value in (found, wanted))
    torch.testing.assert_close(got, expected)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("align_corners", [True, False])
def test_the_gradient_is_that_of_finite_differences(align_corners):
    logits = torch.randn(2, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 3, (2, 5, 7))
    target[0, 0] = IGNORE
    weights = torch.rand(2, 5, 7, dtype=torch.float64) * (target != IGNORE)

    def loss(x):
        return cross_entropy_sum(x, target, weights, align_corners=align_corners)

    assert torch.autograd.gradcheck(loss, logits)


def test_the_order_in_memory_does_not_matter(logits, target):
    turned = logits.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    losses = [CrossEntropy()(x, target) for x in (logits, turned)]
    assert torch.equal(*losses)
    gradients = map(torch.autograd.grad, losses, (logits, turned))
    assert torch.equal(*(found for (found,) in gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_get_the_float32_gradient_rounded_once(logits, target, dtype):
    half = logits.detach().to(dtype).requires_grad_()
    wide = half.detach().float().requires_grad_()
    wanted = CrossEntropy()(wide, target)
    with torch.autocast("cpu", dtype=dtype):
        found = CrossEntropy()(half, target)
    assert torch.equal(found, wanted)
    assert found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found, half)
    (expected,) = torch.autograd.grad(wanted, wide)
    assert torch.equal(gradient, expected.to(dtype))


@pytest.mark.parametrize("loss", [CrossEntropy(), OHEM(min_kept=9)], ids=str)
def test_the_value_does_not_depend_on_whether_a_gradient_is_wanted(loss, logits, target):
    wanted = loss(logits, target)
    with torch.no_grad():
        found = loss(logits, target)
    assert wanted.requires_grad
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted.detach())


# Memory


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy((1.0,) * 19), OHEM()], ids=str)
def test_fine_logits_of_a_batch_never_exist(loss, monkeypatch):
    monkeypatch.setattr(cross_entropy, "ELEMENTS_PER_CHUNK", 2 * 19 * 128 * 96)
    logits = torch.randn(4, 19, 16, 12, requires_grad=True)
    mask = torch.randint(0, 19, (4, 128, 96), dtype=torch.uint8)
    kept = []
    with (
        LargestTensor() as largest,
        torch.autograd.graph.saved_tensors_hooks(
            lambda x: kept.append(x.numel()) or x, lambda x: x
        ),
    ):
        loss(logits, mask).backward()
    assert largest.numel == 2 * 19 * 128 * 96, "two of four images, as the bound says"
    assert max(kept) == logits.numel(), "only the coarse gradient waits for backward"
