"""Words: how a text is cut into them, and their numbers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from fastlora.errors import UserError
from fastlora.finetune.files import read_json, write_json

PAD, UNKNOWN, SPECIAL = 0, 1, ("<pad>", "<unk>")
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[!?]")


def tokenise(text: str) -> list[str]:
    """The words of `text`, lower case; of the punctuation only ! and ? stay."""
    return _WORD.findall(text.lower().replace("<br />", " ").replace("#39;", "'"))


class Vocabulary:
    """Words and their numbers, most frequent first; 0 is padding, 1 any other word.

    Args:
        words: without the two special ones; no word twice.
    """

    def __init__(self, words: Iterable[str]):
        self.words = [*SPECIAL, *words]
        self.numbers = {word: i for i, word in enumerate(self.words)}
        if len(self.numbers) != len(self.words):
            raise ValueError("words must differ from each other and from <pad> and <unk>")

    def __len__(self) -> int:
        return len(self.words)

    @classmethod
    def of(cls, texts: Iterable[Sequence[str]], size: int, least: int) -> Vocabulary:
        """The (at most) `size` most frequent words of tokenised `texts` that occur `least` times or more."""
        counts: Counter = Counter()
        for words in texts:
            counts.update(words)
        ranked = sorted(((word, n) for word, n in counts.items() if n >= least), key=lambda item: (-item[1], item[0]))
        return cls(word for word, _ in ranked[:size])

    def encode(self, words: Sequence[str]) -> np.ndarray:
        """The numbers of `words`, int32; a text with no words becomes one unknown word, so that its mean exists."""
        get = self.numbers.get
        return np.fromiter((get(word, UNKNOWN) for word in words or ("",)), dtype=np.int32, count=max(1, len(words)))

    def save(self, path: Path) -> None:
        """Write the words as a JSON list, whole or not at all."""
        write_json(path, self.words[len(SPECIAL) :])

    @classmethod
    def load(cls, path: Path) -> Vocabulary:
        """Read what `save` wrote; UserError when it is missing or damaged."""
        words = read_json(path)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise UserError(f"{path}: damaged, not a list of words")
        try:
            return cls(words)
        except ValueError as error:
            raise UserError(f"{path}: damaged ({error})") from None
