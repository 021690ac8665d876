"""Where a job's files may lie: resolved, symlinks followed, below what the site itself names."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from nvflare_llm_components.policy import site
from nvflare_llm_components.policy.json_file import read_json
from nvflare_llm_components.policy.schema import PolicyError
from nvflare_llm_components.tensors.hub import HUB_NAME
from nvflare_llm_components.tensors.text import printable

_META = "meta.json"
_KEPT = "_earlier_run"  # where `nvflare-llm resume` keeps what the simulator would wipe
_OWNERS = ("submitter_name", "submitter_org", "study")
MAX_PATH = 4096  # characters


@dataclass(frozen=True)
class ModelPlace:
    """A model that a job may use.

    Attributes:
        name_or_path: a resolved folder, or a hub name.
        is_named: whether the site's own setting names exactly this model, not a folder above it.
        is_brought: whether the job brought it.
    """

    name_or_path: str
    is_named: bool = False
    is_brought: bool = False

    @property
    def folder(self) -> Path | None:
        """Its folder; None for a hub name."""
        path = Path(self.name_or_path)
        return path if path.is_absolute() else None


@dataclass(frozen=True)
class JobPlaces:
    """What one job may open at one site.

    Attributes:
        policy: the site's.
        app_dir: the job's app, with the files that it brought; None where it has none.
        environ: the site's environment.
    """

    policy: site.Places
    app_dir: Path | None = None
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def data_file(self, argument: str, value: str) -> Path:
        """The file that a job names as its data; it may be missing.

        Raises:
            PolicyError: it lies elsewhere than this site lets jobs read.
        """
        found = self._found(argument, value, self.policy.data)
        if found is None:
            raise _refused(argument, value, "data", self.policy.data, "NVFLARE_LLM_DATA")
        return found

    def model(self, argument: str, value: str) -> ModelPlace:
        """The model that a job names: a folder that may be missing, or a hub name.

        Raises:
            PolicyError: it lies elsewhere than this site lets jobs read, or its name is not allowed.
        """
        named = self._expanded(self.policy.models)
        found = self._found(argument, value, self.policy.models)
        if found is not None and (found.exists() or Path(value).is_absolute()):
            is_named = any(Path(entry).expanduser().resolve() == found for entry in named)
            return ModelPlace(str(found), is_named, not is_named and self._is_brought(found))
        is_allowed = value in named or any(fnmatchcase(value, pattern) for pattern in self.policy.hub)
        if is_allowed and HUB_NAME.fullmatch(value) and not Path(value).exists():
            return ModelPlace(value, is_named=value in named)
        raise _refused(
            argument, value, "models", [*self.policy.models, *self.policy.hub], "NVFLARE_LLM_MODEL"
        )

    def _found(self, argument: str, value: str, entries: list[str]) -> Path | None:
        """The resolved path, if it lies below one of the entries or in the app; None if not."""
        if not value or "\0" in value or len(value) > MAX_PATH:
            raise PolicyError(f"{argument}: expected a path or name, found {printable(repr(value), 80)}.")
        own = self.app_dir.resolve() if self.app_dir and self.policy.job_files else None
        roots = [Path(entry).expanduser().resolve() for entry in self._expanded(entries)]
        given = Path(value).expanduser()
        if given.is_absolute():
            bases = [] if self.policy.names_only else [*roots, *([own] if own else [])]
            path = given.resolve()
            return path if any(path.is_relative_to(base) for base in bases) else None
        below = [(base / given).resolve() for base in [*([own] if own else []), *roots]]
        inside = [
            path
            for path, base in zip(below, [*([own] if own else []), *roots], strict=True)
            if path.is_relative_to(base)
        ]
        return next((path for path in inside if path.exists()), next(iter(inside), None))

    def _is_brought(self, path: Path) -> bool:
        return self.app_dir is not None and path.is_relative_to(self.app_dir.resolve())

    def _expanded(self, entries: list[str]) -> list[str]:
        """Entries with the site's variables in them; one whose variable is not set is left out."""
        known = {entry: _expand(entry, self.environ) for entry in entries}
        return [text for text in known.values() if text]


def _expand(entry: str, environ: Mapping[str, str]) -> str | None:
    names = re.findall(r"\$\{?(\w+)\}?", entry)
    if any(not environ.get(name) for name in names):
        return None
    return re.sub(r"\$\{?(\w+)\}?", lambda found: environ[found[1]], entry)


def _refused(argument: str, value: str, key: str, entries: list[str], variable: str) -> PolicyError:
    allowed = ", ".join(printable(entry, 60) for entry in entries) or "none"
    return PolicyError(
        f"{argument}: expected what this site lets jobs use ({allowed}), found '{printable(value, 200)}'. "
        f"Name what lies there; or the site's administrator sets {variable} for FLARE's process, or "
        f"places.{key} in local/{site.POLICY_FILE}."
    )


def earlier_run(
    argument: str,
    value: str,
    present: Path | None = None,
    further: Sequence[Path] = (),
    site_name: str | None = None,
) -> Path:
    """The run directory of an earlier job that a job names.

    Args:
        argument: the job's argument, for the error.
        value: the path that it gives.
        present: run directory of the job that asks; those beside it are this site's, each of its submitter.
        further: folders of which any job may continue what lies in them.
        site_name: in the simulator: the site whose runs may be continued from wherever they were kept.

    Raises:
        PolicyError: it is no run directory of this site, or somebody else's.
    """
    path = Path(value).expanduser().resolve()
    is_own = present is not None and path.parent == present.parent.resolve()
    is_further = any(path.parent == folder.resolve() for folder in further)
    is_kept = site_name is not None and path.name == site_name and path.parent.name.endswith(_KEPT)
    if not Path(value).expanduser().is_absolute() or not (is_own or is_further or is_kept):
        raise PolicyError(
            f"{argument}: expected a run directory of this site's own workspace, found "
            f"'{printable(value, 200)}'. The site's administrator lists further workspaces as places.runs in "
            f"local/{site.POLICY_FILE}."
        )
    if is_own and present is not None:
        _refuse_other_owner(argument, path, present)
    return path


def _refuse_other_owner(argument: str, run: Path, present: Path) -> None:
    """What a site kept of a job goes to the job of the same submitter only."""
    earlier, asking = (read_json(folder / _META) for folder in (run, present))
    differing = [key for key in _OWNERS if earlier.get(key) != asking.get(key)]
    if differing:
        raise PolicyError(
            f"{argument}: expected an earlier run of the same submitter, found another {differing[0]}. "
            "Submit the job as who submitted that one."
        )
