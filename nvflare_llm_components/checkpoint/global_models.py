"""The models that a job keeps on disk: last, best, every so many rounds."""

import errno
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from nvflare_llm_components.checkpoint.initial_model import InitialModel
from nvflare_llm_components.checkpoint.key_metric import KeyMetric, means_of
from nvflare_llm_components.checkpoint.manifest import read_manifest, verify_files, write_manifest
from nvflare_llm_components.checkpoint.mapped import share_on_deepcopy
from nvflare_llm_components.checkpoint.model_folder import link_model_folder, save_model_folder
from nvflare_llm_components.checkpoint.provenance import chain_after
from nvflare_llm_components.checkpoint.validate import Inspection, Tensors, validate
from nvflare_llm_components.checkpoint.weight_files import map_weights
from nvflare_llm_components.tensors.atomic import recover_folder
from nvflare_llm_components.tensors.errors import CheckpointError
from nvflare_llm_components.tensors.names import normalised
from nvflare_llm_components.tensors.safetensors_file import stored_dtype

FOLDER = "global_model"
"""Where a run directory holds its models."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
LAST, BEST, MASTER = "last", "best", "master"
T = TypeVar("T")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class GlobalModels:
    """A folder of model folders: `last`, `best`, `round_N`; and `master` where these are of lower precision.

    Folders of the same content share their files on disk.
    """

    def __init__(
        self,
        root: Path,
        initial: InitialModel,
        *,
        keep: Sequence[str] = (LAST, BEST),
        save_dtype: str | None = None,
        max_shard_size: int | str = "5GB",
    ):
        """Check the settings; nothing is written.

        Args:
            root: the folder.
            initial: the model of round zero: what later ones must look like, and their companions on disk.
            keep: "last" (always), "best", and "every N" for each N-th round.
            save_dtype: "float32", "float16" or "bfloat16" on disk; None keeps the model's.
            max_shard_size: bytes, or a string such as "5GB".

        Raises:
            CheckpointError: if `keep` or `save_dtype` is none of these.
        """
        self.root = root
        self._initial = initial
        self._shapes = {name: tuple(value.shape) for name, value in initial.weights.items()}
        self._companions, self._aliases, self._frozen = initial.companions, initial.aliases, initial.frozen
        self._keep_best, self._every = _keep(keep)
        self._dtype = _dtype(save_dtype)
        self._max_shard_size = max_shard_size
        self._handed_out: dict[str, torch.Tensor] = {}
        self._base = _begun(initial.base)

    def save_last(self, weights: Tensors, record: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """Save a round's model, and return equal tensors that lie in its files.

        Args:
            weights: tensors by checkpoint name, lazy ones made once, as each is written; a tied weight may
                stand under its other names too.
            record: round, job_id, metrics, parents.

        Raises:
            CheckpointError: if the model is empty, partial, mis-shaped or not finite, or the disk is full;
                what was saved before stays as it was.
        """
        weights = normalised(weights, self._shapes, self._aliases)
        validate(weights, self._shapes, _title(record))
        inspection = Inspection(self._handed_out or self._initial.weights, _title(record))
        record = {**record, **self._chain(record.get("job_id"))}
        whole = {**self._frozen, **weights}
        exact = all(stored_dtype(value, self._dtype) == value.dtype for value in whole.values())
        master = LAST if exact else MASTER
        self._write(master, weights, record, None, inspection)
        saved = self._trained(map_weights(self.root / master))
        if not exact:
            self._write(LAST, saved, {**record, "update_norm": inspection.update_norm()}, self._dtype)
        if self._every and (record["round"] + 1) % self._every == 0:
            link_model_folder(self.root / LAST, self.root / f"round_{record['round']}", {})
        self._handed_out = saved
        share_on_deepcopy(self._handed_out)
        return dict(self._handed_out)

    def save_best(self, weights: Tensors, record: Mapping[str, Any], key: KeyMetric | None = None) -> bool:
        """Save a model as the best so far, by a link to `last` where it is that one.

        Args:
            weights: tensors by checkpoint name.
            record: round, job_id, metrics, parents.
            key: which of the metrics decides; None where the caller knows that it is the best.

        Returns:
            Whether it was saved: not where `keep` has no best, or the best on disk is at least as good.
        """
        if not self._keep_best or (key and self._is_beaten(key, record["metrics"])):
            return False
        changes = {"metrics": record["metrics"]} | ({"key_metric": key.record()} if key else {})
        weights = normalised(weights, self._shapes, self._aliases)
        if self._handed_out and all(weights.get(name) is value for name, value in self._handed_out.items()):
            link_model_folder(self.root / LAST, self.root / BEST, changes)
        else:
            self._write(BEST, weights, {**record, **changes}, self._dtype)
        return True

    def judge_last(self, evaluated: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
        """Write evaluations into the records, and make `last` the best where its key metric is better.

        Args:
            evaluated: metrics by site, by model; a model that some site left out is not compared.

        Returns:
            What was decided, in a sentence; empty if there was nothing to decide.
        """
        key = KeyMetric.of(read_manifest(self.root / BEST))
        means = {name: means_of(by_site) for name, by_site in evaluated.items()}
        for name, metrics in means.items():
            if metrics and (self.root / name).is_dir():
                write_manifest(self.root / name, {**read_manifest(self.root / name), "metrics": metrics})
        if key.name not in means.get(LAST, {}) or not self._keep_best:
            return ""
        last, best = means[LAST][key.name], means.get(BEST, {}).get(key.name)
        if (self.root / BEST).is_dir():
            if best is None or evaluated[LAST].keys() != evaluated[BEST].keys():
                return ""
            if not key.is_better(last, best):
                return f"best stays: {key.name} {best:.6f}, last {last:.6f}"
        link_model_folder(self.root / LAST, self.root / BEST, {"key_metric": key.record()})
        was = "" if best is None else f", was {best:.6f}"
        return f"last is the new best: {key.name} {last:.6f}{was}"

    def take_over(self, earlier: Path) -> None:
        """Link an earlier run's models into this folder, so that this run can be continued in its turn."""
        for name in (MASTER, LAST, BEST):
            if (earlier / name).is_dir():
                link_model_folder(earlier / name, self.root / name, {})

    def folders(self) -> dict[str, Path]:
        """Return the folders of last and best, those that exist."""
        return {name: self.root / name for name in (LAST, BEST) if (self.root / name).is_dir()}

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Return a saved model, mapped from its files after comparing their checksums.

        Raises:
            CheckpointError: if a file is missing or changed.
        """
        verify_files(self.root / name)
        weights = self._trained(map_weights(self.root / name))
        share_on_deepcopy(weights)
        if name == LAST:
            self._handed_out = dict(weights)  # `best` can be a link to it
        return weights

    def _chain(self, job_id: str | None) -> dict[str, Any]:
        """Return what the record says of the models before this one."""
        before = earlier_model(self.root)
        return chain_after(read_manifest(before) if before else {}, self._base.result, job_id)

    def _trained(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value for name, value in weights.items() if name not in self._frozen}

    def _is_beaten(self, key: KeyMetric, metrics: Mapping[str, float]) -> bool:
        """Tell whether the best model on disk, perhaps an earlier run's, is at least as good."""
        best = read_manifest(self.root / BEST).get("metrics", {}).get(key.name)
        return best is not None and not (key.name in metrics and key.is_better(metrics[key.name], best))

    def _write(
        self,
        name: str,
        weights: Tensors,
        record: Mapping[str, Any],
        dtype: torch.dtype | None,
        inspection: Inspection | None = None,
    ) -> None:
        folder = self.root / name
        weights = {**self._frozen, **weights}
        try:
            companions, shard = self._companions, self._max_shard_size
            save_model_folder(folder, weights, companions, record, shard, dtype, inspection)
        except OSError as error:
            size = sum(
                value.shape.numel() * stored_dtype(value, dtype).itemsize for value in weights.values()
            )
            raise CheckpointError(
                f"{_title(record)} could not be saved as {folder}: {error}. It takes {_mb(size)}, and "
                f"{_mb(shutil.disk_usage(self.root).free)} are free. The models saved before it are whole: "
                f"{'make room' if error.errno in _NO_ROOM else 'see to the cause'}, "
                "then continue the job from them (nvflare-llm resume)."
            ) from error


