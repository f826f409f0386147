"""What one line saves: a training step of a BERT classifier with bare layers, with stock PEFT, and with PEFT patched.

    python -m benchmarks.peft_step [--seconds 200] [--rank 8] [--batch 32] [--length 128] [--threads 2]

All arms run one model (random weights, the sizes of MiniLM-L6: 6 layers of width 384) on one batch of 32 x 128 tokens,
in turns, in one process: forward, backward, AdamW. Every arm keeps the gradient with respect to the embeddings' output,
so that the bare model's backward goes as deep as the others'. The figure is the share of stock PEFT's overhead over the
bare model that patching removes, from differences taken round by round. Ends within five minutes on two quiet cores.
"""

import argparse
import copy
import statistics

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import BertConfig, BertForSequenceClassification

import fastlora.peft
from benchmarks.measure import interleave, metadata, summary, write_results

DROPOUTS = (0.1, 0.0)


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write benchmarks/results/<device>/<date>-peft-step.json."""
    args = _arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    taken = metadata(args.device)
    steps = _steps(args)
    samples = interleave(steps, args.seconds, device=args.device, min_rounds=3)
    rows = [{"name": name, **summary(seconds), "seconds": seconds} for name, seconds in samples.items()]
    removed = [_removed(samples, p) for p in DROPOUTS]
    path = write_results(
        "peft-step", {"metadata": taken, "arguments": vars(args), "rows": rows, "removed": removed}, args.output
    )
    print(f"{taken['device_name']}, {torch.get_num_threads()} threads, {args.batch} x {args.length}, r={args.rank}")
    for row in rows:
        print(f"  {row['name']:<12} {1e3 * row['median']:8.1f} ms  ({1e3 * row['p20']:.1f} .. {1e3 * row['p80']:.1f})")
    for row in removed:
        print(
            f"  dropout {row['dropout']}: stock adds {1e3 * row['stock_overhead']:.1f} ms, fused "
            f"{1e3 * row['fused_overhead']:.1f} ms: {100 * row['removed']:.0f} % removed"
        )
    print(path)


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peft_step", description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=200.0, help="time spent on samples (default 200)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--threads", type=int, default=None, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", default=None, help="folder for the JSON (default benchmarks/results/<device>)")
    return parser.parse_args(argv)


def _steps(args: argparse.Namespace) -> dict:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    base = BertForSequenceClassification(config).to(args.device)
    batch = {
        "input_ids": torch.randint(1000, config.vocab_size, (args.batch, args.length), device=args.device),
        "attention_mask": torch.ones(args.batch, args.length, dtype=torch.long, device=args.device),
        "labels": torch.randint(2, (args.batch,), device=args.device),
    }
    steps = {"bare": _step(_bare(base), batch)}
    for p in DROPOUTS:
        steps[f"stock {p}"] = _step(_lora(base, args.rank, p), batch)
        steps[f"fused {p}"] = _step(fastlora.peft.patch(_lora(base, args.rank, p)), batch)
    return steps


def _bare(base: torch.nn.Module) -> torch.nn.Module:
    model = copy.deepcopy(base)
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    return model


def _lora(base: torch.nn.Module, rank: int, p: float) -> torch.nn.Module:
    config = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=rank, lora_alpha=2 * rank, lora_dropout=p, target_modules=["query", "value"]
    )
    return get_peft_model(copy.deepcopy(base), config)


def _step(model: torch.nn.Module, batch: dict):
    model.train()
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _removed(samples: dict[str, list[float]], p: float) -> dict:
    stock, fused = (
        statistics.median(mine - bare for mine, bare in zip(samples[f"{name} {p}"], samples["bare"], strict=True))
        for name in ("stock", "fused")
    )
    return {"dropout": p, "stock_overhead": stock, "fused_overhead": fused, "removed": 1.0 - fused / stock}


if __name__ == "__main__":
    main()
