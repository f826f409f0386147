"""`fastlora train imdb`: sentiment of film reviews. A classifier pre-trained on news, adapted by 456 + 258 numbers."""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

import fastlora
from fastlora.errors import UserError
from fastlora.finetune import report as reports
from fastlora.finetune.batches import Batches
from fastlora.finetune.checkpoint import fill, read_checkpoint, write_checkpoint
from fastlora.finetune.data import TextDataset, collate_batch, random_split, read_texts
from fastlora.finetune.files import CHECKPOINT, REPORT, fingerprint, run_folder
from fastlora.finetune.locate import locate
from fastlora.finetune.options import add_steps, pick_device, step_choices
from fastlora.finetune.plots import plot_history
from fastlora.finetune.recipe import MOST_RANK, chosen
from fastlora.finetune.text_classifier import TextClassifier
from fastlora.finetune.trainer import Plan, Trainer
from fastlora.finetune.vectors import learned, read_glove, weighted
from fastlora.finetune.vocabulary import Vocabulary, tokenise

HELP = "sentiment of film reviews: mean of word vectors, two linear layers; pre-trained on news topics"
LABELS, TOPICS = ("negative", "positive"), 4
WORDS, LEAST = 20_000, 3  # vocabulary: how many words, and how often each occurs at least
MODEL, VOCABULARY = "model.safetensors", "vocabulary.json"
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of this program alone."""
    parser.add_argument("--recipe", choices=tuple(RECIPES), default="default",
                        help="tutorial: the published recipe to the letter (default: a better one)")
    parser.add_argument("--vectors", type=Path, metavar="FILE",
                        help="word vectors in GloVe's text format, 100 numbers a word (default: learned from the "
                             "training texts, without their labels)")
    add_steps(parser)


def train(args: argparse.Namespace) -> None:
    """Pre-train, fine-tune, test, and leave everything in `args.output`; `args` as the flags."""
    began = time.perf_counter()
    device = pick_device(args.device)
    recipe, how = chosen(RECIPES[args.recipe], args), step_choices(args)
    settings = {"task": "imdb", "data": args.data, "impl": args.impl, "recipe": args.recipe, **asdict(recipe), **how,
                "seed": args.seed, "device": device.type, "vectors": args.vectors and str(args.vectors),
                "train_samples": args.train_samples, "test_samples": args.test_samples}
    with run_folder(args.output, settings, args.resume) as begun:
        if begun and (args.output / REPORT).exists():
            print(f"{args.output}: the run is finished already")
            return
        data = _load(locate(args.data, "imdb", "ag_news"), args, recipe, device)
        run = fingerprint(settings)
        model, pretrained = _base(args, recipe, data, device, begun, run)
        torch.manual_seed(args.seed + 1)
        model.new_head(len(LABELS))
        fastlora.inject(model, r=recipe.rank, lora_alpha=recipe.alpha, target_modules=["fc1"],
                        layer_class=reports.LAYERS[args.impl])
        model.fc2.requires_grad_(True)
        trainer = _trainer(model, data.train, data.valid, recipe, device,
                           Plan(recipe.epochs, clip=recipe.clip, checkpoint=args.output / CHECKPOINT, run=run, **how))
        if begun and trainer.resume():
            print(f"resumed after epoch {trainer.epoch}")
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        history = trainer.fit(_say)
        _, accuracy = trainer.evaluate(data.test)
        _leave(args, recipe, data, model, trainer, device, {
            "valid_accuracy": history[-1]["valid_accuracy"], "test_accuracy": accuracy, "pretrained": pretrained,
            "total_seconds": round(time.perf_counter() - began, 2)})


@dataclass
class _Data:
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
    words: int  # in the training reviews


def _load(folder: Path, args: argparse.Namespace, recipe: Recipe, device: torch.device) -> _Data:
    began = time.perf_counter()
    texts, labels = {}, {}
    for name, classes, limit in (("imdb/train", 2, args.train_samples), ("imdb/test", 2, args.test_samples),
                                 ("ag_news/train", TOPICS, args.train_samples),
                                 ("ag_news/test", TOPICS, args.test_samples)):
        lines, labels[name] = read_texts(folder / f"{name}.parquet", classes, limit)
        texts[name] = [tokenise(line) for line in lines]
    if len(labels["imdb/train"]) < 2:
        raise UserError(f"{folder}/imdb/train.parquet: at least 2 reviews are needed, to train and to validate")
    train, valid = random_split(len(labels["imdb/train"]), args.seed)
    reviews = [texts["imdb/train"][i] for i in train.tolist()]
    vocabulary = Vocabulary.of([*reviews, *texts["ag_news/train"]], WORDS, LEAST)
    sets = {name: TextDataset(texts[name], labels[name], vocabulary) for name in texts}
    digest = hashlib.sha256()
    for name in sets:
        for part in (sets[name].ids, sets[name].offsets, sets[name].labels):
            digest.update(part.numpy())
    sizes = [len(labels[name]) for name in ("imdb/train", "imdb/test", "ag_news/train")]
    print(f"{sizes[0]:,} + {sizes[1]:,} reviews, {sizes[2]:,} news, {len(vocabulary):,} words: "
          f"read in {time.perf_counter() - began:.1f} s", flush=True)

    began = time.perf_counter()
    corpus, offsets, _ = sets["imdb/train"].batch(train)
    ids = torch.cat([corpus, sets["ag_news/train"].ids])
    if args.vectors is None:
        offsets = torch.cat([offsets.long(), sets["ag_news/train"].offsets[1:] + int(offsets[-1])])
        vectors, source = learned(ids, offsets, len(vocabulary)), "learned from the training texts"
    else:
        vectors, count = read_glove(args.vectors, vocabulary)
        source = f"{args.vectors.name}, {count:,} of {len(vocabulary):,} words"
        digest.update(vectors.numpy())
    if recipe.scale is not None:
        vectors = weighted(vectors, ids, recipe.scale)
    print(f"word vectors: {source}: {time.perf_counter() - began:.1f} s", flush=True)

    def batches(name: str, rows: Tensor, seed: int | None = None) -> Batches:
        pad_to = GPU_PAD if device.type == "cuda" else 1
        dataset = sets[name]
        return Batches(len(rows), lambda i: dataset.batch(rows[i], pad_to), recipe.batch_size, seed, device=device)

    return _Data(
        folder, vocabulary, vectors, source, digest.hexdigest(),
        news=batches("ag_news/train", torch.arange(len(sets["ag_news/train"])), args.seed),
        news_test=batches("ag_news/test", torch.arange(len(sets["ag_news/test"]))),
        train=batches("imdb/train", train, args.seed), valid=batches("imdb/train", valid),
        test=batches("imdb/test", torch.arange(len(sets["imdb/test"]))), words=sets["imdb/train"].words(train),
    )


def _base(args, recipe: Recipe, data: _Data, device, begun: bool, run: str) -> tuple[TextClassifier, dict]:
    """The classifier pre-trained on news, and what there is to report of it; read back when a run is resumed."""
    path = args.output / MODEL
    torch.manual_seed(args.seed)
    model = TextClassifier(data.vectors, TOPICS).to(device)
    if begun and path.exists():
        tensors, state = read_checkpoint(path)
        if state.get("data") != data.digest:
            raise UserError(f"{args.output}: the data is not what the run was started with")
        if state.get("run") != run or not isinstance(state.get("pretrained"), dict):
            raise UserError(f"{path}: not of this run, or of another version of fastlora")
        fill(model, path, _without_head(tensors), _without_head(model.state_dict()))
        data.vocabulary.save(args.output / VOCABULARY)  # should it have gone or changed since
        return model, state["pretrained"]
    pretrain = replace(recipe, lr=1.0, decay=0.5)
    trainer = _trainer(model, data.news, None, pretrain, device, Plan(recipe.pretrain_epochs, clip=recipe.clip))
    trainer.fit()
    _, accuracy = trainer.evaluate(data.news_test)
    print(f"pre-trained on news: {accuracy:.2%} of the test news right, {trainer.seconds:.1f} s", flush=True)
    pretrained = {"epochs": recipe.pretrain_epochs, "test_accuracy": accuracy, "seconds": round(trainer.seconds, 3)}
    data.vocabulary.save(args.output / VOCABULARY)
    write_checkpoint(path, _without_head(model.state_dict()),
                     {"data": data.digest, "run": run, "pretrained": pretrained})
    return model, pretrained


def _without_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("fc2.")}


def _trainer(model, train: Batches, valid: Batches | None, recipe: Recipe, device, plan: Plan) -> Trainer:
    trained = [p for p in model.parameters() if p.requires_grad]
    # Only the fused SGD reads its rate on the GPU, as a captured step has to.
    optimiser = torch.optim.SGD(trained, lr=recipe.lr, fused=device.type == "cuda")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimiser, recipe.decay)
    return Trainer(model, optimiser, train, valid, plan, device, scheduler)


def _leave(args, recipe: Recipe, data: _Data, model: TextClassifier, trainer: Trainer, device, results: dict) -> None:
    """Write everything that the finished run leaves; the report last, since it says that the run is finished."""
    folder = args.output
    counts = reports.parameters(model)
    fastlora.save_adapter(model, folder, modules_to_save=[])  # fc2 is kept in MODEL: the adapter holds A and B alone
    kept = {name: tensor for name, tensor in model.state_dict().items() if "lora_" not in name}
    write_checkpoint(folder / MODEL, kept,
                     {"data": data.digest, "run": trainer.plan.run, "pretrained": results["pretrained"]})
    reports.write_history(folder, trainer.history)
    which = "made-up sample" if args.data == "sample" else "IMDb"
    title = f"{which}, {args.impl}: {results['test_accuracy']:.1%} on test"
    plot_history(folder / "curves.png", trainer.history, title)
    size = (folder / "adapter_model.safetensors").stat().st_size
    path = "eager"
    if args.impl == "fused":
        path = fastlora.explain(model.fc1, torch.zeros(recipe.batch_size, model.fc1.in_features, device=device)).path
    reports.write_report(folder, {
        "task": "imdb", "impl": args.impl, "path": path, "device": reports.device_name(device),
        "dataset": args.data if args.data in ("sample", "auto") else str(data.folder), "recipe": args.recipe,
        "vectors": data.vectors_from, "vocabulary": len(data.vocabulary),
        "batches": {"train": len(data.train), "valid": len(data.valid), "test": len(data.test)},
        **asdict(recipe), **counts, "adapter_bytes": size, "train_seconds": round(trainer.seconds, 3),
        "tokens_per_second": round(data.words * recipe.epochs / max(trainer.seconds, 1e-9)),
        "peak_memory_bytes": reports.peak_memory(device), **results, "seed": args.seed,
        "versions": reports.versions()})
    print(reports.saving(counts, size))
    print(f"test accuracy {results['test_accuracy']:.2%} on {data.test.size:,} reviews; trained "
          f"{trainer.seconds:.1f} s, {results['total_seconds']:.1f} s in all; everything is in {folder}")


def load_predictor(run: Path) -> Callable[[list[str]], list[tuple[str, float]]]:
    """A function that labels reviews, (label, probability) each, from a finished run's folder.

    Raises UserError when a file is missing or damaged, or the adapter is of another rank or shape.
    """
    report = reports.read_report(run)
    vocabulary = Vocabulary.load(run / VOCABULARY)
    tensors, _ = read_checkpoint(run / MODEL)
    vectors, head = tensors.get("embedding.weight"), tensors.get("fc2.weight")
    if any(t is None or t.ndim != 2 or t.dtype != torch.float32 or not t.numel() for t in (vectors, head)):
        raise UserError(f"{run / MODEL}: not the model of a finished IMDb run")
    if len(vectors) != len(vocabulary):
        raise UserError(f"{run}: {MODEL} has {len(vectors)} words and {VOCABULARY} {len(vocabulary)}")
    model = TextClassifier(vectors, len(LABELS), hidden=head.shape[1])
    fill(model, run / MODEL, tensors)
    rank = reports.count_in(run, report, "rank", MOST_RANK)
    fastlora.inject(model, r=rank, target_modules=["fc1"])
    fastlora.load_adapter(model, run)
    model.eval()

    @torch.inference_mode()
    def predict(texts: list[str]) -> list[tuple[str, float]]:
        ids, offsets, _ = collate_batch([(0, torch.from_numpy(vocabulary.encode(tokenise(text)))) for text in texts])
        chances, classes = model(ids, offsets).softmax(-1).max(-1)
        return [(LABELS[c], float(p)) for c, p in zip(classes.tolist(), chances.tolist(), strict=True)]

    return predict


def _say(row: dict) -> None:
    from tqdm import tqdm

    tqdm.write(f"epoch {row['epoch']:g}: loss {row['train_loss']:.4f}, accuracy {row['train_accuracy']:.2%}; "
               f"validation loss {row['valid_loss']:.4f}, accuracy {row['valid_accuracy']:.2%}")
