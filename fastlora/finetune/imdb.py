"""`fastlora train imdb`: sentiment of film reviews. A classifier pre-trained on news, adapted by 456 + 258 numbers."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora
from fastlora.errors import UserError
from fastlora.finetune import run as runs
from fastlora.finetune.checkpoint import fill, read_checkpoint, write_checkpoint
from fastlora.finetune.data import Batches, locate, random_split, read_texts
from fastlora.finetune.options import MOST_RANK, add_steps, chosen, pick_device, step_choices
from fastlora.finetune.run import CHECKPOINT, MODEL, VOCABULARY
from fastlora.finetune.trainer import Settings, Trainer
from fastlora.finetune.words import TextDataset, Vocabulary, learned, read_glove, tokenise, weighted

LABELS, TOPICS = ("negative", "positive"), 4
WORDS, LEAST = 20_000, 3  # vocabulary: how many words, and how often each occurs at least
GPU_PAD = 4096  # words; on a GPU a batch's words are padded to a multiple, so that few shapes occur


@dataclass(frozen=True)
class Recipe:
    """How the classifier is trained.

    Attributes:
        epochs, lr, decay, clip, batch_size: of the fine-tuning by SGD; the rate is multiplied by `decay` each epoch.
        rank, alpha: of the adapter; the update is scaled by alpha / rank.
        pretrain_epochs: passes over the news; their rate is 1, halved each epoch.
        scale: mean norm of the word vectors, which are weighted for averaging; None leaves them as they are.
    """

    epochs: int = 5
    lr: float = 1.0
    decay: float = 0.1
    clip: float = 1.0
    batch_size: int = 64
    rank: int = 2
    alpha: float = 16.0
    pretrain_epochs: int = 3
    scale: float | None = 10.0


RECIPES = {
    "default": Recipe(),
    # As published: rank 2, the update scaled by 0.1, gradients clipped at 0.1, vectors averaged as they are.
    "tutorial": Recipe(epochs=10, clip=0.1, alpha=0.2, scale=None),
}


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
        """Logits, float32 (batch, classes), of a `TextDataset.batch`: ids (words,), offsets (batch + 1,)."""
        means = self.embedding(ids, offsets)[:-1]  # the last bag holds the padding
        return self.fc2(F.relu(self.fc1(means)))

    def body(self) -> dict[str, Tensor]:
        """What pre-training learns for good: all but the head, fc2."""
        return {name: tensor for name, tensor in self.state_dict().items() if not name.startswith("fc2.")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this program alone."""
    recipe = "tutorial: the published recipe to the letter (default: a better one)"
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="default", help=recipe)
    vectors = "word vectors in GloVe's text format, 100 numbers a word (default: learned from the texts, no labels)"
    parser.add_argument("--vectors", type=Path, metavar="FILE", help=vectors)
    add_steps(parser)


