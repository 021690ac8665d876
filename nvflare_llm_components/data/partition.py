"""Splits one data file over sites: evenly at random, or skewed by a column with a Dirichlet draw."""

from collections.abc import Hashable, Sequence
from pathlib import Path

import numpy as np

from nvflare_llm_components.data.records import Record, read_records, write_jsonl


def partition(
    file: Path,
    out: Path,
    *,
    num_sites: int,
    method: str = "iid",
    column: str | None = None,
    alpha: float = 0.5,
    seed: int = 0,
) -> dict[str, int]:
    """Writes ``out/site-K/<name of the file>.jsonl`` for K from 1 to ``num_sites``, each row to one site.

    Args:
        file: a ``.jsonl``, ``.json`` or ``.parquet`` file.
        out: folder that gets one folder a site.
        num_sites: number of sites, at most the number of rows.
        method: ``iid`` or ``dirichlet``.
        column: for ``dirichlet``, the column by whose values sites differ.
        alpha: for ``dirichlet``, above 0; small means that sites differ much.
        seed: of the draw; the same seed gives the same bytes.

    Returns:
        Number of rows by site name.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: a setting or the file's content is not as expected.
    """
    records = read_records(file)
    if method == "iid":
        shares = iid_shares(len(records), num_sites, seed)
    elif method == "dirichlet":
        shares = dirichlet_shares(_labels(file, records, column), num_sites, alpha, seed)
    else:
        raise ValueError(f"`method` should be 'iid' or 'dirichlet'. Found {method!r}.")
    for number, share in enumerate(shares, 1):
        write_jsonl(out / f"site-{number}" / f"{file.stem}.jsonl", [records[row] for row in share])
    return {f"site-{number}": len(share) for number, share in enumerate(shares, 1)}


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


def dirichlet_shares(labels: Sequence[Hashable], num_sites: int, alpha: float, seed: int) -> list[list[int]]:
    """Splits the rows of each label over sites in proportions drawn from Dirichlet(alpha), as in https://arxiv.org/abs/1909.06335.

    A site that drew nothing gets a row of the largest one: a site without data could not train.

    Args:
        labels: label of each row.
        num_sites: number of sites.
        alpha: concentration, above 0.
        seed: of all draws.

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
    for label in dict.fromkeys(labels):
        rows = draw.permutation([row for row, of_row in enumerate(labels) if of_row == label])
        cuts = np.cumsum(draw.dirichlet([alpha] * num_sites))[:-1] * len(rows)
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
