"""A worker that dies ends the loader with its reason; tests/faults/test_loading.py tests runs."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from conftest import Pictures
from torch.utils.data import get_worker_info

from danet.data import workers
from danet.data.loader import Loader, eval_batches, train_batches
from danet.errors import ProcessError


class Deadly(Pictures):
    """Kills the worker that reads item 5."""

    def __getitem__(self, draw):
        item = draw[0] if isinstance(draw, tuple) else draw
        if item == 5 and get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(draw)


def test_a_worker_that_is_killed_is_reported_with_what_it_read():
    batches = eval_batches(Deadly(8), batch_size=2, num_workers=2)
    since = time.monotonic()
    with pytest.raises(ProcessError, match=r"(?s)by signal: Killed; .*being read were .*sample 5"):
        list(batches)
    assert time.monotonic() - since < 60, "usually 1 s; else it would wait for ever"
    # The others end at once, too, although the error still refers to the loader.
    for reader in multiprocessing.active_children():
        reader.join(20)
        assert not reader.is_alive()


def test_a_worker_that_died_unheard_is_noticed_at_the_next_batch():
    """What torch raises may be lost, in a destructor or where errors of others are forgiven."""
    others = set(multiprocessing.active_children())
    batches = train_batches(Pictures(8), batch_size=2, seed=0, num_workers=1, timeout=100)
    next(batches)
    (reader,) = set(multiprocessing.active_children()) - others
    with contextlib.suppress(RuntimeError):
        os.kill(reader.pid, signal.SIGKILL)
        reader.join()
        time.sleep(0.1)
    with pytest.raises(ProcessError, match=f"process {reader.pid}.* is killed by signal: Killed"):
        list(itertools.islice(batches, 20))


def test_a_worker_that_died_with_a_lock_keeps_nobody_waiting():
    loader = Loader(Pictures(8), [[(i, 0)] for i in range(8)], list, num_workers=1)
    batches = iter(loader)
    next(batches)
    batches.gi_frame.f_locals["batches"]._workers_done_event._cond.acquire()  # as if by the dead
    end = threading.Thread(target=batches.close, daemon=True)
    end.start()
    end.join(30)
    assert not end.is_alive()


class Asking(Pictures):
    """Names its samples after the state of the process that reads them."""

    def __getitem__(self, draw):
        found = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGUSR1), os.getpgrp()
        return super().__getitem__(draw)._replace(name=repr(tuple(map(int, found))))


def test_a_worker_ignores_signals_meant_for_the_trainer():
    batch_ = next(train_batches(Asking(), batch_size=2, seed=0, num_workers=1))
    interrupt, user, group = eval(batch_.name[0])
    assert (interrupt, user) == (signal.SIG_IGN, signal.SIG_IGN)
    assert group != os.getpgrp(), "a signal to the trainer's group does not reach it"


@pytest.mark.parametrize(
    ("codes", "reported"),
    [
        (
            [None, -signal.SIGKILL],
            "(process 1) is killed by signal: Killed; unless somebody killed it",
        ),
        ([1, -signal.SIGBUS], "(process 1) is killed by signal: Bus error; shared memory was full"),
        ([None, 1], "(process 1) exited with code 1; being read were a, b"),
    ],
)
def test_a_worker_that_has_exited_is_described_by_its_code(codes, reported):
    exited = [SimpleNamespace(pid=i, exitcode=code) for i, code in enumerate(codes)]
    error = RuntimeError("DataLoader worker (pid(s) 0, 1) exited unexpectedly")
    assert reported in str(workers.explain(error, exited, lambda: ["a", "b"], 0))
    hung = RuntimeError("DataLoader timed out after 7 seconds")
    assert "within data.timeout=7 seconds" in str(workers.explain(hung, exited, list, 7))
    other = RuntimeError("Caught RuntimeError in DataLoader worker process 0. mat1 and mat2 shapes")
    assert workers.explain(other, exited, list, 0) is None


def test_a_broken_connection_waits_for_the_code_of_its_worker():
    reader = multiprocessing.get_context("fork").Process(target=os._exit, args=(3,))
    reader.start()
    assert "exited with code 3" in str(workers.explain(EOFError(), [reader], list, 0))
