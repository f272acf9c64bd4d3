"""What a user sees when something is wrong: one sentence, an exit status, no traceback."""
from __future__ import annotations

import errno
import os
import select
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import torch


class Misuse(Exception):
    """The user asked for something that cannot be: names the thing, the value, what is allowed, the remedy. Exit 2."""


class Failure(Exception):
    """Something went wrong while running, though what was asked for is allowed. Exit 1."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the process with one sentence on stderr for every error that a user can meet."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # not every terminal has a dagger
    try:
        yield
        print(end="", flush=True)  # what is printed to a file or a pipe leaves only now
    except Misuse as error:
        stop(str(error), 2)
    except Failure as error:
        stop(str(error), 1)
    except torch.OutOfMemoryError:
        stop("out of memory on the GPU: choose a smaller --batch-size", 1)
    except MemoryError:
        stop("out of memory: choose a smaller --train-size or --batch-size", 1)
    except (OSError, RuntimeError, EOFError) as error:  # torch reports a full disk as a RuntimeError of its writer
        number = getattr(error, "errno", None)
        if number in (errno.EPIPE, errno.EIO) and nobody_reads(sys.stdout):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends
            stop("whatever read this program's output has ended (head, for instance), and so the program has; every file is whole: "
                 "run the same command again with its output in a file", 1)
        if "DataLoader worker" in str(error) or isinstance(error, (ConnectionError, EOFError)):  # whichever of torch's two ends notices
            stop("a process that reads images was killed or cannot send them, most likely for want of memory or of shared memory (/dev/shm, in a container "
                 "64 MB unless it is started with more, as docker's --shm-size): choose fewer --workers", 1)
        if number == errno.ENOSPC or "No space left" in str(error) or "PytorchStreamWriter" in str(error):
            stop("no room left on the disk: free some, or choose another --out-dir; the last complete save is intact", 1)
        if isinstance(error, OSError) and error.filename is not None:
            closed = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
            stop(f"{error.filename}: {error.strerror}" + "; change its permissions, or choose another directory" * closed, 1)
        if "DefaultCPUAllocator" in str(error) or number == errno.ENOMEM:
            stop("out of memory: choose a smaller --batch-size", 1)
        if isinstance(error, OSError):
            place = traceback.extract_tb(error.__traceback__)[-1]
            stop(f"{error} ({type(error).__name__} in line {place.lineno} of {Path(place.filename).name}), of no file that the system names; "
                 "every file is whole: when the cause is mended, run the same command again", 1)
        raise
    except ValueError as error:  # torch's, of a batch with one image where a network has come down to one pixel
        if "more than 1 value per channel" not in str(error):
            raise
        stop("a batch of one image cannot train this network, whose BatchNorm then sees a single value: choose a --batch-size "
             "that leaves no last batch of one, another --train-size, or another --arch", 2)
    except KeyboardInterrupt:
        stop("interrupted; run the same command again to continue from the last save", 130)


def nobody_reads(stream: object) -> bool:
    """Whether what a stream is written into, a pipe or a terminal, has lost its reader."""
    try:
        poll = select.poll()
        poll.register(stream, 0)
        return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
    except (OSError, ValueError, TypeError, AttributeError):  # no file; or a system without poll
        return False


def stop(sentence: str, status: int) -> NoReturn:
    """Prints the sentence on stderr and exits."""
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(status)
