"""SMS messages as token ids: GPT-2's encoding, built offline where it can be, and the data set of `train spam`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from fastlora.errors import UserError
from fastlora.finetune.data import read_texts
from fastlora.finetune.files import clear_leftovers, write_bytes
from fastlora.regular_files import read_regular

PAD = 50256  # GPT-2 has no padding token; <|endoftext|> stands in
LABELS = ("ham", "spam")
LONGEST = 1024  # tokens; as many as GPT-2 has positions
MOST = 4 << 20  # bytes of a file of the vocabulary
# The files of OpenAI's release; tiktoken pins the same two sums.
CHECKSUMS = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}


def gpt2_encoding(data: Path | None):
    """tiktoken's encoding `gpt2` (50,257 tokens), from `<data>/gpt2/{encoder.json,vocab.bpe}` with no network.

    Without these files it is tiktoken's own, from its cache or its download. Both files must be OpenAI's to the
    byte: a vocabulary that differs would silently encode to other ids.

    Raises:
        UserError: a file is missing beside the other, is not OpenAI's, or nothing is found and the network is out
            of reach.
    """
    import tiktoken

    folder = None if data is None else data / "gpt2"
    if folder is None or not any(os.path.lexists(folder / name) for name in CHECKSUMS):
        return _tiktoken_own(tiktoken, folder)
    contents = {name: _checked(folder / name, want) for name, want in CHECKSUMS.items()}
    ranks = _ranks(json.loads(contents["encoder.json"]))
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": PAD})


def byte_encoding():
    """GPT-2's encoding without its merges: its 256 tokens of one byte, under GPT-2's own ids. Needs no file."""
    import tiktoken

    ranks = {bytes([b]): i for i, b in enumerate(_bytes_in_order())}
    return tiktoken.Encoding("gpt2-bytes", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={})


def keep_vocabulary(data: Path, run: Path) -> None:
    """Copy the vocabulary's files from `data` to `run`, so that `gpt2_encoding(run)` finds them; none, none copied."""
    clear_leftovers(run / "gpt2")
    for name, want in CHECKSUMS.items():
        if os.path.lexists(data / "gpt2" / name):
            (run / "gpt2").mkdir(exist_ok=True)
            write_bytes(run / "gpt2" / name, _checked(data / "gpt2" / name, want))


def _tiktoken_own(tiktoken, folder: Path | None):
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # requests' many, and tiktoken's ValueError on a broken download
        looked = f"no encoder.json and vocab.bpe in {folder}, and " if folder else ""
        raise UserError(f"GPT-2's vocabulary: {looked}tiktoken could not fetch it ({type(error).__name__})") from None


def _checked(path: Path, want: str) -> bytes:
    try:
        content = read_regular(path, MOST)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; encoder.json and vocab.bpe are needed together") from None
    got = hashlib.sha256(content).hexdigest()
    if got != want:
        raise UserError(f"{path}: sha256 {got[:16]}… is not that of OpenAI's file, {want[:16]}…; fetch it again")
    return content


def _ranks(encoder: dict[str, int]) -> dict[bytes, int]:
    """Token bytes to merge rank. In GPT-2's vocabulary a token's id is its rank, so encoder.json alone tells it.

    The file writes each byte as a printable character: those that print stand for themselves, the others for
    256, 257, ... in their order.
    """
    ordered = _bytes_in_order()
    printing = sum(map(_prints, ordered))
    byte_of = {chr(b) if i < printing else chr(256 + i - printing): b for i, b in enumerate(ordered)}
    return {bytes(byte_of[c] for c in token): i for token, i in encoder.items() if i != PAD}


def _prints(byte: int) -> bool:
    return chr(byte).isprintable() and chr(byte) != " "


def _bytes_in_order() -> list[int]:
    """The bytes in the order of their token ids: first those that print."""
    return sorted(range(256), key=lambda byte: not _prints(byte))


def encode(texts: Sequence[str], encoding, length: int | None = None) -> Tensor:
    """Token ids of `texts`, int64 (len(texts), length), padded with 50256 and cut to `length`.

    `length=None`: that of the longest text, at most 1024. Special tokens written in a message are text like any other.
    """
    ids = encoding.encode_ordinary_batch(list(texts), num_threads=2)
    length = min(LONGEST, max(1, *map(len, ids))) if length is None else length
    rows = torch.full((len(ids), length), PAD)
    for row, tokens in zip(rows, ids, strict=True):
        tokens = tokens[:length]
        row[: len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    return rows


class SpamDataset(Dataset):
    """Messages of a parquet file, encoded once and kept in memory.

    Args:
        path: parquet with columns Label (0 ham, 1 spam) and Text.
        encoding: as `gpt2_encoding` gives.
        length: tokens per message; None for the longest message of this file (what the training split is given;
            the others are given the training split's).
        limit: take the first rows only.

    Attributes:
        inputs: int64 (messages, length).
        labels: int64 (messages,).
        length: tokens per message.

    Raises UserError when the file is missing, damaged or empty, lacks a column, or holds another label or no text.
    """

    def __init__(self, path: Path, encoding, length: int | None = None, limit: int | None = None):
        texts, labels = read_texts(path, len(LABELS), limit, text="Text", label="Label")
        self.inputs = encode(texts, encoding, length)
        self.labels = torch.tensor(labels)
        self.length = self.inputs.shape[1]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.labels[index]
