"""All tasks by name: items from a seed, results from answers."""

from collections.abc import Callable, Mapping, Sequence
from random import Random

from kvserve.core.dtypes import CachePair
from kvserve.core.loss import REFERENCE_PAIR, TaskResult
from kvserve.errors import UsageError
from kvserve.eval.statistics import compare_tasks
from kvserve.eval.tasks import documents, exact, short
from kvserve.eval.tasks.item import Item, is_right
from kvserve.ipc.evaluating import Prompted

Maker = Callable[[Random, int, int], Item]

TASKS: dict[str, Maker] = {
    "arithmetic": exact.arithmetic,
    "citation": documents.citation,
    "needles": documents.needles,
    "variables": documents.variables,
    "code": documents.code,
    "recall": short.recall,
    "facts": short.facts,
    "classify": short.classify,
    "tools": exact.tools,
}
CHANCE: dict[str, float] = {"classify": 1 / len(short.TOPICS), "recall": 1 / short.N_TURNS}
"""What guessing among the answers at hand gives."""
LUCK = 0.02
"""What counts as chance elsewhere: no answer can be guessed, but a few may be right by luck."""

Items = Mapping[str, Sequence[Item]]
Texts = Mapping[tuple[str, CachePair], Mapping[int, str]]
"""Completions by task and pair, and by the item's index."""

_CHAT = "Continue the text below. Write only what comes next, on one line.\n\n"


def chosen(names: str) -> tuple[str, ...]:
    """Task names by commas, `all` or `none`. Raises UsageError, naming `--tasks`."""
    if names in ("all", "none"):
        return tuple(TASKS) if names == "all" else ()
    found = tuple(dict.fromkeys(name.strip() for name in names.split(",")))
    for name in found:
        if name not in TASKS:
            raise UsageError(
                f"--tasks {name}: no such task; known are {', '.join(TASKS)}, all and none",
                param="tasks",
            )
    return found


def make_items(tasks: Sequence[str], n_items: int, n_lines: int, seed: int) -> Items:
    """`n_items` of each task; documents have up to `n_lines` lines. An item depends on the seed,
    its task and its number alone."""
    return {
        task: [
            TASKS[task](Random(f"{seed} {task} {index}"), index, n_lines)  # noqa: S311 - no secret
            for index in range(n_items)
        ]
        for task in tasks
    }


def prompts(items: Items, *, chat: bool) -> tuple[Prompted, ...]:
    """What the evaluating process is given; for a chat each text is a user's message."""
    return tuple(
        Prompted(
            task=task,
            index=index,
            prompt=_CHAT + item.prompt if chat else item.prompt,
            stop=item.stop,
            max_tokens=item.max_tokens,
            chat=chat,
        )
        for task, found in items.items()
        for index, item in enumerate(found)
    )


def results(items: Items, texts: Texts) -> list[TaskResult]:
    """Each pair beside the reference, on the items that both answered, at least one."""
    found = []
    for (task, pair), answers in texts.items():
        reference = texts.get((task, REFERENCE_PAIR), {})
        both = [index for index in answers if index in reference]
        if pair == REFERENCE_PAIR or not both:
            continue
        right = {
            which: [is_right(items[task][index], given[index]) for index in both]
            for which, given in (("reference", reference), ("candidate", answers))
        }
        chance = CHANCE.get(task, LUCK)
        found.append(compare_tasks(task, pair, right["reference"], right["candidate"], chance))
    return found
