"""`fastlora train imdb`: sentiment of film reviews. A classifier pre-trained on news, adapted by 456 + 258 numbers."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import fastlora
from fastlora.finetune import run as runs
from fastlora.finetune.checkpoint import fill, read_checkpoint, write_checkpoint
from fastlora.finetune.data import Batches, Data, data_digest, locate, random_split, read_texts
from fastlora.finetune.options import add_shared, add_steps, complete, pick_device
from fastlora.finetune.step import Settings
from fastlora.finetune.trainer import Trainer
from fastlora.finetune.tune import adapt, fine_tune, groups_of, members_of
from fastlora.finetune.words import DIM, TextDataset, learned, most_frequent, numbered, read_glove, tokenise, weighted

LABELS, TOPICS = ("negative", "positive"), 4
WORDS, LEAST = 20_000, 3  # vocabulary: how many words, and how often each occurs at least
GPU_PAD = 4096  # words; on a GPU a batch's words are padded to a multiple, so that few shapes occur
BASE_SEED = 0  # of the split and of the base


RECIPE = {  # by SGD
    "epochs": 5,
    "lr": 1.0,
    "decay": 0.1,  # of the rate, after each epoch
    "clip": 1.0,
    "batch_size": 64,
    "rank": 2,
    "alpha": 16.0,  # the update is scaled by alpha / rank
    "precision": "fp32",
    "pretrain_epochs": 3,  # passes over the news; their rate is 1, halved each epoch
    "scale": 10.0,  # mean norm of the word vectors, weighted for averaging; None leaves them as they are
}
# As published: rank 2, the update scaled by 0.1, gradients clipped at 0.1, vectors averaged as they are.
RECIPES = {"default": RECIPE, "tutorial": RECIPE | {"epochs": 10, "clip": 0.1, "alpha": 0.2, "scale": None}}


class TextClassifier(nn.Module):
    """embedding of `words` in `dim` numbers -> mean over the text's words -> fc1 -> ReLU -> fc2: `classes` logits."""

    def __init__(self, words: int, dim: int, classes: int):
        super().__init__()
        self.embedding = nn.EmbeddingBag(words, dim, mode="mean", _weight=torch.zeros(words, dim))
        self.fc1 = nn.Linear(dim, 128)
        self.fc2 = nn.Linear(128, classes)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Logits, float32 (batch, classes), of a `TextDataset.batch`: ids (words,), offsets (batch + 1,)."""
        means = self.embedding(ids, offsets)[:-1]  # the last bag holds the padding
        return self.fc2(torch.relu(self.fc1(means)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this program."""
    add_shared(parser, RECIPE)
    recipe = "tutorial: the published recipe to the letter (default: a better one)"
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="default", help=recipe)
    vectors = "word vectors in GloVe's text format, 100 numbers a word (default: learned from the texts, no labels)"
    parser.add_argument("--vectors", type=Path, metavar="FILE", help=vectors)
    add_steps(parser)


def train(args: argparse.Namespace) -> None:
    """Pre-train, fine-tune, test, and leave everything in `args.output`; `args` as the flags."""
    folder, device = args.output, pick_device(args.device)
    complete(args, RECIPES[args.recipe])
    members = members_of(args)
    settings = runs.settings_of(args, device=device.type, data_sha256=data_digest(args.data, "imdb", "ag_news"))
    with runs.run_folder(folder, settings, args.resume) as unfinished:
        if not unfinished:
            return
        data, words, vectors, news = load_data(args, device)
        if (folder / runs.MODEL).exists():
            model, _, pretrained = load_base(folder)
            model.to(device)
        else:
            model, pretrained = make_base(args, vectors, news)
            write_checkpoint(folder / runs.MODEL, model.state_dict(), pretrained=pretrained, words=words)
        model.fc2 = nn.Linear(model.fc1.out_features, len(LABELS), device=device)
        adapt(model, members, args.impl, ["fc1"], heads=["fc2"])
        # only the fused one reads its rate on the GPU, as a captured step has to
        optimiser = torch.optim.SGD(groups_of(model, members), fused=device.type == "cuda")
        settings["pretrained"] = pretrained
        title = f"{'made-up sample' if args.data == 'sample' else 'IMDb'}, {args.impl}"
        fine_tune(args, settings, model, optimiser, members, data, model.fc1, title)


