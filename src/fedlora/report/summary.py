"""The words and tables of the report that are no picture: the answer, the results, what was held fixed."""

from collections.abc import Sequence
from typing import Any

from fedlora.names import short
from fedlora.report import words
from fedlora.report.answers import Answer, answers, bytes_to, params, scored, size
from fedlora.report.contenders import (
    ALPHA,
    COMMON,
    METHOD,
    PERSONAL,
    RANK,
    SOURCES,
    Contender,
    by_metric,
    by_place,
    hardest,
    joined,
    title,
    word,
)
from fedlora.report.picture import Table
from fedlora.report.runs import Comparison, Run, as_text, settings
from fedlora.report.units import headed
from fedlora.scores import still_falling
from fedlora.tasks.metrics import Metric, number, text

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

OF_KIND = {COMMON: "One common model", PERSONAL: "Personal models, each scored on its client's own test examples"}
MOST_NAMES = 6  # in a note

WRITTEN = "Written by fedlora report."


def lead(contenders: Sequence[Contender]) -> str:
    """The answer in a sentence or two, of the hardest place; a line of each where common and personal models were scored, or runs
    are compared by several metrics."""
    found = answers(contenders)
    if not found:
        return _without_scores(contenders)
    groups: dict[tuple[str, Metric], list[Answer]] = {}
    for answer in found:
        groups.setdefault((answer.best.kind, answer.metric), []).append(answer)
    lines = {key: _sentence(here) for key, here in groups.items()}
    return "\n".join(f"{OF_KIND[kind]}. {line}" if kind else line for (kind, _), line in lines.items())


def _without_scores(contenders: Sequence[Contender]) -> str:
    if any(contender.final() for contender in contenders):
        return "Every run has diverged, so there is no answer."
    over = all(not contender.unfinished for contender in contenders)
    return "No round was scored, so runs are not ranked." if over else "No round has been scored yet."


def _sentence(found: Sequence[Answer]) -> str:
    """The answer of the hardest place among those of one kind of scores."""
    where = hardest([contender for answer in found for contender in answer.contenders])
    here = next(answer for answer in found if answer.where == where)
    several = len({answer.where for answer in found}) > 1
    at = f" at {here.best.site}" if several else ""
    if len(here.contenders) == 1:
        return _of_one(here, at)
    names, lasts = (
        joined([contender.name for contender in here.leaders]),
        [contender for contender in here.contenders if contender not in here.leaders],
    )
    score = here.score.middle if len(here.leaders) > 1 else here.score.whole
    if here.useless and here.baseline is not None:
        return words.useless(here.metric, at, here.baseline, names, score)
    if not lasts:
        said = f"{words.equal(here.metric, at)}: {names} with {score}."
    else:
        own = {contender.method for contender in here.leaders}
        second = ([contender for contender in lasts if contender.method not in own] or lasts)[0]
        said = f"{words.best(here.metric, at)}: {names} with {score}, then {second.name} with {scored(second).whole}."
    return f"{said} {_cheapest(here)}" if here.reached else said


def _of_one(here: Answer, at: str) -> str:
    best, run, metric = here.best, here.best.runs[0], here.metric
    reaches = f"{best.name} reaches {here.score.whole}{words.by(metric)}{at}"
    upload = size(best.total())
    if len(best.runs) == 1 and run.validated and run.final:
        there = best.final(f"validation_{metric.name}")
        chosen = f"in round {run.final['round']}, the best by validation ({there and there.whole} there)"
        said = f"{reaches} {chosen}; {run.rows[-1]['round']} rounds and {upload} of uploads in all."
    else:
        said = f"{reaches} after {best.last_round} round{'s' * (best.last_round != 1)} and {upload} of uploads."
    if here.useless and here.baseline is not None:
        said += f" That is no better than {metric.constant}: {words.of_constant(metric, here.baseline)}."
    elif metric.model and here.baseline is not None:
        said += f" {words.capital(metric.constant)} has {text(here.baseline, metric.unit)}."
    return said


def _cheapest(here: Answer) -> str:
    """Who gets near to the best with fewest bytes, and who is next."""
    (cheap, cost), equal = here.reached[0], here.cheapest
    said = f"Fewest bytes to reach {here.goal}: {joined([contender.name for contender in equal])} with {size(cost)} uploaded"
    several = len({contender.method for contender in here.contenders}) > 1
    rivals = [
        (contender, other) for contender, other in here.reached[len(equal) :] if not several or contender.method != cheap.method
    ]
    if rivals:
        return f"{said}; {rivals[0][0].name} needs {size(rivals[0][1])}."
    return f"{said}." if len(equal) == len(here.contenders) else f"{said}; no other{' method' * several} gets there."


