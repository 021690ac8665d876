"""The models that a job keeps on disk: last, best, every so many rounds."""

import math
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from nvflare_llm_components.checkpoint.errors import CheckpointError
from nvflare_llm_components.checkpoint.folder import map_weights
from nvflare_llm_components.checkpoint.record import read_record, verify_files, write_record
from nvflare_llm_components.checkpoint.shared import share_on_deepcopy
from nvflare_llm_components.checkpoint.snapshot import link_snapshot, save_snapshot
from nvflare_llm_components.checkpoint.soundness import refuse_unsound
from nvflare_llm_components.checkpoint.start import Start
from nvflare_llm_components.checkpoint.swap import recover_folder
from nvflare_llm_components.checkpoint.tensor_files import stored_dtype

LAST, BEST, MASTER = "last", "best", "master"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class GlobalModels:
    """A folder of model folders: `last`, `best`, `round_N`; and `master` where these are of lower precision.

    Folders of the same content share their files on disk.
    """

    def __init__(
        self,
        root: Path,
        start: Start,
        *,
        keep: Sequence[str] = (LAST, BEST),
        save_dtype: str | None = None,
        max_shard_size: int | str = "5GB",
    ):
        """Check the settings; nothing is written.

        Args:
            root: the folder.
            start: the model of round zero: what later ones must look like, and their companions on disk.
            keep: "last" (always), "best", and "every N" for each N-th round.
            save_dtype: "float32", "float16" or "bfloat16" on disk; None keeps the model's.
            max_shard_size: bytes, or a string such as "5GB".

        Raises:
            CheckpointError: if `keep` or `save_dtype` is none of these.
        """
        self.root = root
        self._shapes = {name: tuple(value.shape) for name, value in start.weights.items()}
        self._companions = start.companions
        self._keep_best, self._every = _keep(keep)
        self._dtype = _dtype(save_dtype)
        self._max_shard_size = max_shard_size
        self._handed_out: dict[str, torch.Tensor] = {}

    def save_last(
        self, weights: dict[str, torch.Tensor], record: Mapping[str, Any]
    ) -> dict[str, torch.Tensor]:
        """Save a round's model, and return equal tensors that lie in its files.

        Args:
            weights: tensors by checkpoint name.
            record: round, job_id, metrics, parents.

        Raises:
            CheckpointError: if the model is empty, partial, mis-shaped or not finite, or the disk is full;
                what was saved before stays as it was.
        """
        refuse_unsound(weights, self._shapes, _title(record))
        exact = all(stored_dtype(value, self._dtype) == value.dtype for value in weights.values())
        if not exact:
            self._write(MASTER, weights, record, None)
        self._write(LAST, weights, record, self._dtype)
        if self._every and (record["round"] + 1) % self._every == 0:
            link_snapshot(self.root / LAST, self.root / f"round_{record['round']}", {})
        self._handed_out = map_weights(self.root / (LAST if exact else MASTER))
        share_on_deepcopy(self._handed_out)
        return dict(self._handed_out)

    def save_best(
        self, weights: dict[str, torch.Tensor], record: Mapping[str, Any], lower_is_better: bool = True
    ) -> bool:
        """Save a model as the best so far, by a link to `last` where it is that one.

        Args:
            weights: tensors by checkpoint name.
            record: round, job_id, metrics, parents.
            lower_is_better: of the metrics.

        Returns:
            Whether it was saved: not where `keep` has no best, or the best on disk has better metrics.
        """
        beaten = (
            self._is_beaten(metric, value, lower_is_better) for metric, value in record["metrics"].items()
        )
        if not self._keep_best or any(beaten):
            return False
        if self._handed_out and all(weights.get(name) is value for name, value in self._handed_out.items()):
            link_snapshot(self.root / LAST, self.root / BEST, {"metrics": record["metrics"]})
        else:
            self._write(BEST, weights, record, self._dtype)
        return True

    def judge_last(self, metric: str, losses: Mapping[str, Mapping[str, float]]) -> str:
        """Write evaluations into the records, and make `last` the best where its loss is lower.

        Args:
            metric: the loss's name.
            losses: loss by site, by model; a model that some site left out is not compared.

        Returns:
            What was decided, in a sentence; empty if there was nothing to decide.
        """
        means = {
            name: math.fsum(by_site.values()) / len(by_site) for name, by_site in losses.items() if by_site
        }
        for name, mean in means.items():
            if (self.root / name).is_dir():
                write_record(self.root / name, {**read_record(self.root / name), "metrics": {metric: mean}})
        if LAST not in means or not self._keep_best:
            return ""
        if (self.root / BEST).is_dir():
            if losses[LAST].keys() != losses.get(BEST, {}).keys():
                return ""
            if means[LAST] >= means[BEST]:
                return f"best stays: {metric} {means[BEST]:.6f}, last {means[LAST]:.6f}"
        link_snapshot(self.root / LAST, self.root / BEST, {})
        return f"last is the new best: {metric} {means[LAST]:.6f}, was {means.get(BEST, math.inf):.6f}"

    def take_over(self, earlier: Path) -> None:
        """Link an earlier run's models into this folder, so that this run can be continued in its turn."""
        for name in (MASTER, LAST, BEST):
            if (earlier / name).is_dir():
                link_snapshot(earlier / name, self.root / name, {})

    def folders(self) -> dict[str, Path]:
        """Return the folders of last and best, those that exist."""
        return {name: self.root / name for name in (LAST, BEST) if (self.root / name).is_dir()}

    def load(self, name: str) -> dict[str, torch.Tensor]:
        """Return a saved model, mapped from its files after comparing their checksums.

        Raises:
            CheckpointError: if a file is missing or changed.
        """
        verify_files(self.root / name)
        weights = map_weights(self.root / name)
        share_on_deepcopy(weights)
        return weights

    def _is_beaten(self, metric: str, value: float, lower_is_better: bool) -> bool:
        """Tell whether the best model on disk, perhaps an earlier run's, is at least as good."""
        best = read_record(self.root / BEST).get("metrics", {}).get(metric)
        return best is not None and not (value < best if lower_is_better else value > best)

    def _write(
        self,
        name: str,
        weights: dict[str, torch.Tensor],
        record: Mapping[str, Any],
        dtype: torch.dtype | None,
    ) -> None:
        folder = self.root / name
        try:
            save_snapshot(folder, weights, self._companions, record, self._max_shard_size, dtype)
        except OSError as error:
            size = sum(value.numel() * stored_dtype(value, dtype).itemsize for value in weights.values())
            raise CheckpointError(
                f"{_title(record)} could not be saved as {folder}: {error}. It takes {_mb(size)}, and "
                f"{_mb(shutil.disk_usage(self.root).free)} are free. The models saved before it are whole: "
                "make room, then continue the job from them (nvflare-llm resume)."
            ) from error


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
    return max(found, key=lambda folder: int(read_record(folder)["round"]), default=None)


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
