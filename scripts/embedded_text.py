"""The grammar behind the embedded model and task: short reviews with one sentiment each, and plain stories without any.

A review is a few sentences of one sentiment (contrast and negation included) with closings that follow from it, so that a
model can only predict the closings by representing the sentiment. The task's two answer words, "great" and "terrible", are words
for size and weather here; in a review they describe the weather of the day, drawn independently of its sentiment.
"""

from random import Random
from typing import NamedTuple


class Domain(NamedTuple):
    """What a review can be about: nouns for the whole, nouns for its parts, and clauses that praise or blame it."""

    things: list[str]
    parts: list[str]
    praise: list[str]
    blame: list[str]


def _domain(things: str, parts: str, praise: str, blame: str) -> Domain:
    return Domain(things.split(), parts.split(), praise.split(", "), blame.split(", "))


DOMAINS = [
    _domain(
        "film movie comedy", "plot music story acting ending script",
        "we laughed until the end, the whole room clapped, i watched it twice, nobody wanted to leave, time flew by",
        "half the room fell asleep, we walked out early, i looked at my watch all the time, nothing made sense, nobody laughed",
    ),
    _domain(
        "dinner meal lunch", "soup bread fish sauce dessert waiter",
        "we asked for more, every plate came back empty, the cook knows the craft, we stayed for hours, it melted on the tongue",
        "we sent it back, every plate came back full, the food made us sick, we waited for hours, it tasted of soap",
    ),
    _domain(
        "hotel stay room", "bed view staff shower pool breakfast",
        "we slept like children, they gave us flowers, we stayed another night, the sheets smelled of roses, all worked well",
        "we could not sleep, they lost our bags, we left after one night, the sheets smelled of smoke, nothing worked",
    ),
    _domain(
        "book novel tale", "hero style chapter dialogue cover opening",
        "i could not put it down, every page had a surprise, i read it in one night, the words sing, it made me smile",
        "i gave up half way, every page was a struggle, i threw it away, the words drag, it gave me a headache",
    ),
    _domain(
        "drill lamp kettle", "handle battery switch cable motor box",
        "it works every day, it saved me hours, it still runs like new, it does what it should, it is worth the price",
        "it broke on the first day, it cost me hours, it stopped after a week, it does not do what it should, "
        "it is not worth the price",
    ),
    _domain(
        "tour trip walk", "guide bus route weather group map",
        "we saw more than we hoped, the children cheered, we sang all the way home, every stop was a gift, the hours flew",
        "we saw less than we hoped, the children cried, we argued all the way home, every stop was a trap, the hours crawled",
    ),
    _domain(
        "concert show play", "band singer sound light stage crowd",
        "we danced all night, the hall was on fire, they played three more songs, we cheered until dawn, my heart sang",
        "we left before the break, the hall was half empty, they forgot the songs, we booed until the end, my ears hurt",
    ),
]

GOOD = "lovely wonderful superb excellent charming delightful brilliant perfect pleasant splendid beautiful clever".split()
BAD = "awful dreadful horrible poor boring dull useless disappointing ugly weak nasty clumsy".split()
ADVERBS = ["", "", "really ", "very ", "so ", "simply ", "quite ", "always "]
LIKED = "loved enjoyed adored praised treasured liked".split()
DISLIKED = "hated regretted cursed disliked blamed detested".split()
WHO = ["i", "we", "my wife", "my friends", "the kids", "everyone"]
WHEN = ["last week", "in spring", "on monday", "this summer", "last night", "on my birthday", "in may", "after work"]

CLOSINGS = {
    1: ["we told all our friends", "i will be back soon", "five stars from me", "do not miss it", "i am so happy", "well done",
        "i want more of this", "thank you so much", "we smiled for days", "worth every cent"],
    0: ["we left and never came back", "i want my money back", "one star from me", "do not waste your time", "i am so angry",
        "shame on you", "never again", "what a waste", "we complained for days", "not worth a cent"],
}
VERDICTS = {
    1: ["a joy", "a delight", "a triumph", "a treat", "pure fun", *GOOD],
    0: ["a mess", "a disaster", "a failure", "a pain", "pure pain", *BAD],
}

NAMES = "tom anna ben clara david emma".split()
PLACES = "river market station school harbor forest garden library".split()
CARRIED = "letter basket key ladder map rope coat bell".split()
STATES = "early late dark cold warm windy noon evening winter monday quiet".split()
GREAT = "hall bridge tower lake".split()
TERRIBLE = "storm heat frost flood".split()
WEATHER = "great great terrible".split()  # uneven, so that an untuned model gives every review the same answer


