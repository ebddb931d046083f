"""Processes end together, with one message, whatever happens to one of them."""

import itertools
import os
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from conftest import batch, poisoned
from conftest import make_trainer as make

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


def diverge(rank, folder):
    run = make(folder, steps=20, log_every=10, eval_every=20)
    if rank == 1:
        poisoned(run, at=3)
    run.fit(map(batch, itertools.count(100 * rank)))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_process_ends_both_with_one_message(two):
    reported = two(diverge)
    assert reported[0] == reported[1]
    assert reported[0].startswith(
        "step 4: the loss is not finite (nan) on process 1 of 2; its samples"
    )


def dawdle(rank, folder):
    if rank == 1:
        time.sleep(8)
    wait_patiently("the slow one")
    counts = torch.ones(2)
    collectives.sum_in_place(counts)
    (folder / f"sum {rank}").write_text(str(counts.tolist()))


def dawdle_within_five_seconds(rank, folder):
    collectives.dist.distributed_c10d._get_default_group()._get_backend(
        torch.device("cpu")
    )._set_default_timeout(timedelta(seconds=5))
    dawdle(rank, folder)


@pytest.mark.slow
def test_a_process_may_evaluate_longer_than_an_exchange_waits(two, tmp_path):
    assert two(dawdle_within_five_seconds) == ["", ""]
    assert [(tmp_path / f"sum {rank}").read_text() for rank in range(2)] == ["[2.0, 2.0]"] * 2


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
