"""A lack of memory is recognised and answered with what to change."""

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


def test_a_lack_of_memory_is_reported_with_the_settings_to_try():
    config = check(compose(*TINY))
    message = str(out_of_memory.explain(config, torch.device("cpu"), training=True))
    assert message.startswith("out of memory on cpu in a step of data.batch_size=2 with 48 x 96; ")
    config.data.size = None
    message = str(out_of_memory.explain(config, torch.device("cpu"), training=True))
    assert "data.batch_size=2; try in this order: trainer.precision=bfloat16, " in message
