"""`--data sample`: small synthetic data sets for a first run with no network. Learnable; the same on every machine."""

from __future__ import annotations

import random
from pathlib import Path

from fastlora.errors import UserError
from fastlora.finetune.files import LOCK, atomic_write, locked
from fastlora.regular_files import check_regular

VERSION = "1"  # changes when the texts do
_WORDS = {
    "good": "wonderful brilliant superb delightful moving excellent charming gripping beautiful great perfect "
            "touching hilarious masterful enjoyable memorable stunning loved best favorite fresh witty honest amazing "
            "fantastic",
    "bad": "awful boring terrible dull wooden tedious lame dreadful horrible bad worst pointless clumsy annoying "
           "stupid waste hated mess predictable lazy laughable painful forgettable cheap disappointing",
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
)
_NEWS = (
    "{topic} and {topic} in {where} on {when}", "{where} {topic} says {topic} may change", "new {topic} after {topic}",
    "{topic} {topic} {topic} , sources said on {when}", "analysts in {where} watch the {topic} and the {topic}",
)
_SMS = {
    0: ("see you at {chat} {when}", "are you coming to {chat} ?", "i am at {chat} now call me when {chat} ends",
        "sorry was at {chat} , talk {chat}", "lol ok then {chat} it is"),
    1: ("{prize} ! text WIN to 8{number} to {prize} your {prize}", "you have won a {prize} , call 090{number} now",
        "{prize} {prize} reply STOP to end , 150p per msg", "FINAL notice : {prize} awaits , claim code {number}"),
}


def make_sample(folder: Path) -> Path:
    """Write imdb, ag_news and spam in the layout of `--data DIR` below `folder`, unless they are there; return it.

    What is there and is not the sample, a damaged file, say, is made anew.
    """
    import pandas as pd

    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK, wait=True, busy=""):
        for name, rows in _tables().items():
            path = folder / f"{name}.parquet"
            columns = ("Text", "Label") if name.startswith("spam") else ("text", "label")
            if not _holds(path, columns, rows):
                if path.is_dir():
                    raise UserError(f"{path}: a folder in the place of a file of the sample; delete it")
                path.parent.mkdir(exist_ok=True)
                with atomic_write(path) as temporary:
                    pd.DataFrame(rows, columns=columns).to_parquet(temporary, index=False)
    return folder


def _holds(path: Path, columns: tuple[str, str], rows: list[tuple[str, int]]) -> bool:
    import pandas as pd

    try:
        check_regular(path)
        table = pd.read_parquet(path)
        return list(zip(*(table[column].tolist() for column in columns), strict=True)) == rows
    except Exception:  # absent or damaged in any way: it is only a cache
        return False


def _tables() -> dict[str, list[tuple[str, int]]]:
    draw = random.Random(123)
    topics = ("world", "sports", "business", "science")
    tables = {}
    for part, reviews, news in (("train", 2000, 1200), ("test", 500, 400)):
        tables[f"imdb/{part}"] = [(_review(draw, i % 2), i % 2) for i in range(reviews)]
        tables[f"ag_news/{part}"] = [(_text(draw, _NEWS, 3, topic=topics[i % 4]), i % 4) for i in range(news)]
    for part, messages in (("train", 600), ("valid", 80), ("test", 160)):
        tables[f"spam/{part}"] = [(_text(draw, _SMS[i % 2], 1), i % 2) for i in range(messages)]
    for rows in tables.values():
        draw.shuffle(rows)
    return tables


def _review(draw: random.Random, label: int) -> str:
    # One mood in six is the other one, so that single words do not give the label away.
    moods = ("good" if (label == 1) != (draw.random() < 1 / 6) else "bad" for _ in iter(int, 1))
    return ". ".join(_fill(draw, draw.choice(_REVIEW), moods) for _ in range(draw.randint(4, 12))) + "."


def _text(draw: random.Random, templates: tuple[str, ...], sentences: int, topic: str = "") -> str:
    return ". ".join(_fill(draw, draw.choice(templates), iter(()), topic) for _ in range(sentences))


def _fill(draw: random.Random, template: str, moods, topic: str = "") -> str:
    words = []
    for word in template.split(" "):
        kind = word.strip("0189{}")
        if word.startswith("{") or "{" in word:
            prefix = word[: word.index("{")]
            if kind == "number":
                word = prefix + str(draw.randint(1000, 99999))
            else:
                word = draw.choice(_WORDS[next(moods) if kind == "mood" else topic if kind == "topic" else kind])
        words.append(word)
    return " ".join(words)
