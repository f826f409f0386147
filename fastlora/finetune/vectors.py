"""Word vectors: read from a file in GloVe's text format, or learned from the training texts alone.

Learned ones are the left singular vectors of the words' positive pointwise mutual information (Levy and Goldberg 2014,
"Neural Word Embedding as Implicit Matrix Factorization"), by a randomised SVD (Halko, Martinsson and Tropp 2011). No
label and no test text is looked at.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlora import env
from fastlora.errors import UserError
from fastlora.finetune.files import write_bytes
from fastlora.finetune.vocabulary import SPECIAL, Vocabulary
from fastlora.regular_files import open_regular, read_regular

DIM = 100
WINDOW = 5  # words on either side
CONTEXTS = 4000  # columns of the co-occurrence matrix: the most frequent words
SMOOTHING = 0.75  # power of the contexts' frequencies, which tames rare contexts
RARE = 1e-3  # a word of frequency p weighs RARE / (RARE + p): Arora et al. 2017
NORM = 5.0  # mean length of a vector, about that of GloVe's
_VERSION = "2"


def learned(ids: Tensor, offsets: Tensor, words: int) -> Tensor:
    """`learn`, kept in the cache under the content's hash. A damaged cache file is made anew."""
    from safetensors.torch import load, save

    settings = (_VERSION, words, DIM, WINDOW, CONTEXTS, SMOOTHING)
    digest = hashlib.sha256(repr(settings).encode())
    digest.update(ids.numpy())
    digest.update(offsets.numpy())
    path = env.cache_dir() / "vectors" / f"{digest.hexdigest()[:32]}.safetensors"
    try:
        content = read_regular(path, 4 * words * DIM + 4096)
        if content[:32] == hashlib.sha256(content[32:]).digest():
            vectors = load(content[32:])["vectors"]
            if vectors.shape == (words, DIM) and vectors.dtype == torch.float32:
                return vectors
    except Exception:  # absent or damaged in any way: it is only a cache
        pass
    vectors = learn(ids, offsets, words)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = save({"vectors": vectors})
        write_bytes(path, hashlib.sha256(content).digest() + content)
    except OSError:  # a cache that cannot be written costs time, not the run
        pass
    return vectors


def learn(ids: Tensor, offsets: Tensor, words: int) -> Tensor:
    """Vectors of `words` words, float32 (words, 100); those of the two special words are zero.

    Args:
        ids: int32 (total,): texts one after the other, most frequent words numbered first.
        offsets: int64 (texts + 1,): where each text begins, and the end.
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
    sketch = torch.randn(contexts, min(rank + 10, contexts), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        sketch = torch.linalg.qr(table @ sketch).Q
        sketch = torch.linalg.qr(table.T @ sketch).Q
    left, singular, _ = torch.linalg.svd(table @ sketch, full_matrices=False)
    vectors = torch.zeros(words, DIM)
    vectors[:, :rank] = left[:, :rank] * singular[:rank].sqrt()
    vectors[: len(SPECIAL)] = 0
    return vectors * (NORM * (words - len(SPECIAL)) / vectors.norm(dim=1).sum().clamp(min=1e-12))


def read_glove(path: Path, vocabulary: Vocabulary) -> tuple[Tensor, int]:
    """Vectors for `vocabulary` from a file in GloVe's text format: a word and 100 numbers a line.

    Returns (float32 (words, 100), how many words were found); words that the file lacks are zero. Memory is bounded by
    the vocabulary, whatever the file holds.

    Raises UserError when the file is missing, a line is not of this format, or it has none of the words.
    """
    vectors = np.zeros((len(vocabulary), DIM), dtype=np.float32)
    found = set()
    try:
        with io.TextIOWrapper(open_regular(path), encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(iter(lambda: file.readline(1 << 16), ""), 1):
                # From the right: some of GloVe's words hold a space.
                word, *values = line.rstrip("\n").rsplit(" ", DIM)
                if len(values) != DIM:
                    raise UserError(f"{path}: line {number} is not a word and {DIM} numbers (GloVe's text format)")
                index = vocabulary.numbers.get(word)
                if index is None or index < len(SPECIAL) or index in found:
                    continue
                try:
                    vectors[index] = values
                except ValueError:
                    raise UserError(f"{path}: line {number} holds something that is not a number") from None
                found.add(index)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8, so not GloVe's text format") from None
    if not found:
        raise UserError(f"{path}: has none of the {len(vocabulary) - len(SPECIAL)} words of the training texts")
    if not np.isfinite(vectors).all():
        raise UserError(f"{path}: holds numbers that are not finite")
    return torch.from_numpy(vectors), len(found)


def weighted(vectors: Tensor, ids: Tensor, scale: float) -> Tensor:
    """`vectors` prepared for averaging: frequent words weigh less, the mean text is zero, a word's norm about `scale`.

    Args:
        vectors: float32 (words, dim).
        ids: the training texts' words, int32; they give the words' frequencies.
    """
    absent = ~vectors.any(dim=1)
    absent[: len(SPECIAL)] = True
    frequency = torch.bincount(ids, minlength=len(vectors)).float()
    frequency[: len(SPECIAL)] = 0
    frequency /= frequency.sum().clamp(min=1)
    vectors = vectors * (RARE / (RARE + frequency))[:, None]
    vectors = vectors - frequency @ vectors
    vectors[absent] = 0
    return vectors * (scale / (frequency @ vectors.norm(dim=1)).clamp(min=1e-12))