def answer_table(contenders: Sequence[Contender]) -> Table | None:
    """For each place who is best by score and by bytes; None of a single contender."""
    found = answers(contenders)
    if not found or max(len(answer.contenders) for answer in found) < 2:
        return None
    known = any(answer.baseline is not None for answer in found)
    metrics = list(dict.fromkeys(answer.metric for answer in found))
    rows = []
    for answer in found:
        best = joined([contender.name for contender in answer.leaders])
        cheap = (
            (joined([contender.name for contender in answer.cheapest]), size(answer.reached[0][1]))
            if answer.reached
            else ("–", "–")
        )
        constant = "–" if answer.baseline is None else text(answer.baseline, answer.metric.unit)
        place = (answer.where,) if len(found) > 1 else ()
        of = (words.titled(answer.metric),) if len(metrics) > 1 else ()
        rows.append((*place, best, *of, answer.score.whole, *((constant,) if known else ()), answer.goal, *cheap))
    data = ("data",) if len(found) > 1 else ()
    ends = ("to reach", "fewest bytes", "uploaded")
    if len(metrics) > 1:
        header = (*data, "best", "by", "score", *(("constant answer",) if known else ()), *ends)
        return Table("The best by final score, and by upload to get near to that", header, tuple(rows))
    metric = metrics[0]
    first = "most accurate" if metric.name == words.ACCURACY else "best"
    header = (*data, first, metric.title, *((metric.constant.removeprefix("the "),) if known else ()), *ends)
    near = "reach 95 % of that" if metric.better == "higher" else "get near to that"
    return Table(f"The best by final {words.titled(metric)}, and by upload to {near}", header, tuple(rows))


def notes(comparison: Comparison, contenders: Sequence[Contender]) -> list[str]:
    """What a reader must know before believing small differences."""
    out = []
    diverged = [contender for contender in contenders if any(run.diverged for run in contender.runs)]
    if diverged:
        out.append(
            f"Diverged, so not ranked: {_each(diverged, contenders)}. Nothing that clients sent in the last round could be used."
        )
    lost = [contender for contender in contenders if losses(contender)]
    if lost:
        out.append(f"Clients failed in {_each(lost, contenders)}: see Clients that failed.")
    found = answers(contenders)
    seeds = {len(contender.runs) for contender in contenders}
    if found:
        noise = max(answer.noise for answer in found)  # of shares of right answers alone
        if seeds == {1} and noise and len(comparison.runs) > 1:
            out.append(f"One seed a cell: the test set's size alone makes differences below about {noise:.1f} points uncertain.")
        elif seeds != {1}:
            low, high = min(seeds), max(seeds)
            out.append(f"± is the sample standard deviation over {high if low == high else f'{low} to {high}'} seeds.")
    if any(contender.kind for contender in contenders):
        out.append("Scores of personal models are of other test examples for each client, so they are not ranked with common ones.")
    elif any(contender.personal for contender in contenders):
        out.append("Each client's personal model is scored on the client's own test examples.")
    if any(run.validated for contender in contenders for run in contender.runs):
        out.append("Validation chose the round that is scored and written, never the test set.")
    falling = [
        contender for contender in contenders if not contender.unfinished and any(_may_learn_more(run) for run in contender.runs)
    ]
    if falling:
        out.append(f"The training loss still fell at the end, so more rounds may help: {_each(falling, contenders)}.")
    short = [contender for contender in contenders if contender.unfinished]
    if short:
        out.append(f"Not finished yet, shown as far as they got: {_each(short, contenders)}.")
    return out


def _may_learn_more(run: Run) -> bool:
    """Whether its loss falls to the end, and validation did not choose an earlier round."""
    last = run.final is not None and run.final["round"] == run.rows[-1]["round"]
    return (last or not run.validated) and still_falling([row.get("loss") for row in run.rows])


def _each(contenders: Sequence[Contender], among: Sequence[Contender]) -> str:
    """Their names, with the place where there are several."""
    if len(contenders) == len(among) > 1:
        return "all of them"
    several = len({contender.where for contender in among}) > 1
    names = [f"{contender.name} ({contender.where})" if several else contender.name for contender in contenders]
    return joined(names) if len(names) <= MOST_NAMES else f"{', '.join(names[:MOST_NAMES])} and {len(names) - MOST_NAMES} more"


