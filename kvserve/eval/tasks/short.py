"""Tasks that need little: recall over turns, facts, topics."""

from random import Random

from kvserve.eval.tasks.item import Item, Judge

N_TURNS = 12
TOPICS = ("sports", "food", "music", "weather")
_THINGS = (
    "locker", "bicycle lock", "alarm", "garage", "safe", "suitcase", "gate", "office door",
    "storage room", "tool box", "mail box", "boat house", "cellar", "archive", "workshop",
    "greenhouse",
)  # fmt: skip
_FACTS = (
    ("What is the capital of France?", "Paris"), ("What is the capital of Japan?", "Tokyo"),
    ("What is the capital of Italy?", "Rome"), ("What is the capital of Egypt?", "Cairo"),
    ("What is the capital of Spain?", "Madrid"), ("What is the capital of Germany?", "Berlin"),
    ("What is the capital of Greece?", "Athens"), ("What is the capital of Russia?", "Moscow"),
    ("What is the capital of Austria?", "Vienna"), ("What is the capital of Norway?", "Oslo"),
    ("What is the capital of Poland?", "Warsaw"), ("What is the capital of Cuba?", "Havana"),
    ("What is the capital of Portugal?", "Lisbon"), ("What is the capital of Ireland?", "Dublin"),
    ("What is the capital of China?", "Beijing"), ("What is the capital of Canada?", "Ottawa"),
    ("What is the chemical symbol of gold?", "Au"), ("What is the chemical symbol of iron?", "Fe"),
    ("What is the chemical symbol of sodium?", "Na"), ("What gas do plants take in?", "carbon"),
    ("What is the largest planet of the solar system?", "Jupiter"),
    ("Which planet is known as the red planet?", "Mars"), ("What is frozen water called?", "ice"),
    ("Who wrote Hamlet?", "William Shakespeare"), ("Who painted the Mona Lisa?", "Leonardo"),
    ("Which is the largest ocean?", "Pacific"), ("In which country is Mount Fuji?", "Japan"),
    ("Which language is spoken in Brazil?", "Portuguese"), ("How many days has a week?", "7"),
    ("How many legs has a spider?", "8"), ("Which metal is liquid at room temperature?", "Mercury"),
    ("What is the opposite of hot?", "cold"), ("What colour is a ripe banana?", "yellow"),
    ("Which animal barks?", "dog"), ("Which river flows through London?", "Thames"),
    ("Which continent is Kenya in?", "Africa"), ("What do bees make?", "honey"),
)  # fmt: skip
_STRIDE = 7
"""Spreads the first few items over the kinds of facts; shares no divisor with their number."""
_WORDS = {
    "sports": (
        "The goalkeeper saved a penalty in the final minute.",
        "She won the race by two seconds and set a record.",
        "The coach changed three players at half time.",
        "Their team lost the match in the second overtime.",
        "He served two aces and took the set.",
    ),
    "food": (
        "Stir the soup and add a pinch of salt.",
        "The bakery sells warm bread with butter.",
        "We grilled fish and served it with rice.",
        "Her cake needs four eggs and some sugar.",
        "The chef roasted the potatoes with garlic.",
    ),
    "music": (
        "The orchestra tuned before the symphony began.",
        "He plays the violin and sings in a choir.",
        "Their new album has ten songs and a long guitar solo.",
        "The pianist repeated the last chords softly.",
        "A drummer and a singer joined the band.",
    ),
    "weather": (
        "Heavy rain and thunder are expected tonight.",
        "The fog lifted and the sun came out.",
        "Snow fell all morning and the wind was icy.",
        "It will be cloudy with a chance of showers.",
        "The storm brought hail and strong gusts.",
    ),
}


def recall(random: Random, index: int, n_lines: int) -> Item:
    """A code that was told some turns ago, in a talk of a dozen turns or more."""
    n_turns = max(N_TURNS, min(len(_THINGS), n_lines // 4))
    things = random.sample(_THINGS, min(n_turns, len(_THINGS)))
    codes = random.sample(range(1000, 10000), len(things))
    text = "".join(
        f"User: The code of the {thing} is {code}.\nAssistant: I will remember it.\n"
        for thing, code in zip(things, codes, strict=True)
    )
    asked = index % len(things)
    text += f"User: What is the code of the {things[asked]}?\n"
    text += f"Assistant: The code of the {things[asked]} is"
    return Item(text, str(codes[asked]), Judge.FIRST_NUMBER, max_tokens=8)


def facts(random: Random, index: int, n_lines: int) -> Item:
    """Common knowledge in a word or two."""
    del n_lines
    question, answer = _FACTS[index * _STRIDE % len(_FACTS)]
    others = random.sample([fact for fact in _FACTS if fact[0] != question], 4)
    shown = "".join(f"Q: {q}\nA: {a}\n" for q, a in others)
    return Item(f"{shown}Q: {question}\nA:", answer, Judge.PHRASE, max_tokens=8)


def classify(random: Random, index: int, n_lines: int) -> Item:
    """The topic of a sentence, one of four."""
    del index, n_lines
    topic = random.choice(TOPICS)
    asked = random.choice(_WORDS[topic])
    text = ""
    for other in random.sample(TOPICS, len(TOPICS)):
        shown = random.choice([sentence for sentence in _WORDS[other] if sentence != asked])
        text += f"Text: {shown}\nTopic: {other}\n"
    prompt = f"{text}Text: {asked}\nTopic:"
    return Item(prompt, topic, Judge.PHRASE, max_tokens=4)
