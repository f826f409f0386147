"""QLoRA and DoRA: PEFT's own layers and the same ones patched, interleaved, in one run.

    python -m benchmarks.variants [--rounds 15] [--out benchmarks/results/variants.json]

First a small Llama: both models of a case start from the same numbers and take the same steps (AdamW, the same batch),
so that their losses can be compared as well as their times. Then one layer, DoRA over plain LoRA. Times are of forward
and backward, medians with the 20th and 80th percentile.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
import warnings
from pathlib import Path

import torch

CASES = ("LoRA", "DoRA", "QLoRA (NF4, double quantisation)", "QLoRA with DoRA")


def model_of(case: str, hidden: int, layers: int, dtype: torch.dtype):
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": hidden * 11 // 4 // 64 * 64, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=256, num_attention_heads=hidden // 64, max_position_embeddings=512, **sizes)
    model = LlamaForCausalLM(config).to(dtype)
    if "QLoRA" in case:
        quantise(model, dtype)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", use_dora="DoRA" in case)
    model = get_peft_model(model, config, low_cpu_mem_usage=False)
    model.enable_input_require_grads()
    return model.train()


def quantise(model, dtype: torch.dtype) -> None:
    """Every linear layer of `model` but its head in NF4 with double quantisation, as transformers would load it."""
    import bitsandbytes

    for name, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and name != "lm_head":
            shape = (module.in_features, module.out_features, module.bias is not None)
            packed = bitsandbytes.nn.Linear4bit(*shape, dtype, True, "nf4")
            packed.load_state_dict(module.state_dict())
            model.set_submodule(name, packed.to("cpu"))
    model.is_loaded_in_4bit = True


def measure(case: str, rounds: int, hidden: int, layers: int, tokens: int, dtype: torch.dtype) -> dict:
    import fastlora.peft

    stock = model_of(case, hidden, layers, dtype)
    models = {"peft": stock, "fastlora": fastlora.peft.patch(copy.deepcopy(stock))}
    ids = torch.randint(0, 256, (2, tokens // 2), generator=torch.Generator().manual_seed(1))
    steps = {
        name: torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-3) for name, m in models.items()
    }
    losses, times = {name: [] for name in models}, {name: [] for name in models}
    for number in range(rounds + 2):
        for name, model in models.items():
            start = time.perf_counter()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            if number >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
            losses[name].append(loss.item())
            steps[name].step()
            steps[name].zero_grad()
    report = fastlora.peft.report(models["fastlora"])
    return {
        "case": case,
        **spread(times),
        "losses": losses,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses["peft"], losses["fastlora"], strict=True)),
        "fused_calls": report.fused_calls,
        "fallback_calls": report.fallback_calls,
    }


def spread(times: dict[str, list[float]]) -> dict:
    return {
        "ms": {name: statistics.median(t) for name, t in times.items()},
        "ms_20_80": {name: [sorted(t)[len(t) // 5], sorted(t)[-1 - len(t) // 5]] for name, t in times.items()},
    }


def measure_layer(M: int, K: int, N: int, dtype: torch.dtype, rounds: int) -> dict:
    """Plain LoRA and DoRA, PEFT's and patched, on one linear layer."""
    from peft import LoraConfig, get_peft_model

    import fastlora.peft

    layers = {}
    for use_dora, name in ((False, "LoRA"), (True, "DoRA")):
        config = LoraConfig(r=16, lora_alpha=32, target_modules=["0"], use_dora=use_dora)
        stock = get_peft_model(torch.nn.Sequential(torch.nn.Linear(K, N, bias=False, dtype=dtype)), config).train()
        layers |= {f"PEFT {name}": stock, f"fastlora {name}": fastlora.peft.patch(copy.deepcopy(stock))}
    x, dy = torch.randn(M, K, dtype=dtype).requires_grad_(), torch.randn(M, N, dtype=dtype)
    times = {name: [] for name in layers}
    for number in range(rounds + 2):
        for name, layer in layers.items():
            start = time.perf_counter()
            layer(x).backward(dy)
            if number >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {"case": f"layer {M}x{K}x{N} {dtype}", **spread(times)}


def main() -> None:
    import bitsandbytes
    import peft

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    sizes = (options.hidden, options.layers, options.tokens, getattr(torch, options.dtype))
    cases = []
    for case in CASES:
        found = measure(case, options.rounds, *sizes)
        cases.append(found)
        ours, theirs = found["ms"]["fastlora"], found["ms"]["peft"]
        print(
            f"{case:<34} PEFT {theirs:8.1f} ms   fastlora {ours:8.1f} ms   {theirs / ours:.2f}x"
            f"   losses apart {found['largest_loss_difference']:.2g}   fallbacks {found['fallback_calls']}",
            flush=True,
        )
    for M, K, N in ((512, 1024, 1024), (512, 1024, 4096), (1024, 2048, 2048)):
        for dtype in (torch.bfloat16, torch.float32):
            found = measure_layer(M, K, N, dtype, options.rounds)
            cases.append(found)
            ms = found["ms"]
            print(
                f"{found['case']:<34} DoRA over LoRA: PEFT {ms['PEFT DoRA'] / ms['PEFT LoRA']:.2f}"
                f"   fastlora {ms['fastlora DoRA'] / ms['fastlora LoRA']:.2f}"
                f"   PEFT's DoRA over fastlora's {ms['PEFT DoRA'] / ms['fastlora DoRA']:.2f}",
                flush=True,
            )
    if options.out:
        versions = {"torch": torch.__version__, "peft": peft.__version__, "bitsandbytes": bitsandbytes.__version__}
        versions |= {"python": platform.python_version(), "threads": torch.get_num_threads()}
        settings = {key: str(value) for key, value in vars(options).items() if key != "out"}
        options.out.write_text(
            json.dumps({"versions": versions, "settings": settings, "cases": cases}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
