"""One run at a time in a `local_output`: two would take each other's checkpoints for damaged ones.

The lock is the kernel's: it ends with the process, also by SIGKILL, so none is left behind. A POSIX lock, not
`flock`: that one would live on in forked data loader workers.
"""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from llm.errors import CheckpointError

logger = logging.getLogger(__name__)
LOCK = ".llm-train.lock"


@contextmanager
def only_writer(local_output: str, *, is_needed: bool = True) -> Iterator[None]:
    """Holds `local_output`, which is made if need be; ranks that write nothing do not need it.

    CheckpointError when another process holds it, with its id and machine, or when nothing can be written there.
    """
    if not is_needed:
        yield
        return
    path = os.path.join(local_output, LOCK)
    try:
        os.makedirs(local_output, exist_ok=True)
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115  # closed below
    except OSError as error:
        raise CheckpointError(
            f"`local_output`: nothing can be written to `{local_output}` ({error.strerror}). Write another folder."
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise CheckpointError(
                f"`{local_output}` is in use by {holder}. Wait for it, end it, or write another `local_output`."
            ) from error
        except OSError as error:  # some network file systems have no locks
            logger.warning("`%s` cannot be locked (%s): start no second run there", local_output, error.strerror)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
