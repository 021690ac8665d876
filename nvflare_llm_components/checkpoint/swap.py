"""Replacing a folder as one step: whoever looks finds the old one or the new one, both complete."""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2
NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, sync it, and put it in the place of `target`.

    Until the last step `target` is untouched, so a full disk, a kill or an error leaves the old folder.

    Args:
        target: the folder to replace; it need not exist.
        write: called with the path of an empty folder beside `target`.
    """
    scratch = _beside(target, "writing")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        write(scratch)
        for folder, _, files in os.walk(scratch):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        recover_folder(target)
        _put_in_place(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Bring back a folder that a kill left renamed, where the file system can't exchange two folders."""
    previous = _beside(target, "previous")
    if previous.exists() and not target.exists():
        previous.rename(target)
    shutil.rmtree(previous, ignore_errors=True)


def _beside(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}")


def _put_in_place(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
    elif not _exchange(scratch, target):
        previous = _beside(target, "previous")
        target.rename(previous)
        scratch.rename(target)
        shutil.rmtree(previous, ignore_errors=True)
    _sync(target.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two folders in one step; False where the system can't."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in NOT_SUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
