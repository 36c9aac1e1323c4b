"""Tasks where one wrong step or digit is an error: chains of arithmetic, and tool calls."""

import json
from random import Random

from kvserve.eval.tasks.item import Item, Judge

FEWEST_STEPS, MOST_STEPS = 2, 8
_TOOLS = (
    "set_timer(minutes, label)",
    "send_mail(to, subject)",
    "book_table(place, guests, hour)",
    "convert(amount, source, target)",
)
_LABELS = ("tea", "laundry", "bread", "meeting", "pasta", "stretching", "call", "medicine")
_PEOPLE = ("ada", "bruno", "chen", "dora", "emil", "fatma", "goran", "hana", "iris", "jonas")
_PLACES = ("Luna", "Harbour Grill", "Old Mill", "Saffron", "The Fig Tree", "Nordlys", "Rosmarin")
_SUBJECTS = ("budget", "travel plans", "minutes of Monday", "new key", "invoice 12", "thanks")
_CURRENCIES = ("EUR", "USD", "CHF", "JPY", "SEK", "PLN", "BRL")


def arithmetic(random: Random, index: int, n_lines: int) -> Item:
    """A chain of 2 to 8 additions, subtractions and products, worked out step by step."""
    del n_lines
    n_steps = FEWEST_STEPS + index % (MOST_STEPS - FEWEST_STEPS + 1)
    shown = "".join(
        f"{q}{work} Answer: {a}\n\n" for q, work, a in map(_chain, [random] * 2, (3, 4))
    )
    question, _, answer = _chain(random, n_steps)
    return Item(shown + question, answer, Judge.LAST_NUMBER, max_tokens=18 * n_steps + 8)


def _chain(random: Random, n_steps: int) -> tuple[str, str, str]:
    value = random.randint(2, 30)
    told, work = [f"Start with {value}."], []
    for _ in range(n_steps):
        kind = random.choice(("add", "subtract", "multiply"))
        operand = random.randint(2, 4) if kind == "multiply" else random.randint(2, 30)
        if kind == "multiply" and value > 400:
            kind, operand = "subtract", random.randint(2, 30)
        sign = {"add": "+", "subtract": "-", "multiply": "*"}[kind]
        found = {"+": value + operand, "-": value - operand, "*": value * operand}[sign]
        told.append({"+": f"Add {operand}.", "-": f"Subtract {operand}."}.get(
            sign, f"Multiply by {operand}."
        ))  # fmt: skip
        work.append(f"{value} {sign} {operand} = {found}.")
        value = found
    return f"Question: {' '.join(told)}\nWork:", f" {' '.join(work)}", str(value)


def tools(random: Random, index: int, n_lines: int) -> Item:
    """A request as one JSON call of one of four tools."""
    del n_lines
    shown = "".join(
        f"Request: {request}\nCall: {call}\n"
        for request, call in (_call(random, i) for i in range(4))
    )
    request, call = _call(random, index)
    prompt = f"Tools: {', '.join(_TOOLS)}\n{shown}Request: {request}\nCall:"
    return Item(prompt, call, Judge.JSON, max_tokens=56)


def _call(random: Random, index: int) -> tuple[str, str]:
    kind = index % len(_TOOLS)
    if kind == 0:
        minutes, label = random.randint(2, 90), random.choice(_LABELS)
        request = f"Set a timer of {minutes} minutes for the {label}."
        return request, _json("set_timer", minutes=minutes, label=label)
    if kind == 1:
        to, subject = f"{random.choice(_PEOPLE)}@example.org", random.choice(_SUBJECTS)
        return f"Write to {to} about {subject}.", _json("send_mail", to=to, subject=subject)
    if kind == 2:
        place, guests, hour = random.choice(_PLACES), random.randint(2, 12), random.randint(17, 22)
        request = f"Book a table at {place} for {guests} people at {hour}:00."
        return request, _json("book_table", place=place, guests=guests, hour=hour)
    amount = random.randint(10, 9999)
    source, target = random.sample(_CURRENCIES, 2)
    request = f"How much is {amount} {source} in {target}?"
    return request, _json("convert", amount=amount, source=source, target=target)


def _json(name: str, **arguments: object) -> str:
    return json.dumps({"name": name, "arguments": arguments})
