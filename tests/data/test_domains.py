"""Several sources in one run: the union of their classes, and how clients come by domains."""

import csv
from pathlib import Path

import numpy as np
import pytest
from tiny import load

from fedlora.config import ClientsConfig, Config, DataConfig, resolve, to_toml
from fedlora.data.domains import deal, domain_counts, held_domains
from fedlora.data.partition import split
from fedlora.errors import BadInput
from fedlora.tables import setting, settings

SIZES = {"fruit": (30, 2), "mood": (60, 3), "place": (45, 4)}  # rows, classes


def write(folder: Path, name: str, columns: tuple[str, str] = ("text", "label")) -> str:
    rows, classes = SIZES[name]
    with open(folder / f"{name}.csv", "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(columns)
        out.writerows((f"{name} text {i}", f"c{i % classes}") for i in range(rows))
    return str(folder / f"{name}.csv")


@pytest.fixture
def three(tmp_path: Path) -> list[str]:
    return [write(tmp_path, name) for name in SIZES]


def test_the_union_holds_every_source_as_it_is_alone(three: list[str]) -> None:
    whole = load(DataConfig(source=three), 4)
    assert whole.name == "fruit + mood + place"
    assert whole.schema.label_names[:3] == ("fruit/c0", "fruit/c1", "mood/c0") and len(whole.schema.label_names) == 9
    assert [(t.name, t.first, t.count) for t in whole.domains] == [("fruit", 0, 2), ("mood", 2, 3), ("place", 5, 4)]
    for t, (source, domain) in enumerate(zip(three, whole.domains, strict=True)):
        alone = load(DataConfig(source=source), 4)
        assert alone.domains == () and len(alone.train.domains) == 0
        for part, own in ((whole.train, alone.train), (whole.test, alone.test)):
            rows = np.flatnonzero(part.domains == t)
            assert tuple(part.inputs[i] for i in rows) == own.inputs
            assert np.array_equal(part.targets[rows] - domain.first, own.targets)
    assert any(note.startswith("mood: no test part") for note in whole.notes)


def test_a_list_of_one_is_that_source(three: list[str]) -> None:
    one, listed = load(DataConfig(source=three[0]), 0), load(DataConfig(source=three[:1]), 0)
    assert (one.name, one.schema.label_names, one.train.inputs, one.domains) == (
        listed.name,
        listed.schema.label_names,
        listed.train.inputs,
        (),
    )
    assert np.array_equal(one.train.targets, listed.train.targets)


def test_columns_and_limit_of_each_source(tmp_path: Path) -> None:
    sources = [write(tmp_path, "fruit", ("q", "kind")), write(tmp_path, "mood")]
    whole = load(DataConfig(source=sources, text=["q", "text"], label=["kind", "label"], limit=7), 0)
    assert np.bincount(whole.train.domains).tolist() == [7, 7]


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"source": []}, "at least one source"),
        ({"source": ["a", "b"], "text": ["x"]}, "data.text lists 1"),
        ({"source": "a", "label": ["x"]}, "data.label lists 1"),
        ({"source": ["a", "b"], "partition": "column", "column": "who"}, "takes one data.source"),
    ],
)
def test_lists_that_do_not_agree_are_refused(tables: dict, words: str) -> None:
    with pytest.raises(BadInput, match=words) as error:
        resolve({"data": tables})
    assert "\n" not in str(error.value)


def test_more_domains_a_client_than_there_are_is_refused() -> None:
    with pytest.raises(BadInput, match=r"clients\.domains = 3: the run has 2"):
        resolve({"data": {"source": ["a", "b"]}, "clients": {"domains": 3}})
    with pytest.raises(BadInput, match=r"clients\.domains = 2: the run has 1"):
        resolve({"clients": {"domains": 2}})


