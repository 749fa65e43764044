"""A comparison from its recipe to its report."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from fedlora.comparison import folder as folders
from fedlora.comparison import markdown, recipe, results
from fedlora.comparison.executor import executor
from fedlora.comparison.folder import Folder
from fedlora.comparison.grid import Grid, expand
from fedlora.comparison.play import play
from fedlora.comparison.recipe import Recipe, Scale
from fedlora.disk import alone, write_whole
from fedlora.errors import BadInput


def compare(
    name: str,
    scale: Scale | None = None,
    out: Path | None = None,
    jobs: int | None = None,
    settings: Sequence[Mapping[str, Any]] = (),
    quiet: bool = False,
) -> int:
    """Run, or go on with, the comparison of a recipe, and write its results and its report; returns how many cells failed.

    Args:
        name: a packaged recipe or a TOML file.
        out: the folder; `compare/NAME-SCALE` where there is none.
        jobs: how many cells run at a time; `executor.usual_jobs` where there is none.
        settings: tables laid over the recipe's, as `config.setting` gives them.

    Raises:
        BadInput: something in the recipe cannot be; nothing has been written yet.
    """
    plan = recipe.read(name, scale, settings)
    if plan.splits is not None:
        _splits(plan, plan.splits, folders.claim(plan, out or folders.default(plan)), name, quiet)
        return 0
    folder = out or folders.default(plan)
    failed, runs = play_recipe(plan, folder, jobs, quiet)
    report = "no report" if failed == runs else f"report in {folder / 'report.html'}"
    print(f"{runs - failed} of {runs} runs done, {failed} failed; {report}, table in {folder / 'results.md'}")
    return failed


def play_recipe(
    plan: Recipe, out: Path, jobs: int | None = None, quiet: bool = False, note: Callable[[str], None] | None = None
) -> tuple[int, int]:
    """Run, or go on with, what a recipe without [splits] says; see `compare`. Returns how many cells failed, and of how many.

    Args:
        note: hears what a user should know, each line once; without it standard error does.
    """
    from fedlora.comparison.live import LiveTable

    folder = folders.claim(plan, out)
    grid = expand(plan)
    left = [cell for cell in grid.cells if folder.summary(cell) is None]
    if left:
        from fedlora.comparison.check import check

        check(grid, left, plan.published)
    with ExitStack() as held:
        player = held.enter_context(executor(left, jobs))
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{out} cannot be made: {error.strerror or error}; use another --out") from error
        held.enter_context(alone(folder.path))
        folders.begin(folder, plan)
        if not quiet:
            print(_announcement(plan, len(grid.cells), len(grid.cells) - len(left)), flush=True)
        live = held.enter_context(LiveTable(grid, folder, player.jobs, quiet, note))
        for cell in held.enter_context(closing(play(left, folder, live.follow, player))):
            live.finished(cell)
            write_results(grid, plan, folder)
        write_results(grid, plan, folder)
    failed = sum(folder.summary(cell) is None for cell in grid.cells)
    if failed < len(grid.cells):
        write_report([folder.path])
    return failed, len(grid.cells)


def write_results(grid: Grid, plan: Recipe, folder: Folder) -> None:
    """results.parquet and results.md, of what is there so far."""
    found = results.rows(grid, plan, folder)
    results.write(found, grid.varied, folder.path / "results.parquet")
    text = markdown.to_markdown(grid, plan, found, results.metrics(grid, folder))
    write_whole(folder.path / "results.md", text.encode())


def write_report(paths: Sequence[Path], html: Path | None = None) -> Path:
    """One HTML report of run folders and comparisons, its pictures beside it: in figures/ of report.html, in a-figures/ of a.html.
    Returns where it is: `html`, or in the folder that it is about, or, for several, report.html here.

    Raises:
        BadInput: a path is neither a run nor a comparison, or there is nothing in them yet.
    """
    from fedlora.report.html import of_comparison, write
    from fedlora.report.runs import comparison, read

    target = html or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    plans = {path: folders.read_back(path) for path in paths if folders.is_comparison(path)}
    runs: list[Path] = []
    failed: list[tuple[str, str]] = []
    for path in paths:
        done, reasons = _content(plans[path], Folder(path)) if path in plans else ([path], [])
        runs, failed = runs + done, failed + reasons
    if not runs:
        why = f"; {len(failed)} failed, {failed[0][0]}: {failed[0][1]}" if failed else ""
        raise BadInput(f"{', '.join(map(str, paths))}: no run is complete yet, so there is nothing to report{why}")
    said = plans[paths[0]].header if len(plans) == len(paths) == 1 else recipe.Header()
    published = [row for plan in plans.values() for row in plan.published]
    shown = comparison([read(run) for run in runs], said.title or said.name, said.about, published, failed, said.scale)
    figures = "figures" if target.name == "report.html" else f"{target.stem}-figures"  # no other page's
    write(of_comparison(shown), target, target.parent / figures)
    return target


def listing() -> str:
    """The packaged comparisons: what each shows, how many runs, how long it takes."""
    blocks = []
    for name in recipe.packaged():
        lines = []
        for scale in recipe.scales(name):
            plan = recipe.read(name, scale)
            size = "statistics of splits, no runs" if plan.splits is not None else _runs(len(expand(plan).cells))
            lines.append(f"    {f'--scale {scale.value}: ' if scale else ''}{size}{_minutes(plan)}")
        blocks.append("\n".join([f"{name}  {plan.header.title}", f"    {plan.header.about}", *lines]))
    return "\n\n".join(blocks)


def _content(plan: Recipe, folder: Folder) -> tuple[list[Path], list[tuple[str, str]]]:
    """The complete runs of a comparison, and the failed ones: label and reason."""
    if plan.splits is not None:
        raise BadInput(f"{folder.path} holds statistics of splits, not runs; its report is already there")
    grid = expand(plan)
    left = [cell for cell in grid.cells if folder.summary(cell) is None]
    reasons = ((grid.label(cell), folder.failure(cell)) for cell in left)
    return [folder.run(cell) for cell in grid.cells if cell not in left], [
        (label, why) for label, why in reasons if why is not None
    ]


def _splits(plan: Recipe, table: Mapping[str, Any], folder: Folder, name: str, quiet: bool) -> None:
    from fedlora.comparison import splits

    if plan.tables:
        raise BadInput(f"{name}: a recipe with [splits] runs nothing, so it has no {', '.join(plan.tables)}")
    said = plan.header
    if not quiet:
        print(f"{_title(plan)}: statistics of splits, no runs{_minutes(plan)}", flush=True)
    splits.run(table, said.name, folder.path, said.scale, said.title, said.about, (lambda line: None) if quiet else print)
    folders.begin(folder, plan)
    print(f"report in {folder.path / 'report.html'}, table in {folder.path / 'results.md'}")


def _announcement(plan: Recipe, cells: int, done: int) -> str:
    before = f", {done} of them done already" if done else ""
    return f"{_title(plan)}: {_runs(cells)}{before}{_minutes(plan)}"


def _title(plan: Recipe) -> str:
    return f"{plan.header.name}, scale {plan.header.scale}" if plan.header.scale else plan.header.name


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _minutes(plan: Recipe) -> str:
    """What the recipe states, for all of its runs."""
    minutes = plan.header.minutes
    if minutes is None:
        return ""
    amount, unit = (round(minutes), "minute") if minutes < 180 else (round(minutes / 60), "hour")
    return f"; about {amount:,} {unit}{'' if amount == 1 else 's'} in all on 2 cores"
