"""The gradient of bilinear resizing, as products of matrices."""

import pytest
import torch

from danet.ops.resize import resize, resize_backward

SIZES = [
    ((5, 9), (33, 65)),  # up
    ((32, 32), (256, 256)),
    ((4, 4), (4, 9)),  # along one axis only
    ((1, 3), (8, 20)),  # of a single row
    ((9, 8), (5, 3)),  # down
    ((7, 7), (7, 7)),  # nothing at all
]


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("coarse", "fine"), SIZES)
def test_the_gradient_is_that_of_torch(coarse, fine, align_corners):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *coarse, generator=generator, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, *fine, generator=generator, dtype=torch.float64)
    y = resize(x, fine, align_corners=align_corners)
    (wanted,) = torch.autograd.grad(y, x, upstream)
    found = resize_backward(upstream, coarse, align_corners=align_corners)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
