"""Splits data over sites: evenly at random, or skewed by a column with one Dirichlet draw for all splits."""

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from nvflare_llm_components.data.records import Record, read_records, write_jsonl

SPLITS = ("training.jsonl", "validation.jsonl", "testing.jsonl")
Proportions = dict[Hashable, np.ndarray]
"""By label, the share of its rows that each site gets."""


def partition(
    source: Path,
    out: Path,
    *,
    num_sites: int,
    method: str | None = None,
    column: str | None = None,
    alpha: float = 0.5,
    seed: int = 0,
) -> dict[str, dict[str, int]]:
    """Writes ``out/site-K/<name>.jsonl`` for K from 1 to ``num_sites``, each row to one site.

    Of a folder its training, validation and testing rows are split alike: a site that has most of a
    label's training rows has most of its validation rows, too.

    Args:
        source: a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, or a folder that ``prepare`` wrote.
        out: folder that gets one folder a site.
        num_sites: number of sites, at most the number of rows.
        method: ``iid`` or ``dirichlet``; None is dirichlet where there is a column.
        column: for ``dirichlet``, the column by whose values sites differ.
        alpha: for ``dirichlet``, above 0; small means that sites differ much.
        seed: of the draw; the same seed gives the same bytes.

    Returns:
        Number of rows by site name, by file name.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a setting or a file's content is not as expected.
    """
    method = method or ("dirichlet" if column else "iid")
    if method not in ("iid", "dirichlet"):
        raise ValueError(f"`method` should be 'iid' or 'dirichlet'. Found {method!r}.")
    if method == "iid" and column:
        raise ValueError("`column` is of method 'dirichlet'. Found it with 'iid'. Leave one of them out.")
    contents = {file: read_records(file) for file in _files(source)}
    proportions: Proportions = {}
    rows_of: dict[str, dict[str, list[Record]]] = {}
    for number, (file, records) in enumerate(contents.items(), seed):
        if method == "iid":
            shares = iid_shares(len(records), num_sites, number)
        else:
            shares = dirichlet_shares(_labels(file, records, column), num_sites, alpha, number, proportions)
        own = [[records[row] for row in share] for share in shares]
        rows_of[f"{file.stem}.jsonl"] = {f"site-{place}": rows for place, rows in enumerate(own, 1)}
    for name, by_site in rows_of.items():  # when all could be split
        for site, rows in by_site.items():
            write_jsonl(out / site / name, rows)
    return {name: {site: len(rows) for site, rows in by_site.items()} for name, by_site in rows_of.items()}


def _files(source: Path) -> list[Path]:
    if not source.is_dir():
        return [source]
    found = [source / name for name in SPLITS if (source / name).is_file()]
    if not found:
        raise FileNotFoundError(f"{source}: expected {', '.join(SPLITS)} in it. Found none of them.")
    return found


def iid_shares(num_rows: int, num_sites: int, seed: int) -> list[list[int]]:
    """Deals shuffled rows over sites; sizes differ by one at most.

    Args:
        num_rows: number of rows.
        num_sites: number of sites.
        seed: of the shuffle.

    Returns:
        For each site its row numbers, ascending.

    Raises:
        ValueError: there are fewer rows than sites, or no site.
    """
    _require_enough(num_rows, num_sites)
    order = np.random.default_rng(seed).permutation(num_rows)
    return [sorted(part.tolist()) for part in np.array_split(order, num_sites)]


def dirichlet_shares(
    labels: Sequence[Hashable],
    num_sites: int,
    alpha: float,
    seed: int,
    proportions: Proportions | None = None,
) -> list[list[int]]:
    """Splits the rows of each label over sites in proportions drawn from Dirichlet(alpha), as in https://arxiv.org/abs/1909.06335.

    A site that drew nothing gets a row of the largest one: a site without data could not train.

    Args:
        labels: label of each row.
        num_sites: number of sites.
        alpha: concentration, above 0.
        seed: of all draws.
        proportions: those drawn before, which are used again; what is drawn here is added.

    Returns:
        For each site its row numbers, ascending.

    Raises:
        ValueError: ``alpha`` is not positive, there are fewer rows than sites, or no site.
    """
    if not alpha > 0:
        raise ValueError(f"`alpha` should be above 0. Found {alpha}.")
    _require_enough(len(labels), num_sites)
    draw = np.random.default_rng(seed)
    shares: list[list[int]] = [[] for _ in range(num_sites)]
    drawn = {} if proportions is None else proportions
    for label in dict.fromkeys(labels):
        rows = draw.permutation([row for row, of_row in enumerate(labels) if of_row == label])
        if label not in drawn:
            drawn[label] = draw.dirichlet([alpha] * num_sites)
        cuts = np.cumsum(drawn[label])[:-1] * len(rows)
        for share, part in zip(shares, np.split(rows, cuts.round().astype(int)), strict=True):
            share.extend(part.tolist())
    return _without_empty(shares)


def _without_empty(shares: list[list[int]]) -> list[list[int]]:
    for share in shares:
        if not share:
            share.append(max(shares, key=len).pop())
    return [sorted(share) for share in shares]


def _require_enough(num_rows: int, num_sites: int) -> None:
    if num_sites < 1:
        raise ValueError(f"`sites` should be at least 1. Found {num_sites}.")
    if num_rows < num_sites:
        raise ValueError(
            f"Partition: expected at least one row for each of {num_sites} sites. Found {num_rows} rows."
        )


def _labels(file: Path, records: Sequence[Record], column: str | None) -> list[Hashable]:
    if column is None:
        raise ValueError("`column` should name a column when `method` is 'dirichlet'. Found none.")
    for number, record in enumerate(records, 1):
        if column not in record:
            raise ValueError(
                f"{file}, row {number}: expected the column {column!r}. Found {', '.join(record)}."
            )
    return [str(record[column]) for record in records]
