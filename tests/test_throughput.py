"""Throughput counts the images of all processes and the wait for data."""

import time

import pytest
import torch

from danet.distributed import collectives
from danet.engine.throughput import Throughput


def test_pace_counts_the_images_of_all_processes_and_the_wait(monkeypatch):
    monkeypatch.setattr(collectives, "world_size", lambda: 3)
    clock = [10.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    throughput = Throughput(torch.device("cpu"))
    for _ in range(4):
        throughput.update(0.5, 6)
        clock[0] += 2.0
    values = throughput.reset()
    assert values["images_per_second"] == pytest.approx(3 * 24 / 8)
    assert values["data_waiting"] == pytest.approx(0.25)
    assert 0.05 < values["memory_gib"] < 100
    clock[0] += 1.0
    assert throughput.reset()["images_per_second"] == 0
