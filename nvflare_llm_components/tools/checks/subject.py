"""What is checked, and what a check finds."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nvflare_llm_components.jobs.read import config_file, objects_in, resolved

EXECUTOR = "nvflare_llm_components.executors.HFSFTExecutor"
PERSISTOR = "nvflare_llm_components.persistors.SafetensorsModelPersistor"
QUANTIZE = "nvflare_llm_components.filters.PrecisionQuantizeFilter"
DEQUANTIZE = "nvflare_llm_components.filters.PrecisionDequantizeFilter"
Json = dict[str, Any]


@dataclass(frozen=True)
class Finding:
    """One thing that a check found.

    Attributes:
        level: ``error`` (the job would fail), ``warning`` (it would do something else than it seems) or
            ``note``.
        sentence: where, what was expected, what was found, and what to do.
    """

    level: str
    sentence: str


def error(sentence: str) -> Finding:
    """Something that the job would fail of."""
    return Finding("error", sentence)


def warning(sentence: str) -> Finding:
    """Something that would go otherwise than it seems."""
    return Finding("warning", sentence)


def note(sentence: str) -> Finding:
    """Something to know."""
    return Finding("note", sentence)


@dataclass(frozen=True)
class Subject:
    """A job, the sites that would run it, and where; everything is read once, at first use.

    Attributes:
        job: the job's folder.
        sites: names of the sites.
        workspace: of the simulator, or a startup kit; None if not known yet.
        also: further classes that will be allowed.
    """

    job: Path
    sites: tuple[str, ...]
    workspace: Path | None = None
    also: tuple[str, ...] = ()

    @cached_property
    def server(self) -> Json:
        """The server's configuration, resolved."""
        return resolved(self.job, "server")

    @cached_property
    def clients(self) -> dict[str, Json]:
        """Each site's configuration, resolved."""
        return {site: resolved(self.job, "client", site) for site in self.sites}

    @cached_property
    def texts(self) -> dict[str, str]:
        """The configurations as they are written, by the name of their file below the job."""
        files = [config_file(self.job, "server"), *(config_file(self.job, "client", s) for s in self.sites)]
        return {str(file.relative_to(self.job)): file.read_text(encoding="utf-8") for file in files}

    @cached_property
    def executors(self) -> dict[str, Json]:
        """Arguments of our executor, by site; sites without it are left out."""
        found = {site: list(args_of(config, EXECUTOR)) for site, config in self.clients.items()}
        return {site: args[0] for site, args in found.items() if args}

    @property
    def workflow(self) -> Json:
        """Arguments of the first workflow with rounds."""
        args = [each.get("args") or {} for each in self.server.get("workflows", [])]
        return next((each for each in args if "num_rounds" in each), {})

    def models(self) -> dict[str, Any]:
        """What names the model, by site; ``server`` is among them where it has one."""
        named = {site: args.get("model_name_or_path") for site, args in self.executors.items()}
        persistor = next(args_of(self.server, PERSISTOR), None)
        return named if persistor is None else named | {"server": persistor.get("model_name_or_path")}

    def local_models(self) -> dict[str, Path]:
        """Folder of the model on this machine, by site; see :meth:`models`."""
        return {site: Path(name) for site, name in self.models().items() if name and Path(name).is_dir()}


Check = Callable[[Subject], Iterable[Finding]]


def components_of(node: object) -> Iterator[tuple[str, Json]]:
    """Class path and arguments of every component in a configuration."""
    for found in objects_in(node):
        if isinstance(found.get("path"), str) and found.get("config_type") != "dict":
            yield found["path"], found.get("args") or {}


def args_of(config: Json, path: str) -> Iterator[Json]:
    """Arguments of the components of one class."""
    return (args for found, args in components_of(config) if found == path)


def by_sentence(found: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Pairs of site and sentence, with the sites that share a sentence put together."""
    sites: dict[str, list[str]] = {}
    for site, sentence in found:
        sites.setdefault(sentence, []).append(site)
    return ((", ".join(names), sentence) for sentence, names in sites.items())