def test_a_bad_source_or_a_name_twice_is_one_line(three: list[str], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nothing\.csv: no such file") as error:
        load(DataConfig(source=[three[0], str(tmp_path / "nothing.csv")]), 0)
    assert "\n" not in str(error.value)
    with pytest.raises(BadInput, match="two sources are called 'fruit'"):
        load(DataConfig(source=[three[0], three[0]]), 0)


def test_a_list_survives_the_config_file(three: list[str]) -> None:
    import tomllib

    config = resolve(setting(f"data.source={three}"), {"clients": {"domains": 2}})
    assert config.data.source == three
    assert Config.model_validate(tomllib.loads(to_toml(config))) == config


def test_the_key_of_earlier_versions_is_read(three: list[str]) -> None:
    old, new = setting("clients.tasks=2"), setting("clients.domains=3")
    assert resolve(setting(f"data.source={three}"), old).clients.domains == 2
    assert resolve(setting(f"data.source={three}"), old, new).clients.domains == 3


@pytest.mark.parametrize(("count", "each", "domains"), [(6, 1, 3), (7, 1, 3), (4, 2, 3), (6, 2, 4), (5, 3, 4), (3, 3, 3)])
def test_domains_are_dealt_evenly(count: int, each: int, domains: int) -> None:
    held = [held_domains(k, each, domains) for k in range(count)]
    assert all(len(set(mine)) == each for mine in held)
    holders = np.bincount([t for mine in held for t in mine], minlength=domains)
    assert holders.max() - holders.min() <= 1


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
@pytest.mark.parametrize(("count", "each"), [(6, 1), (4, 2), (5, 3)])
def test_every_example_goes_to_one_client_that_holds_its_domain(three: list[str], partition: str, count: int, each: int) -> None:
    config = DataConfig(source=three, partition=partition, min_size=2)
    whole = load(config, 0)
    parts = deal(whole, config, ClientsConfig(count=count, domains=each), 0)
    for examples, rows in ((whole.train, parts.train), (whole.test, parts.test)):
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(examples)))
        for k, mine in enumerate(rows):
            assert set(examples.domains[mine].tolist()) <= set(held_domains(k, each, 3))
    for k, mine in enumerate(parts.train):
        numbers = domain_counts(whole, mine)
        assert list(numbers) == [whole.domains[t].name for t in held_domains(k, each, 3)]
        assert sum(numbers.values()) == len(mine) and min(numbers.values()) >= 2
    again = deal(whole, config, ClientsConfig(count=count, domains=each), 0)
    assert all(map(np.array_equal, parts.train, again.train))
    assert f"{each} of 3 domains" in parts.rule


def test_domains_are_shared_out_by_different_draws(tmp_path: Path) -> None:
    """Two domains of the same sizes and classes, dealt to the same clients: one draw for both would give everybody equal parts."""
    sources = []
    for name in ("one", "two"):
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"{i},c{i % 2}\n" for i in range(100)))
        sources.append(str(tmp_path / f"{name}.csv"))
    config = DataConfig(source=sources, alpha=0.5)
    whole = load(config, 0)
    parts = deal(whole, config, ClientsConfig(count=4, domains=2), 0)
    numbers = [list(domain_counts(whole, mine).values()) for mine in parts.train]
    assert [a for a, _ in numbers] != [b for _, b in numbers]


def test_one_domain_is_dealt_as_ever(three: list[str]) -> None:
    config = DataConfig(source=three[1])
    whole = load(config, 0)
    one, two = deal(whole, config, ClientsConfig(count=5), 3), split(whole, config, 5, 3)
    assert all(map(np.array_equal, (*one.train, *one.test), (*two.train, *two.test))) and one.rule == two.rule
    assert domain_counts(whole, one.train[0]) == {}


def test_too_few_clients_or_examples_name_the_domain(three: list[str]) -> None:
    config = DataConfig(source=three, min_size=20)
    whole = load(config, 0)
    with pytest.raises(BadInput, match=r"clients\.count = 2: .* the run has 3"):
        deal(whole, config, ClientsConfig(count=2), 0)
    with pytest.raises(BadInput, match="domain 'fruit', held by 2 of 6 clients") as error:
        deal(whole, config, ClientsConfig(count=6), 0)
    assert "\n" not in str(error.value)


def test_validation_of_several_sources(three: list[str], tmp_path: Path) -> None:
    config = DataConfig(source=three, validation=0.25, test_limit=5)
    whole = load(config, 0)
    assert whole.validation is not None and [len(whole.test), *np.bincount(whole.test.domains)] == [15, 5, 5, 5]
    assert np.bincount(whole.validation.domains).tolist() == [6, 12, 9]  # a quarter of 24, 48 and 36
    parts = deal(whole, config, ClientsConfig(count=4, domains=2), 0)
    assert sorted(np.concatenate(parts.validation).tolist()) == list(range(27))
    for k, mine in enumerate(parts.validation):
        assert set(whole.validation.domains[mine].tolist()) <= set(held_domains(k, 2, 3))
    assert deal(load(DataConfig(source=three), 0), config, ClientsConfig(count=4), 0).validation == ()


def test_a_domain_without_a_validation_part_is_said(three: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for part in ("train", "test", "validation"):
        (folder / f"{part}.csv").write_text("text,label\na,x\nb,y\n")
    whole = load(DataConfig(source=[three[0], str(folder)]), 0)
    assert whole.validation is not None and whole.validation.domains.tolist() == [1, 1]
    assert [whole.schema.label_names[c] for c in whole.validation.targets] == ["folder/x", "folder/y"]
    assert "fruit: no validation part, so the others alone choose the round" in whole.notes


def test_a_key_by_two_of_its_names_in_one_file_is_refused() -> None:
    """A later layer may use the other name: it wins, as always."""
    says = r"^clients\.tasks is what clients\.domains was called before, and both are given; give clients\.domains alone$"
    with pytest.raises(BadInput, match=says):
        resolve({"clients": {"tasks": 1, "domains": 1}})
    with pytest.raises(BadInput, match=says):
        resolve(settings(["clients.tasks=1", "clients.domains=1"]))  # a command line is one layer
    sources = {"data": {"source": ["a", "b"]}}
    assert resolve(sources, {"clients": {"tasks": 1}}, {"clients": {"domains": 2}}).clients.domains == 2
