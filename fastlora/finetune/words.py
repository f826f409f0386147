"""Words of texts: how a text is cut into them, their numbers, and their vectors, learned from the texts or read.

Learned vectors are the left singular vectors of the words' positive pointwise mutual information (Levy and Goldberg
2014, "Neural Word Embedding as Implicit Matrix Factorization"), by a randomised SVD (Halko, Martinsson and Tropp 2011).
No label and no test text is looked at.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlora import env
from fastlora.errors import UserError
from fastlora.finetune.checkpoint import read_checkpoint, write_checkpoint

PAD, UNKNOWN, SPECIAL = 0, 1, ("<pad>", "<unk>")
_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[!?]")
DIM = 100
WINDOW = 5  # words on either side
CONTEXTS = 4000  # columns of the co-occurrence matrix: the most frequent words
SMOOTHING = 0.75  # power of the contexts' frequencies, which tames rare contexts
RARE = 1e-3  # a word of frequency p weighs RARE / (RARE + p): Arora et al. 2017
NORM = 5.0  # mean length of a vector, about that of GloVe's
_VERSION = "4"  # of the cache


def tokenise(text: str) -> list[str]:
    """The words of `text`, lower case; of the punctuation only ! and ? stay."""
    return _WORD.findall(text.lower().replace("<br />", " ").replace("#39;", "'"))


def most_frequent(texts: Iterable[Sequence[str]], size: int, least: int) -> list[str]:
    """The (at most) `size` most frequent words of tokenised `texts` that occur `least` times or more."""
    counts = Counter(itertools.chain.from_iterable(texts))
    words = [word for word, count in counts.items() if count >= least]
    return sorted(words, key=lambda word: (-counts[word], word))[:size]


def numbered(words: Iterable[str]) -> dict[str, int]:
    """A vocabulary: `words` and their numbers. 0 is padding, 1 any word that is not there."""
    return {word: i for i, word in enumerate([*SPECIAL, *words])}


class TextDataset:
    """Encoded texts and their labels, in three flat tensors: ids int32 (words in all texts,), offsets int64
    (texts + 1,), where each text begins and the end, and labels int64 (texts,)."""

    def __init__(self, texts: Sequence[Sequence[str]], labels: Sequence[int], vocabulary: dict[str, int]):
        rows = [words or [SPECIAL[UNKNOWN]] for words in texts]  # so that the mean of a text with no words exists
        numbers = (vocabulary.get(word, UNKNOWN) for words in rows for word in words)
        self.ids = torch.from_numpy(np.fromiter(numbers, dtype=np.int32))
        self.offsets = torch.tensor([0, *map(len, rows)]).cumsum(0)
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def batch(self, rows: Tensor, pad_to: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """The texts `rows` (int64) one after the other, nothing between them: ids, offsets, labels.

        `ids`, int32 (words,), are padded at the end to a multiple of `pad_to`: GPU steps are replayed for known shapes.
        Of the `offsets`, int32 (batch + 1,), the last is where the padding begins, a bag that no mean contains.
        """
        starts, ends = self.offsets[rows], self.offsets[rows + 1]
        offsets = torch.nn.functional.pad((ends - starts).cumsum(0), (1, 0))
        words, padding = self.ids.numpy(), np.full(-int(offsets[-1]) % pad_to, PAD, np.int32)
        slices = [words[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
        ids = torch.from_numpy(np.concatenate([*slices, padding]))  # a tenth of the time of gathering word by word
        return ids, offsets.int(), self.labels[rows]


def learned(ids: Tensor, offsets: Tensor, words: int) -> Tensor:
    """`learn`, kept in the cache under the content's hash. A damaged cache file is made anew."""
    settings = repr((_VERSION, words, DIM, WINDOW, CONTEXTS, SMOOTHING)).encode()
    digest = hashlib.sha256(b"".join([settings, ids.numpy(), offsets.numpy()])).hexdigest()
    path = env.cache_dir() / "vectors" / f"{digest[:32]}.safetensors"
    with contextlib.suppress(UserError, KeyError):  # absent or damaged: it is only a cache
        return read_checkpoint(path)[0]["vectors"]
    vectors = learn(ids, offsets, words)
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, not the run
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(path, {"vectors": vectors})
    return vectors


