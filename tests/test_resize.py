"""The gradient of bilinear resizing, as products of matrices."""

import pytest
import torch

from danet.ops.resize import resize, resize_backward

# Up; along one axis only; of a single row; down; nothing.
SIZES = [
    ((5, 9), (33, 65)),
    ((4, 4), (4, 9)),
    ((1, 3), (8, 20)),
    ((9, 8), (5, 3)),
    ((7, 7), (7, 7)),
]


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(("coarse", "fine"), SIZES)
def test_the_gradient_is_that_of_torch(coarse, fine, align_corners):
    x = torch.randn(2, 3, *coarse, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, *fine, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(resize(x, fine, align_corners=align_corners), x, upstream)
    found = resize_backward(upstream, coarse, align_corners=align_corners)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
