"""Huge pages for large buffers: a CPU step and a decoded clip take a quarter less time with them.

The C library reads its setting when a process starts, so a command replaces itself once by the same command
with the setting. Processes that it starts inherit it.
"""

import contextlib
import os
import pathlib
import sys

SETTING = "GLIBC_TUNABLES"
_WANTED = "glibc.malloc.hugetlb=1"
_KERNEL = pathlib.Path("/sys/kernel/mm/transparent_hugepage/enabled")


def begin_again() -> None:
    """Replaces this process by itself with huge pages: on Linux, unless the user has set something.

    Not within another program: a notebook, an interpreter that is part of one.
    """
    is_guest = not sys.executable or "ipykernel" in sys.modules
    if sys.platform != "linux" or SETTING in os.environ or is_guest:
        return
    os.environ[SETTING] = _WANTED
    with contextlib.suppress(OSError):
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def trouble() -> str:
    """Why large buffers are not on huge pages, and what to do; "" where they are or cannot be."""
    if sys.platform != "linux":
        return ""
    if "hugetlb" not in os.environ.get(SETTING, ""):
        return f"no huge pages: add {_WANTED} to {SETTING} (parts are joined by a colon)"
    if _KERNEL.exists() and "[never]" in _KERNEL.read_text():
        return f"the kernel gives no huge pages: write madvise into {_KERNEL}"
    return ""
