"""The words and tables of the report that are no picture: the answer, the results, what was held fixed."""

from collections.abc import Sequence
from typing import Any

from fedlora.report.answers import answers, bytes_to, params, scored, size
from fedlora.report.cells import ALPHA, METHOD, RANK, Cell, by_place, hardest, title, word
from fedlora.report.picture import Table
from fedlora.report.runs import Study, as_text, settings

MAIN = {
    "model.source": "model",
    "model.head": "head",
    "model.target_modules": "adapters in",
    "data.source": "data",
    "data.limit": "training examples at most",
    "data.partition": "split",
    "data.alpha": "Dirichlet alpha",
    "clients.count": "clients",
    "clients.rank": "rank",
    "clients.sample": "clients in a round",
    "train.rounds": "rounds",
    "train.epochs": "local epochs",
    "train.batch_size": "batch",
    "train.optimizer": "optimiser",
    "train.lr": "learning rate",
    "seed": "seed",
}

WRITTEN = "Written by fedlora report."


def lead(cells: Sequence[Cell]) -> str:
    """The answer in a sentence or two, of the hardest place."""
    found = answers(cells)
    if not found:
        return "No round has been scored yet."
    here = next((answer for answer in found if answer.where == hardest(cells)), found[-1])
    at = f" at {here.where}" if len(found) > 1 else ""
    upload = size(here.best.total())
    if len(here.cells) == 1:
        text = f"{here.best.name} reaches {here.accuracy} %{at} after {here.best.last_round} rounds and {upload} of uploads."
    else:
        others = [cell for cell in here.cells[1:] if cell.method != here.best.method]
        second = (others or here.cells[1:])[0]
        text = f"Most accurate{at}: {here.best.name} with {here.accuracy} %, then {second.name} with {scored(second)} %."
    if len(here.cells) > 1 and here.reached:
        cheap, cost = here.reached[0]
        text += f" Fewest bytes to reach {here.target} %: {cheap.name} with {size(cost)} uploaded"
        several = len({cell.method for cell in here.cells}) > 1
        rivals = [(cell, other) for cell, other in here.reached[1:] if not several or cell.method != cheap.method]
        none = f"; no other{' method' * several} gets there."
        text += f"; {rivals[0][0].name} needs {size(rivals[0][1])}." if rivals else none
    return text


def answer_table(cells: Sequence[Cell]) -> Table | None:
    """For each place who is best by accuracy and by bytes; None of a single contender."""
    found = answers(cells)
    if not found or max(len(answer.cells) for answer in found) < 2:
        return None
    rows = []
    for answer in found:
        cheap = (answer.reached[0][0].name, size(answer.reached[0][1])) if answer.reached else ("–", "–")
        rows.append((answer.where, answer.best.name, f"{answer.accuracy} %", f"{answer.target} %", *cheap))
    header = ("data", "most accurate", "accuracy", "to reach", "fewest bytes", "uploaded")
    return Table("The best by final accuracy, and by upload to reach 95 % of that", header, tuple(rows))


def notes(study: Study, cells: Sequence[Cell]) -> list[str]:
    """What a reader must know before believing small differences."""
    out = []
    found = answers(cells)
    seeds = {len(cell.runs) for cell in cells}
    if found:
        noise = max(answer.noise for answer in found)
        if seeds == {1} and noise and len(study.runs) > 1:
            out.append(f"One seed a cell: the test set's size alone makes differences below about {noise:.1f} points uncertain.")
        elif seeds != {1}:
            low, high = min(seeds), max(seeds)
            out.append(f"± is the sample standard deviation over {high if low == high else f'{low} to {high}'} seeds.")
    short = [cell for cell in cells if cell.unfinished]
    if short:
        out.append(f"Not finished yet, shown as far as they got: {'; '.join(f'{c.name}, {c.where}' for c in short)}.")
    if study.failed:
        out.append(f"{len(study.failed)} of {len(study.failed) + len(study.runs)} runs failed; they are listed at the end.")
    return out


