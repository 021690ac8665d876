import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvflare_llm_components.data.partition import dirichlet_shares, iid_shares, partition
from nvflare_llm_components.data.records import read_records

sites_and_rows = st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, 200)))
seeds = st.integers(0, 2**32 - 1)


def assert_every_row_once(shares: list[list[int]], num_rows: int, num_sites: int) -> None:
    assert len(shares) == num_sites
    assert all(shares)
    assert sorted(row for share in shares for row in share) == list(range(num_rows))


@given(sites_and_rows, seeds)
@settings(deadline=None)
def test_iid_deals_every_row_once_evenly_and_seeded(sizes, seed):
    num_sites, num_rows = sizes
    shares = iid_shares(num_rows, num_sites, seed)
    assert_every_row_once(shares, num_rows, num_sites)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert shares == iid_shares(num_rows, num_sites, seed)


@given(sites_and_rows, st.floats(0.01, 100), seeds, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_dirichlet_deals_every_row_once_and_seeded(sizes, alpha, seed, random):
    num_sites, num_rows = sizes
    labels = [random.choice("abcd") for _ in range(num_rows)]
    shares = dirichlet_shares(labels, num_sites, alpha, seed)
    assert_every_row_once(shares, num_rows, num_sites)
    assert shares == dirichlet_shares(labels, num_sites, alpha, seed)


def test_small_alpha_skews_and_large_alpha_does_not():
    labels = ["a"] * 500 + ["b"] * 500
    share_of_a = {
        alpha: [
            sum(labels[row] == "a" for row in share) / len(share)
            for share in dirichlet_shares(labels, 4, alpha, 0)
        ]
        for alpha in (0.05, 1000.0)
    }
    assert max(share_of_a[0.05]) - min(share_of_a[0.05]) > 0.8
    assert max(share_of_a[1000.0]) - min(share_of_a[1000.0]) < 0.1


def test_another_seed_deals_otherwise():
    assert iid_shares(50, 3, 0) != iid_shares(50, 3, 1)


def test_partition_writes_one_folder_a_site(tmp_path):
    rows = [{"input": f"é {i}", "output": str(i), "kind": "ab"[i % 2]} for i in range(20)]
    file = tmp_path / "training.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = partition(file, tmp_path / "out", num_sites=3, method="dirichlet", column="kind", seed=5)[
        "training.jsonl"
    ]
    found = {site: read_records(tmp_path / "out" / site / "training.jsonl") for site in sizes}
    assert {site: len(part) for site, part in found.items()} == sizes
    assert (
        sorted((row for part in found.values() for row in part), key=lambda row: int(row["output"])) == rows
    )


def write_rows(file, kinds):
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"input": f"{file.stem} {n}", "output": "x", "kind": kind} for n, kind in enumerate(kinds)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@given(st.floats(0.05, 2), seeds)
@settings(deadline=None, max_examples=20)
def test_one_draw_splits_training_and_validation_alike(tmp_path_factory, alpha, seed):
    folder = tmp_path_factory.mktemp("split")
    write_rows(folder / "training.jsonl", "abc" * 200)
    write_rows(folder / "validation.jsonl", "cba" * 100)
    partition(folder, folder / "out", num_sites=3, column="kind", alpha=alpha, seed=seed)
    for site in ("site-1", "site-2", "site-3"):
        train, evaluate = (
            [row["kind"] for row in read_records(folder / "out" / site / f"{name}.jsonl")]
            for name in ("training", "validation")
        )
        for kind in "abc":
            assert abs(train.count(kind) / 200 - evaluate.count(kind) / 100) <= 0.025


def test_a_column_without_a_method_means_dirichlet(tmp_path):
    write_rows(tmp_path / "rows.jsonl", "ab" * 100)
    options = {"num_sites": 2, "column": "kind", "alpha": 0.05}
    partition(tmp_path / "rows.jsonl", tmp_path / "given", method="dirichlet", **options)
    partition(tmp_path / "rows.jsonl", tmp_path / "meant", **options)
    given_, meant = ((tmp_path / name / "site-1/rows.jsonl").read_text() for name in ("given", "meant"))
    assert given_ == meant


def test_a_folder_without_splits_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"expected training\.jsonl"):
        partition(tmp_path, tmp_path, num_sites=2)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"num_sites": 0}, "`sites` should be at least 1"),
        ({"num_sites": 5}, "expected at least one row for each of 5 sites. Found 2 rows"),
        ({"num_sites": 2, "method": "even"}, "`method` should be 'iid' or 'dirichlet'. Found 'even'"),
        ({"num_sites": 2, "method": "iid", "column": "a"}, "`column` is of method 'dirichlet'"),
        ({"num_sites": 2, "method": "dirichlet"}, "`column` should name a column"),
        ({"num_sites": 2, "method": "dirichlet", "column": "c"}, "row 1: expected the column 'c'. Found a"),
        ({"num_sites": 2, "method": "dirichlet", "column": "a", "alpha": 0.0}, "`alpha` should be above 0"),
        (
            {"num_sites": 2, "method": "dirichlet", "column": "a", "alpha": float("nan")},
            "`alpha` should be above 0",
        ),
    ],
)
def test_wrong_settings_are_refused(tmp_path, settings_, message):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    with pytest.raises(ValueError, match=message):
        partition(tmp_path / "rows.jsonl", tmp_path / "out", **settings_)
