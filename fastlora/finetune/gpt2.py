"""GPT-2 in plain PyTorch, as a classifier: the logits of the last token. Its weights and its encoding, from files.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Query, key and value are three
linear layers, not one of three times the width: each then has a LoRA update of its own, as in Raschka, "Build a Large
Language Model (From Scratch)", appendix E, whose 2,666,528 trainable numbers at rank 16 count them so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastlora.env import expanded
from fastlora.errors import UserError, shown
from fastlora.finetune.checkpoint import fill, read_checkpoint
from fastlora.finetune.data import FILES
from fastlora.finetune.homes import SOURCES


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2, and the spread of its weights where they are random."""

    vocabulary: int = 50257
    context: int = 1024
    width: int = 768
    heads: int = 12
    layers: int = 12
    classes: int = 2
    token_std: float = 0.02
    position_std: float = 0.01


# nano is meant for random weights. Token vectors of spread 1 keep words apart as random features; attention that starts
# nearly uniform reads the message as a bag of words, which LoRA then sharpens. More layers only learn it by heart.
CONFIGS = {"gpt2": GPT2Config(), "nano": GPT2Config(width=384, heads=6, layers=1, token_std=1.0, position_std=0.02)}


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.heads = config.heads
        self.query, self.key, self.value, self.out = (nn.Linear(config.width, config.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:  # (batch, tokens, width)
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )  # each (batch, heads, tokens, width / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One transformer layer, normalised before attention and before the feed-forward part."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        width = config.width
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(config)
        self.expand, self.contract = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.contract(F.gelu(self.expand(self.norm_2(x)), approximate="tanh"))


class GPT2(nn.Module):
    """GPT-2 with a linear head over the last token. Its weights are random until `load_weights` fills them."""

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.grad_checkpointing = False  # compute blocks again in the backward pass instead of keeping activations
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.tokens.weight, std=config.token_std)
        nn.init.normal_(self.positions.weight, std=config.position_std)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids, int64 (batch, tokens <= context), to logits (batch, classes) of the last token."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.norm(x[:, -1]))


# Weights: Hugging Face's `model.safetensors`, which keeps a linear weight as (in, out), and query, key and value side
# by side in one.

WEIGHTS = "model.safetensors"
_QKV = ("query", "key", "value")
_THEIRS = {
    "tokens": "wte", "positions": "wpe", "norm": "ln_f", "norm_1": "ln_1", "norm_2": "ln_2", "out": "attn.c_proj",
    "query": "attn.c_attn", "expand": "mlp.c_fc", "contract": "mlp.c_proj",
}  # fmt: skip


def find_weights(folder: str | None) -> Path:
    """`model.safetensors` in `folder`; with None, that of gpt2 in the Hugging Face hub's cache. UserError for none."""
    if folder is not None:
        path = expanded(folder) / WEIGHTS
        if not path.is_file():
            raise UserError(f"--weights {folder}: holds no {WEIGHTS}")
        return path.resolve()
    from huggingface_hub import try_to_load_from_cache

    for name in ("gpt2", "openai-community/gpt2"):
        if isinstance(found := try_to_load_from_cache(name, WEIGHTS), str):
            return Path(found).resolve()
    raise UserError(f"GPT-2's weights are not in the Hugging Face hub's cache; `hf download gpt2 {WEIGHTS}` "
                    "fetches them, or give --weights DIR or --weights random")  # fmt: skip


def load_weights(model: GPT2, path: Path) -> None:
    """Fill every weight of `model` but its head from Hugging Face's file.

    UserError, and nothing is changed, when the file is damaged, misses a tensor, or `fill` refuses one.
    """
    theirs, ours = {name.removeprefix("transformer."): t for name, t in read_checkpoint(path)[0].items()}, {}
    for name, held in model.state_dict().items():
        *layer, part, ending = name.split(".")
        if part == "head":
            continue
        key = f"{f'h.{layer[1]}.' if layer else ''}{_THEIRS['query' if part in _QKV else part]}.{ending}"
        if key not in theirs:
            raise UserError(f"{path}: holds no {key}, so it is not a GPT-2 of this size")
        tensor = theirs[key].mT if ".c_" in key and ending == "weight" else theirs[key]
        ours[name] = (tensor.chunk(3)[_QKV.index(part)] if part in _QKV else tensor).to(held.dtype)
    fill(model, path, ours, set(ours))


# The encoding: from OpenAI's files.

PAD = 50256  # GPT-2 has no padding token; <|endoftext|> stands in
PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


def gpt2_encoding(data: Path):
    """tiktoken's encoding `gpt2` (50,257 tokens), from `<data>/gpt2/{encoder.json,vocab.bpe}` with no network.

    UserError unless both are OpenAI's to the byte: a vocabulary that differs would silently encode to other ids.
    """
    import tiktoken
    import tiktoken.load

    sums, (encoder, merges) = SOURCES["gpt2"].values(), (data / file for file in FILES["gpt2"])
    try:
        ranks = tiktoken.load.data_gym_to_mergeable_bpe_ranks(str(merges), str(encoder), *reversed(sums))
    except (OSError, ValueError) as error:  # the latter for a wrong checksum
        raise UserError(f"GPT-2's vocabulary: {encoder} and {merges.name} are needed ({shown(str(error))})") from None
    return tiktoken.Encoding("gpt2", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": PAD})


def byte_encoding():
    """GPT-2's encoding without its merges: its 256 tokens of one byte, under GPT-2's own ids. Needs no file."""
    import tiktoken

    ordered = sorted(range(256), key=lambda byte: not (chr(byte).isprintable() and chr(byte) != " "))
    ranks = {bytes([byte]): i for i, byte in enumerate(ordered)}  # those that print come first
    return tiktoken.Encoding("gpt2-bytes", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={})


def encode(texts: Sequence[str], encoding, length: int | None = None) -> Tensor:
    """Token ids of `texts`, int64 (len(texts), length), padded with 50256 and cut to `length` (default: the longest).

    Special tokens written in a message are text like any other.
    """
    ids = encoding.encode_ordinary_batch(list(texts), num_threads=2)
    length = min(GPT2Config.context, max(1, *map(len, ids))) if length is None else length
    return torch.tensor([(tokens + [PAD] * length)[:length] for tokens in ids])