def losses(contender: Contender) -> list[tuple[str, list[int], str]]:
    """(client's name, the rounds in which it failed, why at first) of each client of a contender that failed, over all seeds."""
    found: dict[str, tuple[set[int], str]] = {}
    for run in contender.runs:
        names = {str(client["id"]): str(client["name"]) for client in run.clients}
        for row in run.rows:
            for id, why in (row.get("failures") or {}).items():
                rounds, _ = found.setdefault(names.get(id, f"client {id}"), (set(), str(why)))
                rounds.add(row["round"])
    return [(name, sorted(rounds), why) for name, (rounds, why) in found.items()]


def lost_table(contenders: Sequence[Contender]) -> Table | None:
    """The clients that failed, those of most rounds first; None where none did."""
    found = [(contender, *loss) for contender in contenders for loss in losses(contender)]
    found.sort(key=lambda loss: -len(loss[2]))
    data = len({contender.where for contender in contenders}) > 1
    rows = tuple(
        (*((contender.where,) if data else ()), contender.name, name, str(len(rounds)), spans(rounds), why)
        for contender, name, rounds, why in found
    )
    header = (*(("data",) if data else ()), "method", "client", "times", "in rounds", "why, at first")
    return Table("What these clients sent in these rounds counts for nothing", header, rows, heads=2 + data) if rows else None


