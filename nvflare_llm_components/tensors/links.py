"""Second names of files: a folder's content under another path, without a second copy on disk."""

import os
import shutil
from pathlib import Path


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Give a file a second name, or copy it where the file system has no hard links.

    Only for files that are replaced and never changed in place, as all of this package's are.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def links_in(folder: Path) -> list[Path]:
    """Symbolic links at and below a path, in order; what they name is not looked into."""
    return [path for path in (folder, *sorted(folder.rglob("*"))) if path.is_symlink()]


def link_tree(source: Path, target: Path, *without: str) -> None:
    """Give all files below a folder a second name below another one; symbolic links are left out.

    Args:
        source: the folder.
        target: where its content goes; made where it is missing.
        without: names of files and folders that are left out, at every depth.
    """

    def ignored(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if name in without or Path(folder, name).is_symlink()}

    shutil.copytree(source, target, copy_function=link_or_copy, ignore=ignored, dirs_exist_ok=True)
