"""Each error is reported exactly once, by a process that is not killed before it has done so.

Two facts make this harder than a print. The same bad file or setting usually fails on all ranks at
once, which would print one error many times. And torchrun sends SIGTERM to all ranks as soon as one
has exited, so a rank that exits early can silence the rank that was about to report.

Before the process group exists, all ranks of a host fail alike: LOCAL_RANK 0 reports, and the
others sleep until the launcher ends them. A rank that is still alive after that failed alone, and
reports. Inside the group, the first rank that claims the error in the store reports, and the others
exit only after that rank has. The store must be the one of this attempt (see rendezvous.py): after
a restart by torchrun a claim of the failed attempt would still be there, and no rank would report.
"""

import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

POLL = 0.05  # seconds between two polls of the store or of another process
REPORT = 20.0  # seconds to report an error and exit, and for the launcher to end the others

# A part of REPORT: rank 0 may still have to report after this wait, while the others wait REPORT.
CLAIM = REPORT / 10
"""Seconds for which rank 0, where it hosts the store, lets other ranks claim the same error."""


def is_reported(error: BaseException) -> bool:
    """Return whether another process reports an error; wait for it where that is not known yet."""
    reported: bool | None = getattr(error, "is_reported", None)
    local_rank = os.environ.get("LOCAL_RANK") or os.environ.get("RANK", "0")
    if reported is None and local_rank != "0":
        time.sleep(REPORT)  # the launcher's SIGTERM ends this process here, with nothing printed
    return bool(reported)


@contextmanager
def leaving_the_group() -> Iterator[None]:
    """End this process at once when an exception passes and it is in a process group."""
    try:
        yield
    except BaseException as error:
        # Looked up, not imported: most errors of settings come before torch is loaded.
        distributed = sys.modules.get("torch.distributed")
        is_usable = distributed is not None and distributed.is_available()
        if distributed is None or not (is_usable and distributed.is_initialized()):
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exception(error)
        sys.stdout.flush()  # which os._exit leaves out
        sys.stderr.flush()
        # A normal exit destroys the group: NCCL then waits for ranks that may wait for this one.
        os._exit(code if isinstance(code, int) else 1)
