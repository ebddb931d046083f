"""Every process gets a device of its own, or all are refused."""

import pytest
import torch

from danet.distributed.device import choose_device
from danet.errors import InputError


@pytest.mark.parametrize("number", [0, 1, 2])
def test_more_processes_than_devices_are_refused_by_all_of_them(monkeypatch, number):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", str(number))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(InputError, match=r"3 processes on a machine with 2 CUDA device"):
        choose_device("auto")
    if number < 2:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        assert choose_device("auto") == torch.device("cuda", number)
