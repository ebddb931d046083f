"""Processes end together, with one message, whatever happens to one of them."""

import os
import signal
import socket
from pathlib import Path

import pytest
import torch

from danet.distributed import collectives
from danet.distributed.agreement import wait_patiently
from danet.distributed.rendezvous import process_group
from danet.errors import DivergedError, ProcessError


def join(rank, folder, work):
    """Is one of two processes; writes down the error it ended with."""
    torch.set_num_threads(1)
    os.environ |= {
        **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": (Path(folder) / "port").read_text()},
    }
    try:
        with process_group(torch.device("cpu")):
            work(rank, Path(folder))
    except (DivergedError, ProcessError) as error:
        (Path(folder) / f"reported {rank}").write_text(str(error))


@pytest.fixture
def two(tmp_path):
    """Returns a function that runs work in two processes; it returns the errors of both."""

    def run(work):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            (tmp_path / "port").write_text(str(free.getsockname()[1]))
        context = torch.multiprocessing.get_context("spawn")
        both = [context.Process(target=join, args=(r, str(tmp_path), work)) for r in range(2)]
        for process in both:
            process.start()
        for process in both:
            process.join(120)
            assert process.exitcode is not None, "it hangs"
        reported = [tmp_path / f"reported {rank}" for rank in range(2)]
        return [path.read_text() if path.exists() else "" for path in reported]

    return run


def die_or_sum(rank, folder):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    collectives.sum_in_place(torch.ones(2))


def die_or_wait(rank, folder):
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    wait_patiently("the dead one")


@pytest.mark.slow
@pytest.mark.parametrize("work", [die_or_sum, die_or_wait])
def test_a_process_that_died_is_named(two, work):
    reported = two(work)
    assert "process 0 of 2: the exchange" in reported[0]
    assert "failed: process 1 of this machine has died" in reported[0]