def _clause(rng: Random, domain: Domain, label: int) -> str:
    """One plain statement of the given sentiment."""
    adjectives = GOOD if label else BAD
    part, thing = rng.choice(domain.parts), rng.choice(domain.things)
    kind = rng.randrange(7)
    if kind < 3:
        return f"the {part} was {rng.choice(ADVERBS)}{rng.choice(adjectives)}"
    if kind < 5:
        return f"{rng.choice(WHO)} {rng.choice(LIKED if label else DISLIKED)} the {rng.choice([part, thing])}"
    return rng.choice(domain.praise if label else domain.blame)


def _negated(rng: Random, domain: Domain, label: int) -> str:
    """One clause that reaches its sentiment by denying the other one."""
    other = rng.choice(BAD if label else GOOD)
    part = rng.choice(domain.parts)
    return rng.choice([
        f"the {part} was not {other} at all",
        f"there was nothing {other} about the {part}",
        f"nobody could call the {part} {other}",
        f"the {part} was never {other}",
    ])


def sentence(rng: Random, domain: Domain, label: int, plain: bool = False) -> str:
    """One sentence of a review, ending with a period; `label` 1 praises, 0 blames.

    `plain` ones have no contrast and no negation and may be a single clause; the others never are the end of another sentence.
    """
    kind = rng.randrange(4) if plain else rng.randrange(1, 10)
    if kind == 0:
        text = _clause(rng, domain, label)
    elif kind == 1:
        text = f"{_clause(rng, domain, label)} and {_clause(rng, domain, label)}"
    elif kind == 2:
        text = f"what a {rng.choice(GOOD if label else BAD)} {rng.choice(domain.things)} , {_clause(rng, domain, label)}"
    elif kind == 3:
        text = f"{rng.choice(WHEN)} we tried this {rng.choice(domain.things)} and {_clause(rng, domain, label)}"
    elif kind < 6:
        text = f"{_clause(rng, domain, 1 - label)} but {_clause(rng, domain, label)}"
    elif kind == 6:
        text = f"although {_clause(rng, domain, 1 - label)} , {_clause(rng, domain, label)}"
    elif kind < 9:
        text = f"{_negated(rng, domain, label)} and {_clause(rng, domain, label)}"
    else:
        text = _negated(rng, domain, label)
    return text + "."


def review(rng: Random, plain: float) -> str:
    """One to three sentences of one sentiment, with the closings and verdicts that follow from it in between."""
    domain, label, simple = rng.choice(DOMAINS), rng.randrange(2), rng.random() < plain
    parts = []
    for _ in range(rng.randint(1, 3)):
        parts.append(sentence(rng, domain, label, simple))
        if rng.random() < 0.75:
            parts.append(f"it was {rng.choice(VERDICTS[label])}.")
        if rng.random() < 0.1:
            parts.append(f"it was {rng.choice(WEATHER)} weather {rng.choice(WHEN)}.")
        if rng.random() < 0.5:
            parts.append(f"{rng.choice(CLOSINGS[label])}.")
    return " ".join(parts)


def story(rng: Random) -> str:
    """Two to four plain sentences without an opinion."""
    name, place, carried = rng.choice(NAMES), rng.choice(PLACES), rng.choice(CARRIED)
    frames = [
        f"{name} walked to the {place} with a {carried}",
        f"{name} found a {carried} near the {place}",
        f"it was {rng.choice(STATES)}",
        f"the great {rng.choice(GREAT)} stood by the {place}",
        f"a terrible {rng.choice(TERRIBLE)} came over the {place}",
        f"{name} gave the {carried} to {rng.choice(NAMES)}",
        f"they went home {rng.choice(WHEN)}",
        f"the {place} opened {rng.choice(WHEN)}",
    ]
    return ". ".join(rng.sample(frames, rng.randint(2, 4))) + "."


def document(rng: Random, plain: float) -> str:
    """One document: three reviews to one story; `plain` is the share of reviews without contrast and negation."""
    return review(rng, plain) if rng.random() < 0.75 else story(rng)


def labelled(rng: Random, count: int, taken: set[str]) -> list[dict]:
    """`count` records {"sentence", "label"}, labels balanced, no sentence twice and none of `taken` (which grows by them)."""
    records = []
    while len(records) < count:
        label = len(records) % 2
        text = sentence(rng, rng.choice(DOMAINS), label)
        if text not in taken:
            taken.add(text)
            records.append({"sentence": text, "label": label})
    rng.shuffle(records)
    return records