def held(study: Study) -> list[tuple[str, str]]:
    """The main settings that all runs have in common."""
    fixed = dict(study.fixed)
    share = fixed.get("clients.sample")
    if isinstance(share, float):
        fixed["clients.sample"] = f"{100 * share:g} %" if share < 1 else "all"
    if fixed.get("data.partition") not in (None, "dirichlet"):
        fixed.pop(ALPHA, None)
    return [(name, as_text(fixed[key])) for key, name in MAIN.items() if key in fixed]


def results(cells: Sequence[Cell]) -> Table:
    """A row for each contender, a column of final accuracy for each place, and what it cost."""
    places = list(by_place(cells))
    contenders: dict[str, dict[str, Cell]] = {}
    for cell in cells:
        contenders.setdefault(cell.name, {})[cell.where] = cell
    best = {answer.where: answer for answer in answers(cells)}
    single = best.get(places[0]) if len(places) == 1 and len(contenders) > 1 else None
    if single:  # one column of accuracy: the best first
        place = {cell.name: i for i, cell in enumerate(single.cells)}
        contenders = dict(sorted(contenders.items(), key=lambda pair: place.get(pair[0], len(place))))
    rows = []
    for name, here in contenders.items():
        own = list(here.values())
        row = [name, *(_accuracy(here[where]) if where in here else "–" for where in places)]
        if single:
            reach = bytes_to(own[0], single.target)
            row += [str(own[0].final("macro_f1") or "–"), size(reach) if reach is not None else "not reached"]
        row += [_mean(own, "upload_bytes", size), _mean(own, "upload_params", params), _mean(own, "download_bytes", size)]
        rows.append(tuple(row))
    extra = ("macro F1, %", f"upload to {single.target} %") if single else ()
    header = ("method", *(f"{where}, %" for where in places), *extra, "uploaded", "uploaded parameters", "downloaded")
    return Table("Final test accuracy, and totals over all rounds and clients", header, tuple(rows))


def settings_tables(study: Study, cells: Sequence[Cell]) -> list[Table]:
    """Everything that was held fixed, and what was varied with its values."""
    tables = [settings(run.config) for run in study.runs]
    out = []
    if study.varied:
        rows = []
        for key in study.varied:
            values = list(dict.fromkeys(as_text(table.get(key)) for table in tables))
            if key == METHOD:
                values = [f"{title(name, full=True)} ({name})" for name in values]
            rows.append((key, "; ".join(values)))
        out.append(Table("Varied", ("key", "values"), tuple(rows)))
    own = _own_settings(study, cells)
    if own:
        out.append(Table("Set for each method", ("method", "settings"), own))
    fixed = tuple((key, as_text(value)) for key, value in study.fixed.items())
    return [*out, Table("Held fixed", ("key", "value"), fixed)]


def made(study: Study) -> str:
    """The software and hardware of the runs, where a finished one says."""
    done = [run.summary for run in study.runs if run.summary]
    if not done:
        return WRITTEN
    versions = ", ".join(f"{name} {version}" for name, version in done[0].get("versions", {}).items())
    places = (f"{one['device']} in {one['precision']}" for one in done if {"device", "precision"} <= set(one))
    where = " and ".join(dict.fromkeys(places))
    return f"{len(study.runs)} run{'s' if len(study.runs) > 1 else ''} with {versions}{f'; {where}' if where else ''}. {WRITTEN}"


def _own_settings(study: Study, cells: Sequence[Cell]) -> tuple[tuple[str, str], ...]:
    """Method -> the varied keys of which it has one value, so that no line's name shows them."""
    rows: dict[str, str] = {}
    for cell in cells:
        shown = {METHOD, "seed", *dict(cell.place), *dict(cell.setting)} | ({RANK} if cell.rank else set())
        own = settings(cell.runs[0].config)
        words = ", ".join(word(key, own[key]) for key in study.varied if key in own and key not in shown)
        if words:
            rows[title(cell.method, full=True)] = words
    return tuple(rows.items())


def _accuracy(cell: Cell) -> str:
    final = cell.final()
    if final is None:
        return "not scored"
    return f"{final} (round {cell.runs[0].rows[-1]['round']})" if cell.unfinished else str(final)


def _mean(cells: Sequence[Cell], key: str, form: Any) -> str:
    return str(form(sum(cell.total(key) for cell in cells) / len(cells)))
