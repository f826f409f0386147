"""What the fused layer saves in whole training steps and whole runs: the IMDb classifier and GPT-2 on SMS messages.

    python -m benchmarks.steps [--seconds 390] [--only imdb] [--data DIR] [--device cpu] [--precision float32]

Three arms take the same steps of this package's trainer in turns, in one process: `bare` has frozen linear layers
without adapters (its head is trained), `eager` the LoRA layer as one would write it, `fused` this package's. In GPT-2
every arm keeps the gradient with respect to the embeddings, so that bare's backward pass goes as deep as the others'.
On a GPU `fused` replays a captured step, as the programs do; so does a fourth arm, `eager graph`, with eager's layer.
`removed` is the share of eager's time over bare that fused does not take, from differences within a round. Whole runs
start from the same base and end in the same accuracy: five epochs of IMDb, one of spam with the nano model.
Ends within eight minutes on two quiet cores.
"""

import argparse
import copy
import itertools
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

import fastlora
from benchmarks.measure import interleave, metadata, ratio, summary, write_results
from fastlora.finetune import gpt2, imdb, options, spam
from fastlora.finetune.step import Settings, Step
from fastlora.finetune.trainer import Trainer
from fastlora.finetune.tune import LAYERS

ARMS = ("bare", "eager", "fused")
GRAPH = "eager graph"  # on a GPU the programs replay a captured step: what eager gains by that alone
SHARES = {"gpt2": 0.45, "imdb": 0.12, "imdb runs": 0.18, "spam runs": 0.25}
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write benchmarks/results/<device>/<date>-steps.json."""
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    taken, device = metadata(args.device), torch.device(args.device)
    parts = {"gpt2": _gpt2_steps, "imdb": _imdb, "spam": _spam_runs}
    asked = args.only or list(parts)
    args.seconds /= sum(share for name, share in SHARES.items() if name.split()[0] in asked)
    rows = []
    for measured in itertools.chain.from_iterable(parts[name](args, device) for name in asked):
        rows.append(measured)
        print(_line(measured), flush=True)
        # after each: an interrupted run leaves something
        path = write_results("steps", {"metadata": taken, "arguments": vars(args), "rows": rows}, args.output)
    print(path)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.steps", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=390.0, help="time spent on samples (default 390)")
    parser.add_argument("--only", action="append", choices=("gpt2", "imdb", "spam"), help="repeatable (default: all)")
    parser.add_argument("--data", default=str(DATA) if DATA.is_dir() else "sample", help="as for fastlora train")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=tuple(options.PRECISIONS.values()), default="float32")
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--output", default=None, help="folder for the JSON (default benchmarks/results/<device>)")
    return parser.parse_args(argv)


def _gpt2_steps(args: argparse.Namespace, device: torch.device):
    """Steps of the 124M model, random weights, on 8 messages of 120 tokens."""
    torch.manual_seed(0)
    base = gpt2.GPT2(gpt2.CONFIGS["gpt2"]).to(device)
    base.blocks[0].register_forward_pre_hook(lambda _, inputs: (inputs[0].detach().requires_grad_(),))
    batches = [(torch.randint(50257, (8, 120), device=device), torch.randint(2, (8,), device=device)) for _ in range(4)]
    yield _measure("gpt2 124M, 8 x 120 tokens", _spam_arms(base, device, args), batches, args, SHARES["gpt2"])


def _spam_arms(base: gpt2.GPT2, device: torch.device, args: argparse.Namespace) -> dict:
    def optimiser(trained):
        return torch.optim.AdamW(trained, lr=8e-4, weight_decay=0.1, fused=True)

    def adapted(model, layer):
        fastlora.inject(model, r=16, lora_alpha=16, target_modules="all-linear", layer_class=layer)

    return {
        name: _arm(name, base, adapted, "head", optimiser, Settings(precision=args.precision)) for name in _arms(device)
    }


def _arms(device: torch.device) -> tuple[str, ...]:
    return (*ARMS, GRAPH) if device.type == "cuda" else ARMS


def _arm(name: str, base: nn.Module, adapted, head: str, optimiser, settings: Settings):
    """A function that makes (model, optimiser, settings) anew, sharing the frozen weights of `base`."""

    def make():
        model = copy.deepcopy(base, memo={id(p): p for n, p in base.named_parameters() if not n.startswith(head)})
        model.requires_grad_(False)
        if name == "bare":
            getattr(model, head).requires_grad_(True)
        else:
            torch.manual_seed(1)
            adapted(model, LAYERS["eager" if name == GRAPH else name])
        graph = name in ("fused", GRAPH) and next(model.parameters()).is_cuda
        how = Settings(settings.clip, settings.precision, graph)
        return model, optimiser([p for p in model.parameters() if p.requires_grad]), how

    return make


def _measure(what: str, arms: dict, batches: list, args: argparse.Namespace, share: float) -> dict:
    """Time the arms' steps in turns; and the losses of five steps of eager and of fused, from the same start."""
    losses = {}
    for name in ("eager", "fused"):
        step = Step(*arms[name]())
        first = itertools.islice(itertools.cycle(batches), 5)
        losses[name] = [step([batch])[0, 0].item() / len(batch[-1]) for batch in first]
    steps = {name: _stepping(Step(*arms[name]()), itertools.cycle(batches)) for name in arms}
    samples = interleave(steps, args.seconds * share, device=args.device, min_rounds=5)
    return {"what": what, "kind": "step", "losses": losses, "same_loss": _close(losses), **_compared(samples)}


