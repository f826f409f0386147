"""GPT-2 in plain PyTorch, as a classifier: the logits of the last token.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners". Query, key and value are three
linear layers, not one of three times the width: each then has a LoRA update of its own, as in Raschka, "Build a Large
Language Model (From Scratch)", appendix E, whose 2,666,528 trainable numbers at rank 16 count them so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True)
class GPT2Config:
    """Sizes of a GPT-2; `token_std` and `position_std` are the spread of random embeddings, `linear_std` of weights."""

    vocabulary: int = 50257
    context: int = 1024
    width: int = 768
    heads: int = 12
    layers: int = 12
    classes: int = 2
    token_std: float = 0.02
    position_std: float = 0.01
    linear_std: float = 0.02


# nano is meant for random weights. Token vectors of spread 1 keep words apart as random features; attention that starts
# nearly uniform reads the message as a bag of words, which LoRA then sharpens. More layers only learn it by heart.
CONFIGS = {
    "gpt2": GPT2Config(),
    "nano": GPT2Config(width=384, heads=6, layers=1, token_std=1.0, position_std=0.02),
}


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
    """GPT-2 with a linear head over the last token.

    Weights are random (normal, as `config` says; biases zero) until `gpt2_weights.load` fills them.
    `grad_checkpointing = True` recomputes each block in the backward pass instead of keeping its activations.
    """

    def __init__(self, config: GPT2Config):
        super().__init__()
        self.config = config
        self.grad_checkpointing = False
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=config.linear_std)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.tokens.weight, std=config.token_std)
        nn.init.normal_(self.positions.weight, std=config.position_std)

    def features(self, ids: Tensor) -> Tensor:
        """Token ids, int64 (batch, tokens), to the last block's output (batch, tokens, width), not yet normalised."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return x

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids, int64 (batch, tokens <= context), to logits (batch, classes) of the last token."""
        return self.head(self.norm(self.features(ids)[:, -1]))
