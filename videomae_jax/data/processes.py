"""Processes that read videos: how many the machine has room for, and that none outlives its parent."""

import ctypes
import os
import pathlib
import signal
import sys


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group (Linux)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = pathlib.Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(min(cores, int(quota) // int(period)), 1)
    except (OSError, ValueError):  # no such group, or "max"
        return cores


def die_with_parent(parent: int) -> None:
    """Ends this process when the process `parent` is killed, or has been already (Linux).

    A pool of processes alone would leave it behind for ever.
    """
    if sys.platform == "linux":
        parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL("libc.so.6").prctl(parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:  # it died before this was asked for
            os._exit(1)