def train(args: argparse.Namespace) -> None:
    """Pre-train, fine-tune, test, and leave everything in `args.output`; `args` as the flags."""
    began = time.perf_counter()
    folder, device = args.output, pick_device(args.device)
    recipe, how = chosen(RECIPES[args.recipe], args), step_choices(args)
    settings = {"task": "imdb", "data": args.data, "impl": args.impl, "recipe": args.recipe, **asdict(recipe), **how,
                "seed": args.seed, "device": device.type, "vectors": args.vectors and str(args.vectors),
                "train_samples": args.train_samples, "test_samples": args.test_samples}  # fmt: skip
    with runs.run_folder(folder, settings, args.resume) as begun:
        if begun and runs.finished(folder):
            return
        data = load_data(locate(args.data, "imdb", "ag_news"), args, recipe, device)
        run = runs.fingerprint(settings | {"texts": data.digest})
        model, pretrained = load_base(folder, run, data, device) if begun and (folder / MODEL).exists() else (None, {})
        if model is None:
            model, pretrained = make_base(args.seed, recipe, data, device)
            write_checkpoint(folder / MODEL, {**model.body(), "run": run, "pretrained": pretrained})
        data.vocabulary.save(folder / VOCABULARY)
        adapt(model, recipe, args.impl, args.seed)
        training = Settings(epochs=recipe.epochs, clip=recipe.clip, checkpoint=folder / CHECKPOINT, run=run, **how)
        trainer = make_trainer(model, data.train, data.valid, recipe, training)
        if begun and trainer.resume():
            print(f"resumed after epoch {trainer.epoch}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        history = trainer.fit(_say)
        _, accuracy = trainer.evaluate(data.test)

        fastlora.save_adapter(model, folder, modules_to_save=[])  # fc2 is kept in MODEL: the adapter is A and B alone
        kept = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
        write_checkpoint(folder / MODEL, {**kept, "run": run, "pretrained": pretrained})
        which = "made-up sample" if args.data == "sample" else "IMDb"
        total = round(time.perf_counter() - began, 2)
        runs.leave(folder, history, f"{which}, {args.impl}: {accuracy:.1%} on test", device, {
            "task": "imdb", "impl": args.impl, "path": runs.path_of(args.impl, model.fc1, recipe.batch_size),
            "dataset": args.data if args.data in ("sample", "auto") else str(data.folder), "recipe": args.recipe,
            "vectors": data.vectors_from, "vocabulary": len(data.vocabulary), "pretrained": pretrained,
            "batches": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
            **asdict(recipe), **runs.counts(model), "train_seconds": round(trainer.seconds, 3),
            "tokens_per_second": round(data.words * recipe.epochs / max(trainer.seconds, 1e-9)),
            "valid_accuracy": history[-1]["valid_accuracy"], "test_accuracy": accuracy, "total_seconds": total,
            "seed": args.seed})  # fmt: skip
        print(f"test accuracy {accuracy:.2%} on {data.test.size:,} reviews; trained {trainer.seconds:.1f} s, "
              f"{total:.1f} s in all; everything is in {folder}")  # fmt: skip


@dataclass
class Data:
    """What a run reads: the data's folder, words and batches; `words` counts those of the training reviews."""

    folder: Path
    vocabulary: Vocabulary
    vectors: Tensor
    vectors_from: str
    digest: str
    news: Batches
    news_test: Batches
    train: Batches
    valid: Batches
    test: Batches
    words: int


def load_data(folder: Path, args: argparse.Namespace, recipe: Recipe, device: torch.device) -> Data:
    """Read and number the texts, and find their words' vectors."""
    began = time.perf_counter()
    texts, labels = {}, {}
    for name, classes in (("imdb/train", 2), ("imdb/test", 2), ("ag_news/train", TOPICS), ("ag_news/test", TOPICS)):
        limit = args.train_samples if name.endswith("train") else args.test_samples
        lines, labels[name] = read_texts(folder / f"{name}.parquet", classes, limit)
        texts[name] = [tokenise(line) for line in lines]
    if len(labels["imdb/train"]) < 2:
        raise UserError(f"{folder}/imdb/train.parquet: at least 2 reviews are needed, to train and to validate")
    train, valid = random_split(len(labels["imdb/train"]), args.seed)
    reviews = [texts["imdb/train"][i] for i in train.tolist()]
    vocabulary = Vocabulary.of([*reviews, *texts["ag_news/train"]], WORDS, LEAST)
    sets = {name: TextDataset(texts[name], labels[name], vocabulary) for name in texts}
    digest = hashlib.sha256()
    for dataset in sets.values():
        for part in (dataset.ids, dataset.offsets, dataset.labels):
            digest.update(part.numpy())
    print(f"{len(sets['imdb/train']):,} + {len(sets['imdb/test']):,} reviews, {len(sets['ag_news/train']):,} news, "
          f"{len(vocabulary):,} words: read in {time.perf_counter() - began:.1f} s", flush=True)  # fmt: skip

    began = time.perf_counter()
    corpus, offsets, _ = sets["imdb/train"].batch(train)
    news = sets["ag_news/train"]
    ids = torch.cat([corpus, news.ids])
    if args.vectors is None:
        offsets = torch.cat([offsets.long(), news.offsets[1:] + int(offsets[-1])])
        vectors, source = learned(ids, offsets, len(vocabulary)), "learned from the training texts"
    else:
        vectors, count = read_glove(args.vectors, vocabulary)
        source = f"{args.vectors.name}, {count:,} of {len(vocabulary):,} words"
        digest.update(vectors.numpy())
    if recipe.scale is not None:
        vectors = weighted(vectors, ids, recipe.scale)
    print(f"word vectors: {source}: {time.perf_counter() - began:.1f} s", flush=True)

    def batches(name: str, rows: Tensor | None = None, seed: int | None = None) -> Batches:
        dataset, pad_to = sets[name], GPU_PAD if device.type == "cuda" else 1
        rows = torch.arange(len(dataset)) if rows is None else rows
        return Batches(len(rows), lambda i: dataset.batch(rows[i], pad_to), recipe.batch_size, seed, device=device)

    return Data(
        folder, vocabulary, vectors, source, digest.hexdigest(), news=batches("ag_news/train", seed=args.seed),
        news_test=batches("ag_news/test"), train=batches("imdb/train", train, args.seed),
        valid=batches("imdb/train", valid), test=batches("imdb/test"), words=sets["imdb/train"].words(train),
    )  # fmt: skip


def make_base(seed: int, recipe: Recipe, data: Data, device: torch.device) -> tuple[TextClassifier, dict]:
    """The classifier pre-trained on news, and what there is to report of it."""
    torch.manual_seed(seed)
    model = TextClassifier(data.vectors, TOPICS).to(device)
    recipe = replace(recipe, lr=1.0, decay=0.5)
    settings = Settings(epochs=recipe.pretrain_epochs, clip=recipe.clip, seed=seed)
    trainer = make_trainer(model, data.news, None, recipe, settings)
    trainer.fit()
    _, accuracy = trainer.evaluate(data.news_test)
    print(f"pre-trained on news: {accuracy:.2%} of the test news right, {trainer.seconds:.1f} s", flush=True)
    return model, {
        "epochs": recipe.pretrain_epochs, "test_accuracy": accuracy, "seconds": round(trainer.seconds, 3),
    }  # fmt: skip


def load_base(folder: Path, run: str, data: Data, device: torch.device) -> tuple[TextClassifier, dict]:
    """What `make_base` gave to the run that is gone on with; UserError for a file or data of another run."""
    kept = read_checkpoint(folder / MODEL)
    if kept.get("run") != run or not isinstance(kept.get("pretrained"), dict):
        raise UserError(f"{folder / MODEL}: the data is not what the run was started with, or another version's")
    model = TextClassifier(data.vectors, TOPICS).to(device)
    body = model.body()
    fill(model, folder / MODEL, {name: kept[name] for name in body if name in kept}, set(body))
    return model, kept["pretrained"]


def adapt(model: TextClassifier, recipe: Recipe, impl: str, seed: int) -> None:
    """Give the pre-trained model a new head and a LoRA layer, and freeze the rest."""
    torch.manual_seed(seed + 1)
    model.fc2 = nn.Linear(model.fc1.out_features, len(LABELS), device=model.fc2.weight.device)
    fastlora.inject(model, r=recipe.rank, lora_alpha=recipe.alpha, target_modules=["fc1"],
                    layer_class=runs.LAYERS[impl])  # fmt: skip
    model.fc2.requires_grad_(True)


def make_trainer(model, train: Batches, valid: Batches | None, recipe: Recipe, settings: Settings, **more) -> Trainer:
    """SGD whose rate decays each epoch, on what `model` trains."""
    trained = [p for p in model.parameters() if p.requires_grad]
    # Only the fused SGD reads its rate on the GPU, as a captured step has to.
    optimiser = torch.optim.SGD(trained, lr=recipe.lr, fused=trained[0].is_cuda)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimiser, recipe.decay)
    return Trainer(model, optimiser, train, valid, settings, scheduler, **more)