def _begun(call: Callable[[], T]) -> "Future[T]":
    """Call it beside the first round, whose save would wait for it."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="base-model")
    future = pool.submit(call)
    pool.shutdown(wait=False)
    return future


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"


def _title(record: Mapping[str, Any]) -> str:
    sites = record["parents"].get("sites")
    return f"The global model after round {record['round']}{f' from sites {sites}' if sites else ''}"


def earlier_model(root: Path) -> Path | None:
    """Return the folder that a later run goes on from: the latest of `master` and `last`, or None."""
    for name in (LAST, MASTER):
        recover_folder(root / name)
    found = [root / name for name in (MASTER, LAST) if (root / name).is_dir()]
    return max(found, key=lambda folder: int(read_manifest(folder)["round"]), default=None)


def resumed_model(run_dir: str) -> Path:
    """Return the folder that a run goes on from, given the server's run directory of the earlier one.

    Raises:
        CheckpointError: if there is no saved model.
    """
    model = earlier_model(Path(run_dir) / FOLDER)
    if model is None:
        raise CheckpointError(
            f"resume_from: expected a saved model below {run_dir}/{FOLDER}, found none. Give the server's "
            "run directory of the earlier job, or leave resume_from out."
        )
    return model


def _keep(keep: Sequence[str]) -> tuple[bool, int]:
    """Return whether best is kept, and every how many rounds' model (0: none)."""
    found = {word: re.fullmatch(r"every ([1-9]\d*)", word) for word in keep if word not in (LAST, BEST)}
    every = [int(match.group(1)) for match in found.values() if match]
    if len(every) < len(found) or LAST not in keep or len(every) > 1:
        raise CheckpointError(
            f'keep: expected "last", and where wanted "best" and one "every N", found {list(keep)}. '
            "The last model is what the job goes on with, and can't be left out."
        )
    return BEST in keep, every[0] if every else 0


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise CheckpointError(f"save_dtype: expected one of {list(DTYPES)} or null, found {name!r}.")
    return None if name is None else DTYPES[name]
