"""Tasks on long texts: citation, needles, variables, code. The text is made up, line by line, so
that nothing of it can be known by heart."""

from itertools import pairwise
from random import Random

from kvserve.eval.tasks.item import Item, Judge

N_DEPTHS = 10
_LENGTHS = (1.0, 0.5, 0.25)
_STATIONS = (
    "Alder", "Birch", "Cedar", "Dune", "Elm", "Fjord", "Grove", "Heath", "Inlet", "Juniper",
    "Kelp", "Lagoon", "Moor", "Nettle", "Orchid", "Pine", "Quarry", "Reed", "Spruce", "Thorn",
)  # fmt: skip
_QUANTITIES = ("depth", "salinity", "pressure", "wind speed", "water level", "turbidity")
_VERBS = ("sort", "merge", "trim", "count", "split", "rotate", "filter", "round", "join", "scale")
_NOUNS = (
    "invoice", "harbor", "ticket", "sensor", "ledger", "parcel", "visitor", "engine", "garden",
    "recipe", "signal", "voyage",
)  # fmt: skip
_COLOURS = ("amber", "blue", "coral", "green", "ivory", "khaki", "lilac", "ochre", "red", "teal")
_ANIMALS = ("fox", "heron", "lynx", "otter", "raven", "seal", "stork", "tiger", "viper", "wolf")
_FILLERS = (
    "The road along the river was closed until noon.",
    "Most of the shops had opened again by the weekend.",
    "A second report came in late and was filed with the first.",
    "Nobody in the office remembered who had ordered the chairs.",
    "The train from the coast arrived with almost no delay.",
    "They repaired the old clock and hung it above the door.",
    "Rain was expected in the evening, but it stayed dry.",
)


def citation(random: Random, index: int, n_lines: int) -> Item:
    """One exact figure out of a long table of readings."""
    lines = _share(n_lines, index)
    keys = [(s, q) for s in _STATIONS for q in _QUANTITIES]
    chosen = random.sample(range(len(keys) * 9), min(lines, len(keys) * 9))
    readings = [(*keys[n % len(keys)], n // len(keys) + 1, _figure(random)) for n in chosen]
    text = "".join(f"Station {s} {n}: {q} {value}.\n" for s, q, n, value in readings)
    station, quantity, number, value = readings[_place(index, len(readings))]
    question = f"\nExact reading:\nStation {station} {number}: {quantity}"
    return Item(text + question, value, Judge.FIRST_NUMBER, stop="\n", max_tokens=14)


def needles(random: Random, index: int, n_lines: int) -> Item:
    """One of several keys, or all values of a key, at one of ten depths among idle sentences."""
    lines = [random.choice(_FILLERS) for _ in range(_share(n_lines, index))]
    names = [f"{a} {b}" for a in _COLOURS for b in _ANIMALS]
    wanted, *others = random.sample(names, 5)
    several = index % 2 == 1
    values = [str(random.randint(10000, 99999)) for _ in range(2 if several else 1)]
    for name in others:
        _drop(lines, random.randrange(len(lines)), name, str(random.randint(10000, 99999)))
    for number, value in enumerate(values):
        _drop(lines, (_place(index, len(lines)) + number * 7) % len(lines), wanted, value)
    text = " ".join(lines)
    if several:
        question = f"\n\nBoth special numbers of the {wanted}, with a comma between them:"
        return Item(text + question, " ".join(values), Judge.NUMBERS, max_tokens=24)
    question = f"\n\nThe special number of the {wanted} is"
    return Item(text + question, values[0], Judge.FIRST_NUMBER, max_tokens=10)


def variables(random: Random, index: int, n_lines: int) -> Item:
    """A value through several assignments, beside other chains."""
    names = [f"{a}_{b}" for a in _COLOURS for b in _ANIMALS]
    random.shuffle(names)
    n_chains, n_hops = 3, 2 + index % 3
    chains = [[names.pop() for _ in range(n_hops + 1)] for _ in range(n_chains)]
    values = [str(random.randint(10000, 99999)) for _ in chains]
    statements = [
        [f"{c[0]} = {v}", *(f"{b} = {a}" for a, b in pairwise(c))]
        for c, v in zip(chains, values, strict=True)
    ]
    lines: list[str] = []
    n_idle = max(0, _share(n_lines, index) - n_chains * (n_hops + 1))
    while any(statements) or n_idle:
        waiting = [statement for statement in statements if statement]
        if waiting and (not n_idle or random.random() < n_chains * n_hops / max(1, n_lines)):
            lines.append(random.choice(waiting).pop(0))
        else:
            n_idle -= 1
            lines.append(f"# {random.choice(_FILLERS)}")
    shown = ">>> first = 31415\n>>> second = first\n>>> print(second)\n31415\n"
    text = shown + "".join(f">>> {line}\n" for line in lines)
    asked = f">>> print({chains[0][-1]})\n"
    return Item(text + asked, values[0], Judge.FIRST_NUMBER, max_tokens=10)


def code(random: Random, index: int, n_lines: int) -> Item:
    """The right one of many functions that were defined before, by what it is said to do."""
    n_functions = max(6, _share(n_lines, index) // 4)
    known = [f"{verb} {noun}" for verb in _VERBS for noun in _NOUNS]
    jobs = random.sample(known, min(n_functions, len(known)))
    names = {job: f"{job.replace(' ', '_')}_{random.choice(_COLOURS)}" for job in jobs}
    text = "".join(
        f"def {names[job]}(items):\n    # {job}\n    return apply({job.split()[0]!r}, items)\n\n"
        for job in jobs
    )
    wanted = jobs[_place(index, len(jobs))]
    example = jobs[(_place(index, len(jobs)) + 3) % len(jobs)]
    text += f"# {example}\nresult = {names[example]}(items)\n\n# {wanted}\nresult ="
    return Item(text, names[wanted], Judge.NAME, stop="(", max_tokens=14)


def _share(n_lines: int, index: int) -> int:
    return max(12, round(n_lines * _LENGTHS[index % len(_LENGTHS)]))


def _place(index: int, n: int) -> int:
    """The middle of the index's tenth, of `n` places."""
    return min(n - 1, int((index % N_DEPTHS + 0.5) / N_DEPTHS * n))


def _drop(lines: list[str], place: int, name: str, value: str) -> None:
    lines[place] += f" The special number of the {name} is {value}."


def _figure(random: Random) -> str:
    return f"{random.randint(100, 9999)}.{random.randint(1, 9)}{random.randint(1, 9)}"
