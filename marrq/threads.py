"""The same result on any number of threads.

Products of matrices come out the same to the last bit however many threads share their rows and
columns: each element is summed in one order. LAPACK's factorizations do not, their blocks depend on
the number of threads, and so they run on one."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Everything inside on one thread of the CPU; what runs on a GPU is not touched."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
