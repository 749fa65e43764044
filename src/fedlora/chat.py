"""A conversation with a model that writes, line by line: what one sees of `fedlora predict --chat`."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from fedlora.errors import BadInput

if TYPE_CHECKING:
    from fedlora.runs.predict import Predictor
    from fedlora.tasks.base import Turn

Say = Callable[[str], None]
HELP = "/reset begins anew, /exit or Ctrl-D ends, Ctrl-C interrupts an answer"


def converse(models: Mapping[str, "Predictor"], read: Callable[[], str], write: Say, note: Say) -> None:
    """Answer each line until there is none.

    Args:
        models: who answers, one under the other, by name; each goes by its own earlier answers.
        read: the next line. EOFError and KeyboardInterrupt where there is none, and where somebody interrupts.
        write: told the answers, piece by piece.
        note: told what else there is to say, a line each.
    """
    turns: dict[str, tuple[Turn, ...]] = dict.fromkeys(models, ())
    note(HELP)
    while True:
        try:
            question = read().strip()
        except EOFError:
            write("\n")
            return
        except KeyboardInterrupt:
            write("\n")
            note(HELP)
            continue
        if question == "/exit":
            return
        if question == "/reset":
            turns = dict.fromkeys(models, ())
            note("the conversation begins anew")
        elif question.startswith("/") and question[1:].isalpha():
            note(f"unknown command {question}: {HELP}")
        elif question:
            turns = _answered(models, turns, question, write, note)


def _answered(
    models: Mapping[str, "Predictor"], turns: Mapping[str, tuple["Turn", ...]], question: str, write: Say, note: Say
) -> dict[str, tuple["Turn", ...]]:
    """The turns of each model with the question and its answer; what was said of one that is interrupted counts as its answer, and
    who has said nothing was not asked."""
    from fedlora.tasks.base import Turn

    found = dict(turns)
    for name, model in models.items():
        heard: list[str] = []

        def hear(piece: str, heard: list[str] = heard) -> None:
            heard.append(piece)
            write(piece)

        write(f"{name}: " if len(models) > 1 else "")
        interrupted = False
        try:
            given, dropped = model.told(found[name], question)
            if dropped:
                found[name] = found[name][dropped:]
                note(f"the model has no room for more: the oldest {'turn is' if dropped == 1 else f'{dropped} turns are'} left out")
            model.write(given, hear)
        except KeyboardInterrupt:
            interrupted = True
        except BadInput as error:
            note(str(error))
            continue
        write("\n")
        if heard or not interrupted:
            found[name] = (*found[name], Turn(question, "".join(heard)))
        if interrupted:
            note("interrupted")
            break
    return found
