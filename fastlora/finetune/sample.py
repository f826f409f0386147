"""`--data sample`: small synthetic data sets for a first run with no network. Learnable; the same on every machine."""

from __future__ import annotations

import random
import re
from pathlib import Path

from filelock import FileLock

from fastlora.finetune.homes import missing, write_tables

VERSION = "3"  # changes when the texts do
_WORDS = {
    "good": "wonderful brilliant superb delightful moving excellent charming gripping beautiful great fantastic "
    "touching hilarious masterful enjoyable memorable stunning loved best favorite fresh witty honest amazing",
    "bad": "awful boring terrible dull wooden tedious lame dreadful horrible bad worst pointless clumsy annoying cheap "
    "stupid waste hated mess predictable lazy laughable painful forgettable disappointing",
    "part": "plot acting script camera music cast story ending dialogue pacing lead director opening scene humor",
    "film": "film movie picture drama comedy thriller feature",
    "world": "minister government troops election border treaty parliament rebels ceasefire embassy president talks",
    "sports": "team coach season goal match league striker inning playoff champion stadium referee",
    "business": "shares profit market investors quarter oil stocks bank merger sales earnings prices",
    "science": "software scientists internet chip satellite researchers web virus computer space browser users",
    "where": "london beijing paris tokyo washington moscow sydney madrid",
    "when": "monday tuesday wednesday thursday friday yesterday today",
    "prize": "cash prize free urgent winner claim voucher ringtone award bonus mobile offer guaranteed camcorder",
    "chat": "dinner later home mum lecture bus sleep tomorrow tonight meeting movie lunch friend class coffee",
}
_WORDS = {kind: words.split() for kind, words in _WORDS.items()}
_REVIEW = (
    "the {part} was {mood}", "i found the {part} {mood} and the {part} {mood}", "what a {mood} {film} !",
    "this {film} has a {mood} {part}", "a {mood} {part} , a {mood} {part}", "it is simply {mood}",
    "everyone said that the {part} would be {mood} and it was", "we saw this {film} on {when}",
    "the {part} of this {film} stays with you", "my friends thought it {mood}",
)  # fmt: skip
_NEWS = (
    "{topic} and {topic} in {where} on {when}", "{where} {topic} says {topic} may change", "new {topic} after {topic}",
    "{topic} {topic} {topic} , sources said on {when}", "analysts in {where} watch the {topic} and the {topic}",
)  # fmt: skip
_HAM = (
    "see you at {chat} {when}", "are you coming to {chat} ?", "i am at {chat} now call me when {chat} ends",
    "sorry was at {chat} , talk {chat}", "lol ok then {chat} it is",
)  # fmt: skip
_SPAM = (
    "{prize} ! text WIN to 8{number} to {prize} your {prize}", "you have won a {prize} , call 090{number} now",
    "{prize} {prize} reply STOP to end , 150p per msg", "FINAL notice : {prize} awaits , claim code {number}",
)  # fmt: skip


def make_sample(folder: Path) -> Path:
    """Write imdb, ag_news and spam in the layout of `--data DIR` below `folder`, unless they are there; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".fastlora.lock"):
        for name, rows in _tables().items() if missing(folder, "imdb", "ag_news", "spam") else ():
            write_tables(folder, {name: rows}, ("Text", "Label") if name.startswith("spam") else ("text", "label"))
    return folder


def _tables() -> dict[str, list[tuple[str, int]]]:
    draw = random.Random(123)
    topics = ("world", "sports", "business", "science")
    moods = ["bad"] * 5 + ["good"], ["good"] * 5 + ["bad"]  # so that single words do not give the label away
    tables = {}
    for part, reviews, news in (("train", 2000, 1200), ("test", 500, 400)):
        told = [_text(draw, _REVIEW, draw.randint(4, 12), mood=moods[i % 2]) for i in range(reviews)]
        tables[f"imdb/{part}"] = [(f"{text}.", i % 2) for i, text in enumerate(told)]
        tables[f"ag_news/{part}"] = [(_text(draw, _NEWS, 3, topic=[topics[i % 4]]), i % 4) for i in range(news)]
    for part, messages in (("train", 600), ("valid", 80), ("test", 160)):
        tables[f"spam/{part}"] = [(_text(draw, (_HAM, _SPAM)[i % 2], 1), i % 2) for i in range(messages)]
    for rows in tables.values():
        draw.shuffle(rows)
    return tables


def _text(draw: random.Random, templates: tuple[str, ...], sentences: int, **kinds: list[str]) -> str:
    """Sentences from `templates`. A name of `kinds` stands for any of its own; `number` for a number."""

    def word(found: re.Match) -> str:
        kind = draw.choice(kinds.get(found[1], [found[1]]))
        return str(draw.randint(1000, 99999)) if kind == "number" else draw.choice(_WORDS[kind])

    return ". ".join(re.sub(r"\{(\w+)\}", word, draw.choice(templates)) for _ in range(sentences))
