"""What clients are dealt unequal shares of: classes, values of a column, lengths, domains, clusters; by hand and scikit-learn."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import tiny
from sklearn.metrics import adjusted_rand_score
from tiny import Silent, load

from fedlora.config import ClientsConfig, DataConfig, resolve
from fedlora.data.dataset import Dataset, Schema, Split
from fedlora.data.domains import deal
from fedlora.data.partition import counts
from fedlora.data.strata import bins, by_cluster
from fedlora.errors import BadInput
from fedlora.runs import play
from fedlora.runs.prepare import prepare


def write(folder: Path, name: str = "train.csv", **columns: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    pa.csv.write_csv(pa.table(columns), folder / name)
    return folder


def words(count: int) -> list[str]:
    return [f"text {i} " + "word " * (i % 10) for i in range(count)]


def test_bins_are_tenths_of_what_is_known() -> None:
    values = np.arange(100) ** 2.0
    found, names = bins(values, values)
    assert np.bincount(found).tolist() == [10] * 10 and len(names) == 10 and names[0] == "0 to 98.1"
    assert bins([-5.0, 1e9], values)[0].tolist() == [0, 9]  # beyond the known ones: the outermost
    assert bins([1.0, 2.0], [3.0] * 5) == (pytest.approx(np.zeros(2)), ("3",))
    few, three = bins([1, 1, 1, 1, 2, 3], [1, 1, 1, 1, 2, 3])
    assert len(three) == few.max() + 1 < 10 and few[0] < few[-1]


def test_the_values_of_a_column_are_dealt(tmp_path: Path) -> None:
    countries = [("de", "fr", "it")[i % 3] for i in range(90)]
    folder = write(tmp_path / "d", text=words(90), label=["xy"[i % 2] for i in range(90)], country=countries)
    config = DataConfig(source=str(folder), strata="column", column="country", alpha=0.05)
    data = load(config, 0)
    assert data.strata_names == ("de", "fr", "it") and data.strata_kind == "values of 'country'" and not data.train.owners
    assert data.schema.label_names == ("x", "y")
    rows = [int(text.split()[1]) for text in data.train.inputs]
    assert [data.strata_names[s] for s in data.train.strata] == [countries[row] for row in rows]
    assert "drawn by seed within owners and values of 'country'" in data.notes[0] or "within values of" in data.notes[0]
    parts = deal(data, config, ClientsConfig(count=3), 0)
    by_country = counts(parts.train, data.train.strata, 3)
    by_label = counts(parts.train, data.train.targets, 2)
    assert (by_country.max(axis=1) / by_country.sum(axis=1)).mean() > 0.85  # each client has one country, nearly
    assert (by_label.max(axis=1) / by_label.sum(axis=1)).max() < 0.75  # and both labels


def test_a_part_without_the_column_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", text=words(9), label=["x", "y", "x"] * 3, country=["de", "fr", "it"] * 3)
    write(tmp_path / "d", "test.csv", text=["a"], label=["x"])
    with pytest.raises(BadInput, match="the test part of d has no column 'country'"):
        load(DataConfig(source=str(folder), strata="column", column="country"), 0)


def test_lengths_are_dealt(tmp_path: Path) -> None:
    folder = write(tmp_path / "d", text=words(200), label=["xy"[i % 2] for i in range(200)])
    config = DataConfig(source=str(folder), strata="length", alpha=0.05)
    data = load(config, 0)
    lengths = np.array([len(text) for text in data.train.inputs])
    assert data.strata_kind == "lengths" and len(data.strata_names) >= 8
    for s in range(1, len(data.strata_names)):
        assert lengths[data.train.strata == s - 1].max() <= lengths[data.train.strata == s].min()
    parts = deal(data, config, ClientsConfig(count=4), 0)
    spread = [lengths[rows].std() for rows in parts.train]
    assert np.mean(spread) < 0.8 * lengths.std()


def test_domains_are_dealt_as_strata_or_in_turn(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write(tmp_path / name, text=[f"{name} {x}" for x in words(60)], label=["xy"[i % 2] for i in range(60)])
    sources = [str(tmp_path / name) for name in "abc"]
    config = DataConfig(source=sources, strata="domain", alpha=1.0)
    data = load(config, 0)
    assert data.strata_names == ("a", "b", "c") and np.array_equal(data.train.strata, data.train.domains)
    parts = deal(data, config, ClientsConfig(count=4), 0)
    table = counts(parts.train, data.train.domains, 3)
    assert (table > 0).sum() > 4 and table.sum() == len(data.train)  # clients hold shares of several domains
    assert np.array_equal(np.sort(np.concatenate(parts.train)), np.arange(len(data.train)))
    in_turn = deal(load(DataConfig(source=sources), 0), DataConfig(source=sources), ClientsConfig(count=4), 0)
    assert ((counts(in_turn.train, data.train.domains, 3) > 0).sum(axis=1) == 1).all()  # one domain each
    with pytest.raises(BadInput, match="needs several sources"):
        load(DataConfig(source=sources[0], strata="domain"), 0)


def test_clusters_are_those_of_the_features() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 120)
    features = np.eye(3)[truth] * 10 + rng.normal(size=(120, 3))
    train, test = (Split(tuple(map(str, rows)), truth[rows] % 2) for rows in (np.arange(100), np.arange(100, 120)))
    found = by_cluster(Dataset("d", train, test, Schema(("x", "y"))), lambda part: features[list(map(int, part.inputs))], 0, 3)
    assert found.strata_kind == "clusters" and found.strata_names == ("cluster 0", "cluster 1", "cluster 2")
    assert adjusted_rand_score(truth[:100], found.train.strata) == adjusted_rand_score(truth[100:], found.test.strata) == 1.0
    assert np.array_equal(found.train.targets, train.targets)


def test_a_run_over_clusters(bert_folder: Path, csv_folder: Path, tmp_path: Path) -> None:
    tables = {
        "precision": "fp32",
        "method": {"name": "fedit"},
        "model": {"source": str(bert_folder)},
        "data": {"source": str(csv_folder), "strata": "cluster", "alpha": 0.1},
        "clients": {"count": 3, "rank": 2},
        "train": {"rounds": 1},
    }
    context = prepare(resolve(tables), Silent())
    assert context.dataset.strata_kind == "clusters"
    table = counts(context.parts.train, context.dataset.train.strata, len(context.dataset.strata_names))
    even = counts(prepare(resolve(tables, {"data": {"partition": "iid"}}), Silent()).parts.train, context.dataset.train.strata, 10)
    assert (table == 0).sum() > (even == 0).sum()  # clients lack clusters
    summary = play.execute(resolve(tables), tmp_path / "run", False, Silent())
    assert summary["final"]["accuracy"] is not None


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"strata": "column"}, "needs data.column"),
        ({"strata": "column", "column": "a", "partition": "column"}, "owners or strata, not both"),
        ({"column": "a"}, r'or data\.strata = "column"'),
        ({"strata": "colour"}, r"data\.strata = 'colour'"),
    ],
)
def test_what_cannot_be(settings: dict[str, str], match: str) -> None:
    with pytest.raises(BadInput, match=match):
        resolve({"data": settings})


def test_the_command_says_strata_by_their_kind(
    csv_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    call = tiny.console(monkeypatch, capsys, tmp_path)
    status, out, _ = call("data", csv_folder, "--clients", 3, "--set", "data.strata=length")
    assert status == 0 and "lengths" in out and "classes" not in out
    status, _, err = call("data", csv_folder, "--set", "data.strata=cluster")
    assert status == 2 and "only a run finds them" in err