def load_predictor(run: Path) -> Callable[[list[str]], list[tuple[str, float]]]:
    """A function that labels reviews, (label, probability) each, from a finished run's folder.

    Raises UserError when a file is missing or damaged, or the adapter is of another rank or shape.
    """
    report = runs.read_report(run)
    vocabulary = Vocabulary.load(run / VOCABULARY)
    tensors = {name: t for name, t in read_checkpoint(run / MODEL).items() if isinstance(t, Tensor)}
    vectors, head = tensors.get("embedding.weight"), tensors.get("fc2.weight")
    if any(t is None or t.ndim != 2 or not t.numel() for t in (vectors, head)) or len(vectors) != len(vocabulary):
        raise UserError(f"{run / MODEL}: not the model of a finished IMDb run of {len(vocabulary)} words")
    model = TextClassifier(torch.zeros(vectors.shape), len(LABELS), hidden=head.shape[1])
    fill(model, run / MODEL, tensors)
    fastlora.inject(model, r=runs.number_in(run, report, "rank", MOST_RANK), target_modules=["fc1"])
    fastlora.load_adapter(model, run)
    model.eval()

    @torch.inference_mode()
    def predict(texts: list[str]) -> list[tuple[str, float]]:
        dataset = TextDataset([tokenise(text) for text in texts], [0] * len(texts), vocabulary)
        ids, offsets, _ = dataset.batch(torch.arange(len(texts)))
        chances, classes = model(ids, offsets).softmax(-1).max(-1)
        return [(LABELS[c], float(p)) for c, p in zip(classes.tolist(), chances.tolist(), strict=True)]

    return predict


def _say(row: dict) -> None:
    from tqdm import tqdm

    tqdm.write(f"epoch {row['epoch']:g}: loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}; "
               f"validation loss {row['valid_loss']:.4f}, accuracy {row['valid_accuracy']:.2%}")  # fmt: skip