def spans(rounds: Sequence[int]) -> str:
    """Rising numbers with runs of them in short: "1–3, 7"."""
    parts: list[list[int]] = []
    for t in rounds:
        if parts and t == parts[-1][-1] + 1:
            parts[-1].append(t)
        else:
            parts.append([t])
    return ", ".join(f"{part[0]}–{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def held(comparison: Comparison) -> list[tuple[str, str]]:
    """The main settings that all runs have in common."""
    fixed = dict(comparison.fixed)
    share = fixed.get("clients.sample")
    if isinstance(share, float):
        fixed["clients.sample"] = f"{100 * share:g} %" if share < 1 else "all"
    if fixed.get("data.partition") not in (None, "dirichlet"):
        fixed.pop(ALPHA, None)
    return [(name, _said(key, fixed[key])) for key, name in MAIN.items() if key in fixed]


def _said(key: str, value: Any) -> str:
    """A setting's value; files and folders by their last names."""
    if key in SOURCES:
        return ", ".join(map(short, [value] if isinstance(value, str) else value))
    return as_text(value)


def results(contenders: Sequence[Contender]) -> list[Table]:
    """A row for each contender, a column of its final score for each place, and what it cost; apart what is not ranked together:
    common and personal models, runs that are compared by different metrics. Where there are several places, tables of the other
    scores."""
    out = []
    for kind in dict.fromkeys(contender.kind for contender in contenders):
        for own in by_metric([contender for contender in contenders if contender.kind == kind]).values():
            out.append(_main_table(own, kind))
            if len(by_place(own)) > 1:
                further = words.further(own[0].runs[0].metrics)
                out += [t for key, (name, metric) in further.items() if (t := _score_table(own, kind, key, name, metric))]
    return out


def _caption(contenders: Sequence[Contender], kind: str, what: str) -> str:
    chosen = (
        " of the round that validation chose" if any(run.validated for contender in contenders for run in contender.runs) else ""
    )
    personal = (
        ", each client's personal model on its own test examples" if any(contender.personal for contender in contenders) else ""
    )
    common = ", one common model" if kind == COMMON else ""
    return f"{what}{chosen}{personal}{common}"


def _main_table(contenders: Sequence[Contender], kind: str) -> Table:
    metric = contenders[0].metric
    places = list(by_place(contenders))
    by_name = _by_name(contenders)
    found = {answer.where: answer for answer in answers(contenders)}
    single = found.get(places[0]) if len(places) == 1 else None
    others: dict[str, tuple[str, Metric]] = {}
    if single:  # one column of scores: the best first
        place = {contender.name: i for i, contender in enumerate(single.contenders)}
        by_name = dict(sorted(by_name.items(), key=lambda pair: place.get(pair[0], len(place))))
        known = words.further(contenders[0].runs[0].metrics)
        others = {key: of for key, of in known.items() if any(contender.final(key) for contender in contenders)}
    reach = single if single and len(by_name) > 1 else None
    rows = []
    for name, here in by_name.items():
        own = list(here.values())
        row = [name, *(_score(here[where]) if where in here else "–" for where in places)]
        row += [str(own[0].final(key, of) or "–") for key, (_, of) in others.items()]
        if reach is not None:
            sent = bytes_to(own[0], reach.target)
            row.append(size(sent) if sent is not None else "not reached")
        row += [_mean(own, "upload_bytes", size), _mean(own, "upload_params", params), _mean(own, "download_bytes", size)]
        rows.append(tuple(row))
    if any(answer.baseline is not None for answer in found.values()):
        bases = [found[where].baseline if where in found else None for where in places]
        constant = ("–" if x is None else number(x, metric.unit) for x in bases)
        rows.append((metric.rival, *constant, *["–"] * (len(others) + (reach is not None) + 3)))
    sites = [here[0].site for here in by_place(contenders).values()]
    reached = (f"upload to {reach.goal}",) if reach is not None else ()
    header = (
        "method",
        *(headed(site, metric.unit) for site in sites),
        *(headed(t, of.unit) for t, of in others.values()),
        *reached,
    )
    costs = ("uploaded", "uploaded parameters", "downloaded")
    caption = _caption(contenders, kind, f"Final test {words.titled(metric)}")
    return Table(f"{caption}; totals over all rounds and clients", (*header, *costs), tuple(rows))


def _score_table(contenders: Sequence[Contender], kind: str, key: str, name: str, metric: Metric) -> Table | None:
    """Another score of each contender in each place; None where no run has it."""
    if not any(contender.final(key, metric) for contender in contenders):
        return None
    places = list(by_place(contenders))
    sites = [here[0].site for here in by_place(contenders).values()]
    rows = tuple(
        (n, *(str(here[w].final(key, metric) or "–") if w in here else "–" for w in places))
        for n, here in _by_name(contenders).items()
    )
    return Table(_caption(contenders, kind, f"Final {name}"), ("method", *(headed(site, metric.unit) for site in sites)), rows)


def _by_name(contenders: Sequence[Contender]) -> dict[str, dict[str, Contender]]:
    """Name -> place -> contender."""
    out: dict[str, dict[str, Contender]] = {}
    for contender in contenders:
        out.setdefault(contender.name, {})[contender.where] = contender
    return out


def settings_tables(comparison: Comparison, contenders: Sequence[Contender]) -> list[Table]:
    """Everything that was held fixed, and what was varied with its values."""
    tables = [settings(run.config) for run in comparison.runs]
    out = []
    if comparison.varied:
        rows = []
        for key in comparison.varied:
            values = list(dict.fromkeys(_said(key, table.get(key)) for table in tables))
            if key == METHOD:
                values = [f"{title(name, full=True)} ({name})" for name in values]
            rows.append((key, "; ".join(values)))
        out.append(Table("Varied", ("key", "values"), tuple(rows)))
    own = _own_settings(comparison, contenders)
    if own:
        out.append(Table("Set for each method", ("method", "settings"), own))
    fixed = tuple((key, _said(key, value)) for key, value in comparison.fixed.items())
    return [*out, Table("Held fixed", ("key", "value"), fixed)]


def made(comparison: Comparison) -> str:
    """The software and hardware of the runs, where a finished one says."""
    done = [run.summary for run in comparison.runs if run.summary]
    if not done:
        return WRITTEN
    versions = ", ".join(f"{name} {version}" for name, version in done[0].get("versions", {}).items())
    places = (f"{one['device']} in {one['precision']}" for one in done if {"device", "precision"} <= set(one))
    where = " and ".join(dict.fromkeys(places))
    count = len(comparison.runs)
    return f"{count} run{'s' if count > 1 else ''} with {versions}{f'; {where}' if where else ''}. {WRITTEN}"


def _own_settings(comparison: Comparison, contenders: Sequence[Contender]) -> tuple[tuple[str, str], ...]:
    """Method -> the varied keys of which it has one value, so that no line's name shows them."""
    rows: dict[str, str] = {}
    for contender in contenders:
        shown = {METHOD, "seed", *dict(contender.place), *dict(contender.setting)} | ({RANK} if contender.rank else set())
        own = settings(contender.runs[0].config)
        said = ", ".join(word(key, own[key]) for key in comparison.varied if key in own and key not in shown)
        if said:
            rows[title(contender.method, full=True)] = said
    return tuple(rows.items())


def _score(contender: Contender) -> str:
    final = contender.final()
    if final is None:
        return "not scored"
    if any(run.diverged for run in contender.runs):
        return f"{final} (diverged)"
    return f"{final} (round {contender.runs[0].rows[-1]['round']})" if contender.unfinished else str(final)


def _mean(contenders: Sequence[Contender], key: str, form: Any) -> str:
    return str(form(sum(contender.total(key) for contender in contenders) / len(contenders)))