def load_data(args: argparse.Namespace, device: torch.device) -> tuple[Data, list[str], Tensor, list[Batches]]:
    """The reviews, numbered; the words; the vectors of the vocabulary; and the news, to train on and to test with."""
    began = time.perf_counter()
    folder = locate(args.data, "imdb", "ag_news")
    texts, labels = {}, {}
    for name, classes in (("imdb/train", 2), ("imdb/test", 2), ("ag_news/train", TOPICS), ("ag_news/test", TOPICS)):
        limit = args.train_samples if name.endswith("train") else args.test_samples
        least = 2 if name == "imdb/train" else 1
        lines, labels[name] = read_texts(folder / f"{name}.parquet", classes, limit, least=least)
        texts[name] = [tokenise(line) for line in lines]
    train, valid = random_split(len(labels["imdb/train"]), BASE_SEED)
    reviews = [texts["imdb/train"][i] for i in train.tolist()]
    words = most_frequent([*reviews, *texts["ag_news/train"]], WORDS, LEAST)
    vocabulary = numbered(words)
    sets = {name: TextDataset(texts[name], labels[name], vocabulary) for name in texts}

    corpus, offsets, _ = sets["imdb/train"].batch(train)
    news = sets["ag_news/train"]
    ids = torch.cat([corpus, news.ids])
    if args.vectors is None:
        offsets = torch.cat([offsets.long(), news.offsets[1:] + int(offsets[-1])])
        vectors, source = learned(ids, offsets, len(vocabulary)), "learned from the training texts"
    else:
        vectors, count = read_glove(args.vectors, vocabulary)
        source = f"{args.vectors.name}, {count:,} of {len(vocabulary):,} words"
    if args.scale is not None:
        vectors = weighted(vectors, ids, args.scale)
    sizes = {name: len(labels[name]) for name in sets}
    print(f"{sizes['imdb/train']:,} + {sizes['imdb/test']:,} reviews, {sizes['ag_news/train']:,} news; word vectors "
          f"{source}: {time.perf_counter() - began:.1f} s", flush=True)  # fmt: skip

    def batches(name: str, rows: Tensor | None = None) -> Batches:
        pad_to = GPU_PAD if device.type == "cuda" else 1
        rows = torch.arange(sizes[name]) if rows is None else rows
        return Batches(len(rows), lambda i: sets[name].batch(rows[i], pad_to), args.batch_size, device=device)

    data = Data(folder, batches("imdb/train", train), batches("imdb/train", valid), batches("imdb/test"), len(corpus),
                {"vectors": source, "vocabulary": len(vocabulary)})  # fmt: skip
    return data, words, vectors, [batches("ag_news/train"), batches("ag_news/test")]


def make_base(args: argparse.Namespace, vectors: Tensor, news: list[Batches]) -> tuple[TextClassifier, dict]:
    """The classifier pre-trained on news, and what there is to report of it."""
    torch.manual_seed(BASE_SEED)
    model = TextClassifier(*vectors.shape, TOPICS)
    model.embedding.weight.data.copy_(vectors)
    model.to(news[0].device)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0, fused=news[0].device.type == "cuda")
    settings = Settings(epochs=args.pretrain_epochs, decay=0.5, clip=args.clip)
    trainer = Trainer(model, optimiser, *news, settings)
    print("pre-training on news, with its test part as validation", flush=True)
    trainer.fit()
    accuracy = trainer.members[0].history[-1]["valid_accuracy"]
    print(f"pre-trained on news: {accuracy:.2%} of the test news right, {trainer.seconds:.1f} s", flush=True)
    return model, {"epochs": settings.epochs, "test_accuracy": accuracy, "seconds": round(trainer.seconds, 3)}


def load_base(folder: Path) -> tuple[TextClassifier, dict[str, int], dict]:
    """What `make_base` gave to the run in `folder`, and between the two the vocabulary."""
    tensors, state = read_checkpoint(folder / runs.MODEL)
    vocabulary = numbered(state.get("words", ()))  # a file without them fits no model
    model = TextClassifier(len(vocabulary), DIM, TOPICS)
    fill(model, folder / runs.MODEL, tensors)
    return model, vocabulary, state.get("pretrained")


def load_predictor(run: Path) -> runs.Predictor:
    """What labels reviews by the finished run in a folder; UserError when a file of it is missing or damaged."""
    model, vocabulary, _ = load_base(run)
    model.fc2 = nn.Linear(model.fc1.out_features, len(LABELS))
    fastlora.load_adapter(model, run).eval()

    def logits(texts: list[str]) -> Tensor:
        dataset = TextDataset([tokenise(text) for text in texts], [0] * len(texts), vocabulary)
        return model(*dataset.batch(torch.arange(len(texts)))[:2])

    return runs.predictor(LABELS, logits)
