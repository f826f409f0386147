"""`TextClassifier`: the mean of a text's word vectors, and two linear layers."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class TextClassifier(nn.Module):
    """embedding -> mean over the text's words -> fc1 -> ReLU -> fc2.

    Args:
        vectors: float32 (words, dim): what the embedding starts from; it is copied.
        classes: logits per text.
        hidden: outputs of fc1.
    """

    def __init__(self, vectors: Tensor, classes: int, hidden: int = 128):
        super().__init__()
        self.embedding = nn.EmbeddingBag.from_pretrained(vectors.clone(), freeze=False, mode="mean")
        self.fc1 = nn.Linear(vectors.shape[1], hidden)
        self.fc2 = nn.Linear(hidden, classes)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Logits, float32 (batch, classes).

        Args:
            ids: int32 or int64 (words,), the texts one after the other, then padding.
            offsets: (batch + 1,), where each text and, last, the padding begins.
        """
        means = self.embedding(ids, offsets)[:-1]  # the last bag holds the padding
        return self.fc2(F.relu(self.fc1(means)))

    def new_head(self, classes: int) -> None:
        """Replace fc2 by a new layer of `classes` logits."""
        self.fc2 = nn.Linear(self.fc1.out_features, classes, device=self.fc2.weight.device)

