"""A lack of memory is recognised and answered with sizes that fit."""

import pytest
import torch
from conftest import TINY
from test_config import compose

from danet.config.validate import check
from danet.preflight import out_of_memory


def test_a_lack_of_memory_is_recognised():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**52, dtype=torch.uint8)
    assert out_of_memory.is_shortage(error.value)
    assert out_of_memory.is_shortage(MemoryError())
    assert out_of_memory.is_shortage(torch.OutOfMemoryError("CUDA out of memory"))
    assert not out_of_memory.is_shortage(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_lack_of_memory_is_reported_with_sizes_that_would_fit():
    config = check(compose(*TINY))
    device = torch.device("cpu")
    message = str(out_of_memory.explain(config, device, 2**50, training=True))
    assert "a step of data.batch_size=2 with 48 x 96 needs about" in message
    assert "largest batch of this size that would fit: 1," in message, "however much was free"
    message = str(out_of_memory.explain(config, device, 2**20, training=True))
    assert "would fit: none, largest crop of this batch: none" in message
    assert "evaluation=sliding" in str(out_of_memory.explain(config, device, 0, training=False))