def _stepping(step: Step, batches):
    return lambda: step([next(batches)])


def _compared(samples: dict[str, list[float]]) -> dict:
    found = {"seconds": samples, **{name: summary(samples[name]) for name in samples}}
    found["fused_over_eager"] = ratio(samples["fused"], samples["eager"])
    if "bare" in samples:
        over = {name: [a - b for a, b in zip(samples[name], samples["bare"], strict=True)] for name in samples}
        medians = {name: summary(over[name])["median"] for name in ("eager", "fused")}
        found |= {"overhead": medians, "removed": 1 - medians["fused"] / medians["eager"] if medians["eager"] else None}
    return found


def _close(losses: dict[str, list[float]], runs: bool = False) -> bool:
    """After five steps to 1e-3. Whole runs to 5e-3: at a learning rate of 1 eager itself moves by 6e-4 in five epochs
    of IMDb when lora_A starts one part in four million larger."""
    allowed = 5e-3 if runs else 1e-3
    return all(abs(a - b) <= allowed * abs(a) + 1e-4 for a, b in zip(losses["eager"], losses["fused"], strict=True))


def _imdb(args: argparse.Namespace, device: torch.device):
    """Steps and whole fine-tuning runs of the IMDb classifier, from one pre-trained base."""
    with tempfile.TemporaryDirectory() as folder:
        given = _program_arguments(imdb, args, folder)
        options.complete(given, imdb.RECIPE)
        data, _, vectors, news = imdb.load_data(given, device)
        base, _ = imdb.make_base(given, vectors, news)
    base.fc2 = nn.Linear(base.fc1.out_features, len(imdb.LABELS), device=device)

    def optimiser(trained):
        return torch.optim.SGD(trained, lr=given.lr, fused=device.type == "cuda")

    def adapted(model, layer):
        fastlora.inject(model, r=given.rank, lora_alpha=given.alpha, target_modules=["fc1"], layer_class=layer)
        model.fc2.requires_grad_(True)

    settings = Settings(given.clip, args.precision)
    arms = {name: _arm(name, base, adapted, "fc2", optimiser, settings) for name in _arms(device)}
    yield _measure(
        "imdb, 64 reviews", arms, [data.train.at(0, i) for i in range(min(64, len(data.train)))], args, SHARES["imdb"]
    )

    parts = (data.train, data.valid, data.test)
    yield _runs(f"imdb, {given.epochs} epochs", arms, parts, given.epochs, given.decay, args, SHARES["imdb runs"])


def _spam_runs(args: argparse.Namespace, device: torch.device):
    """Whole epochs of spam with the nano model, evaluation included."""
    given = _program_arguments(spam, args, "unused")
    options.complete(given, spam.RECIPE)
    data = spam.load_data(given, device)
    torch.manual_seed(0)
    arms = _spam_arms(gpt2.GPT2(gpt2.CONFIGS["nano"]).to(device), device, args)
    yield _runs("spam nano, 1 epoch", arms, (data.train, data.valid, data.test), 1, 1.0, args, SHARES["spam runs"])


def _program_arguments(program, args: argparse.Namespace, folder: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    program.add_arguments(parser)
    return parser.parse_args(["--data", args.data, "--device", args.device, "--output", folder])


def _runs(
    what: str, arms: dict, parts: tuple, epochs: int, decay: float, args: argparse.Namespace, share: float
) -> dict:
    """Whole runs of each arm but `bare`, in turns: at least two, and before them one in which a GPU's kernels are
    compiled and timed, once per machine."""
    end = time.perf_counter() + args.seconds * share
    train, valid, test = parts
    samples: dict[str, list[float]] = {name: [] for name in arms if name != "bare"}
    first: dict[str, float] = {}
    losses: dict[str, list[float]] = {}
    accuracy: dict[str, float] = {}
    while len(samples["fused"]) < 2 or time.perf_counter() < end:
        for name in sorted(samples, reverse=len(samples["fused"]) % 2 == 1):
            model, optimiser, how = arms[name]()
            torch.manual_seed(2)
            settings = Settings(how.clip, how.precision, how.graph, epochs=epochs, decay=decay)
            trainer = Trainer(model, optimiser, train, valid, settings, progress=False)
            began = time.perf_counter()
            trainer.fit()
            seconds = time.perf_counter() - began
            if args.device != "cpu" and name not in first:
                first[name] = seconds
            else:
                samples[name].append(seconds)
            losses[name] = [row["train_loss"] for row in trainer.members[0].history]
            if name not in accuracy:
                accuracy[name] = trainer.evaluate(test)[0][2]
    return {
        "what": what,
        "kind": "run",
        "losses": losses,
        "same_loss": _close(losses, runs=True),
        "test_accuracy": accuracy,
        "first": first,
        **_compared(samples),
    }


def _line(row: dict) -> str:
    unit = 1.0 if row["kind"] == "run" else 1e3
    times = ", ".join(f"{name} {unit * row[name]['median']:.2f}" for name in (*ARMS, GRAPH) if name in row)
    text = f"{row['what']}: {times} {'s' if unit == 1 else 'ms'}; fused/eager {row['fused_over_eager']['median']:.3f}"
    if row.get("removed") is not None:
        text += f"; {100 * row['removed']:.0f} % of eager's overhead removed"
    if row.get("first"):
        text += "; the first time " + ", ".join(f"{name} {row['first'][name]:.2f}" for name in row["first"])
    return f"{text}; {'same loss' if row['same_loss'] else 'THE LOSSES DIFFER'}"


if __name__ == "__main__":
    main()
