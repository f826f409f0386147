"""A small Llama trained with LoRA, DoRA, QLoRA (NF4, double quantisation) and both: stock PEFT's and patched.

    python -m benchmarks.llama_step [--rounds 15] [--hidden 512] [--layers 2] [--tokens 512] [--dtype bfloat16]

Both models of a case start from the same numbers and take the same steps in turns (AdamW, one batch), so that their
losses can be compared as well as their times, which are of forward and backward. The losses of a third, in float32,
say how far bfloat16's noise goes.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings

import torch

from benchmarks.measure import metadata, ratio, summary, write_results

CASES = ("LoRA", "DoRA", "QLoRA", "QLoRA, DoRA")


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write benchmarks/results/<device>/<date>-llama-step.json."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.llama_step", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--output", default=None, help="folder for the JSON (default benchmarks/results/<device>)")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    payload = {"kind": "llama-step", "metadata": metadata("cpu"), "arguments": vars(args), "cases": []}
    for case in CASES:
        payload["cases"].append(measure(case, args))
        print(line(payload["cases"][-1]), flush=True)
    print(write_results("llama-step", payload, args.output))


def measure(case: str, args: argparse.Namespace) -> dict:
    """Times and losses of one case, both models in turns."""
    import fastlora.peft

    stock = model_of(case, args, getattr(torch, args.dtype))
    models = {"peft": stock, "fastlora": fastlora.peft.patch(copy.deepcopy(stock))}
    steps = {name: training(model, args.tokens) for name, model in models.items()}
    losses, times = {name: [] for name in models}, {name: [] for name in models}
    for number in range(args.rounds + 2):
        for name, step in steps.items():
            loss, seconds = step()
            losses[name].append(loss)
            if number >= 2:
                times[name].append(seconds)
    report = fastlora.peft.report(models["fastlora"])
    del models, stock, steps
    step = training(model_of(case, args, torch.float32), args.tokens)
    losses["float32"] = [step()[0] for _ in range(args.rounds + 2)]
    return {
        "case": case,
        **{name: summary(seconds) for name, seconds in times.items()},
        "peft_over_fastlora": ratio(times["peft"], times["fastlora"]),
        "losses": losses,
        "apart": apart(losses["fastlora"], losses["peft"]),
        "stock_from_float32": apart(losses["peft"], losses["float32"]),
        "fused_calls": report.fused_calls,
        "fallback_calls": report.fallback_calls,
    }


def model_of(case: str, args: argparse.Namespace, dtype: torch.dtype):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": args.hidden, "intermediate_size": args.hidden * 11 // 4 // 64 * 64}
    sizes |= {"num_hidden_layers": args.layers, "num_attention_heads": args.hidden // 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=args.tokens, **sizes))
    model = model.bfloat16().to(dtype)  # the same weights, and so the same 4 bits, in each dtype
    if "QLoRA" in case:
        quantise(model, dtype)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora="DoRA" in case)
    model = get_peft_model(model, config, low_cpu_mem_usage=False)
    model.enable_input_require_grads()
    return model.train()


def quantise(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Every linear layer of `model` but its head in NF4 with double quantisation, as transformers would load it."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            shape = (module.in_features, module.out_features, module.bias is not None)
            packed = bitsandbytes.nn.Linear4bit(*shape, dtype, True, "nf4").to(dtype)
            packed.load_state_dict(module.state_dict())
            model.set_submodule(name, packed.to("cpu"))
    model.is_loaded_in_4bit = True


def training(model: torch.nn.Module, tokens: int):
    """A function that takes one step: (its loss, seconds of forward and backward)."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-3)
    ids = torch.randint(0, 256, (2, tokens // 2), generator=torch.Generator().manual_seed(1))

    def step() -> tuple[float, float]:
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        seconds = time.perf_counter() - start
        optimizer.step()
        optimizer.zero_grad()
        return loss.item(), seconds

    return step


def apart(losses: list[float], others: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


def line(found: dict) -> str:
    """One case in words."""
    peft, ours, gain = (found[name]["median"] for name in ("peft", "fastlora", "peft_over_fastlora"))
    return (
        f"{found['case']:<12} PEFT {peft * 1e3:8.1f} ms   fastlora {ours * 1e3:8.1f} ms   {gain:.2f}x   "
        f"losses apart {found['apart']:.2g} (PEFT's from float32's {found['stock_from_float32']:.2g})   "
        f"{found['fused_calls']} fused calls, {found['fallback_calls']} by PEFT"
    )


if __name__ == "__main__":
    main()
