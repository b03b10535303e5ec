"""Writes a long document about an island that does not exist, the same for the same seed.

The demo needs a text of several thousand tokens that no one has written before, with facts in it
that a question can ask for. Every sentence is true of the island as it is drawn from the seed.
"""

from __future__ import annotations

import random
from collections.abc import Callable

VILLAGES = (
    "Aldermoor", "Brackwater", "Carrow", "Dunmere", "Eastholm", "Fennick", "Garrowby", "Hollin",
    "Inverlea", "Kestrel Bay", "Lowmarsh", "Marrick", "Northolm", "Ostrey", "Pellgate", "Quarrin",
)  # fmt: skip
TRADES = (
    "weaving", "salt making", "boat building", "bee keeping", "cheese making", "glass blowing",
    "slate cutting", "herring fishing", "rope making", "apple growing", "pottery", "printing",
)  # fmt: skip
FAMILIES = (
    "Ashdown", "Birch", "Calloway", "Drummond", "Ellery", "Farrow", "Gentle", "Harrow", "Ives",
    "Jessop", "Kettle", "Lark", "Merrow", "Nettleship", "Orchard", "Penrose", "Quill", "Rook",
)  # fmt: skip
LANDMARKS = (
    "a stone bridge with three arches", "a tower of red brick", "a round market hall",
    "a windmill without sails", "a chapel with a blue door", "a well that never runs dry",
    "a row of nine lime trees", "a harbour wall built of black slate",
)  # fmt: skip
WEATHER = ("mild and wet", "dry and windy", "cold and clear", "foggy until noon", "warm and still")
OPENING = (
    "This is the handbook of Varrowmere, an island of sixteen villages in the northern sea. "
    "The capital of Varrowmere is Kestrel Bay. The island was settled in the year 1127 by the "
    "shipwright Maren Ashdown, and its lighthouse is called the Lantern of Saint Orrin. "
    "The handbook describes the villages one after the other, as a traveller would meet them.\n"
)
QUESTION = "What is the capital of Varrowmere, and what is its lighthouse called?"


def village_paragraph(source: random.Random, number: int) -> str:
    """Writes one paragraph: where a village lies, who lives there, what they do."""
    village = VILLAGES[number % len(VILLAGES)]
    neighbour = source.choice([name for name in VILLAGES if name != village])
    first_family, second_family = source.sample(FAMILIES, 2)
    first_trade, second_trade = source.sample(TRADES, 2)
    year = source.randrange(1130, 1890)
    sentences = [
        f"Chapter {number + 1} is about the village of {village}.",
        f"{village} lies {source.randrange(2, 19)} miles from {neighbour}, and the road between "
        f"them was paved in {year}.",
        f"It has {source.randrange(120, 2400)} inhabitants, most of whom live by {first_trade}.",
        f"The oldest house belongs to the {first_family} family, who came in "
        f"{source.randrange(1130, year + 1)} and brought {second_trade} with them.",
        f"In the middle of {village} stands {source.choice(LANDMARKS)}, and beside it the school, "
        f"which {source.randrange(12, 160)} children attend.",
        f"In autumn the weather is {source.choice(WEATHER)}, so the harvest is brought in by "
        f"{source.randrange(2, 29)} September.",
        f"The {second_family} family keeps the records of the parish and has counted "
        f"{source.randrange(3, 90)} ships in the bay in a single winter.",
    ]
    opening, rest = sentences[:2], sentences[2:]
    source.shuffle(rest)
    return " ".join(opening + rest) + "\n"


def write_document(seed: int, token_count: Callable[[str], int], tokens_at_least: int) -> str:
    """Writes whole paragraphs until `token_count` says that the text is long enough."""
    source = random.Random(seed)
    text, number = OPENING, 0
    while token_count(text) < tokens_at_least:
        text += "\n" + village_paragraph(source, number)
        number += 1
    return text


def chat_prompt(document: str, question: str) -> str:
    """Puts document and question into the chat format of the SmolLM2 models."""
    return f"<|im_start|>user\n{document}\n{question}<|im_end|>\n<|im_start|>assistant\n"
