"""Replacing a file or folder in one step: whoever looks finds the old one or the new one, complete."""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

AT_FDCWD = -100
RENAME_EXCHANGE = 2
_MOST_LEFTOVERS = 8
NOT_SUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def replace_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a new folder, sync it, and put it in the place of `target`.

    Until the last step `target` is untouched, so a full disk, a kill or an error leaves the old folder.

    Args:
        target: the folder to replace; it need not exist.
        write: called with the path of an empty folder beside `target`.
    """
    scratch = _vacant(target, "writing")
    scratch.mkdir(parents=True)
    try:
        write(scratch)
        for folder, _, files in os.walk(scratch):
            for name in files:
                sync(Path(folder, name))
            sync(Path(folder))
        recover_folder(target)
        _put_in_place(scratch, target)
    finally:
        _remove(scratch)


def replace_text(target: Path, text: str) -> None:
    """Write a text file, or replace it; other links to the old one keep it."""
    scratch = _vacant(target, "writing")
    scratch.write_text(text, encoding="utf-8")
    sync(scratch)
    scratch.replace(target)


def recover_folder(target: Path) -> None:
    """Bring back a folder that a kill left renamed, where the file system can't exchange two folders."""
    left = [path for path in _beside(target, "previous") if os.path.lexists(path)]
    whole = [path for path in left if path.is_dir() and any(map(_is_kept, path.iterdir()))]
    if whole and not target.exists():
        whole[-1].rename(target)
    for path in left:
        _remove(path)


def _beside(target: Path, role: str) -> list[Path]:
    """Where a scratch folder may be: a leftover that can't be removed must not be in the way of the next."""
    return [target.with_name(f".{target.name}.{role}{number or ''}") for number in range(_MOST_LEFTOVERS)]


def _vacant(target: Path, role: str) -> Path:
    paths = _beside(target, role)
    for path in paths:
        _remove(path)
    return next((path for path in paths if not os.path.lexists(path)), paths[0])


def _remove(path: Path) -> None:
    """Remove a folder as far as the file system lets go of it: NFS keeps files that are still mapped."""
    if path.is_symlink() or path.is_file():
        with suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _is_kept(file: Path) -> bool:
    return not file.name.startswith(".nfs")


def _put_in_place(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
    elif not _exchange(scratch, target):
        previous = _vacant(target, "previous")
        target.rename(previous)
        scratch.rename(target)
        _remove(previous)
    sync(target.parent)


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


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # CIFS and FUSE may not sync a folder; its files are synced, and a rename is seen in order.
        if not (path.is_dir() and error.errno in NOT_SUPPORTED):
            raise
    finally:
        os.close(descriptor)