def learn(ids: Tensor, offsets: Tensor, words: int) -> Tensor:
    """Vectors of `words` words, float32 (words, 100); those of the two special words are zero.

    `ids`, int32 (total,), are texts one after the other, most frequent words numbered first; `offsets`, int64
    (texts + 1,), where each text begins, and the end.
    """
    contexts = min(CONTEXTS, words)
    counts = torch.zeros(words * contexts)
    text = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
    ids = ids.long()
    real = ids >= len(SPECIAL)
    for distance in range(1, WINDOW + 1):
        near = (text[:-distance] == text[distance:]) & real[:-distance] & real[distance:]
        left, right = ids[:-distance][near], ids[distance:][near]
        for word, context in ((left, right), (right, left)):
            kept = context < contexts
            pairs = word[kept] * contexts + context[kept]
            counts.index_add_(0, pairs, torch.ones(len(pairs)))
    table = counts.view(words, contexts)
    row, column = table.sum(1, keepdim=True), table.sum(0) ** SMOOTHING
    column /= column.sum().clamp_(min=1)
    table /= row.clamp_(min=1)
    table /= column.clamp_(min=1e-12)
    table.clamp_(min=1).log_()  # positive PMI: what is below chance counts as chance

    rank = min(DIM, contexts)
    torch.manual_seed(0)  # who trains seeds anew
    left, singular, _ = torch.svd_lowrank(table, min(rank + 10, contexts), niter=3)
    vectors = torch.zeros(words, DIM)
    vectors[:, :rank] = left[:, :rank] * singular[:rank].sqrt()
    vectors[: len(SPECIAL)] = 0
    return vectors * (NORM * (words - len(SPECIAL)) / vectors.norm(dim=1).sum().clamp(min=1e-12))


def read_glove(path: Path, vocabulary: dict[str, int]) -> tuple[Tensor, int]:
    """(vectors, float32 (words, 100), how many words were found) from a file in GloVe's text format.

    Words that it lacks are zero. UserError when it is missing, a line is no word and 100 numbers, or no word is found.
    """
    vectors, found, number = np.zeros((len(vocabulary), DIM), dtype=np.float32), set(), 0
    try:
        with open(path, encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, 1):  # noqa: B007 - the message below names it
                word, *values = line.rsplit(" ", DIM)  # from the right: some of GloVe's words hold a space
                index = vocabulary.get(word, 0)
                if len(values) != DIM:
                    raise ValueError
                if index >= len(SPECIAL) and index not in found:
                    vectors[index] = values
                    found.add(index)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:  # UnicodeDecodeError is one
        raise UserError(f"{path}: line {number or 1} is not a word and {DIM} numbers (GloVe's format)") from None
    if not found:
        raise UserError(f"{path}: has none of the {len(vocabulary) - len(SPECIAL)} words of the training texts")
    if not np.isfinite(vectors).all():
        raise UserError(f"{path}: holds numbers that are not finite")
    return torch.from_numpy(vectors), len(found)


def weighted(vectors: Tensor, ids: Tensor, scale: float) -> Tensor:
    """`vectors` to be averaged: words frequent in `ids` weigh less, the mean text is zero, norms are near `scale`."""
    absent = ~vectors.any(dim=1)
    absent[: len(SPECIAL)] = True
    frequency = torch.bincount(ids, minlength=len(vectors)).float()
    frequency[: len(SPECIAL)] = 0
    frequency /= frequency.sum().clamp(min=1)
    vectors = vectors * (RARE / (RARE + frequency))[:, None]
    vectors = vectors - frequency @ vectors
    vectors[absent] = 0
    return vectors * (scale / (frequency @ vectors.norm(dim=1)).clamp(min=1e-12))
