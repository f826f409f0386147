"""Training with a patched model: gradient checkpointing, the Trainer, torch.compile."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from conftest import build, layer_of, twins
from peft import LoraConfig, get_peft_model
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fastlora.peft


def tiny_bert(seed=0, **config):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=20, **sizes))
    config = {"target_modules": ["query", "value"], "r": 4, "lora_alpha": 8, **config}
    return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **config))


def batch(rows=6):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, 60, (rows, 10), generator=generator)
    return {"input_ids": ids, "labels": ids[:, 0] % 2}


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(reentrant, dropout):
    plain = fastlora.peft.patch(tiny_bert(lora_dropout=dropout, init_lora_weights=False))
    saving = copy.deepcopy(plain)
    saving.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    for model in (plain, saving):
        model.enable_input_require_grads()
        model.train()
        torch.manual_seed(9)
        model(**batch()).loss.backward()
    want, got = gradients(plain), gradients(saving)
    assert want.keys() == got.keys() and any("lora_A" in name for name in got)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, want[name], msg=name)
    report = fastlora.peft.report(saving)
    assert (report.fused_calls, report.fallback_calls) == (8, 0)  # each of four layers once more in backward


def test_checkpoint_gives_the_dropout_mask_again():
    layer = layer_of(fastlora.peft.patch(build(lora_dropout=0.5)))
    x = torch.randn(9, 24)
    results = []
    for run in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        layer.zero_grad()
        torch.manual_seed(4)
        run(x).square().sum().backward()
        results.append(layer.lora_A["default"].weight.grad.clone())
    assert torch.equal(*results)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        ids = torch.randint(0, 60, (10,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": int(ids[0] > 30)}


def fit(model, folder):
    settings = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=5e-3,
        use_cpu=True,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="epoch",
        load_best_model_at_end=True,
        seed=3,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=Rows(), eval_dataset=Rows())
    trainer.train()
    return trainer


def test_the_trainer_learns_as_with_stock_and_loads_the_best(tmp_path):
    stock = tiny_bert()
    model = fastlora.peft.patch(copy.deepcopy(stock))
    theirs, mine = fit(stock, tmp_path / "stock"), fit(model, tmp_path / "fused")
    curves = [
        np.array([entry[key] for entry in trainer.state.log_history if key in entry])
        for trainer in (theirs, mine)
        for key in ("loss", "eval_loss")
    ]
    np.testing.assert_allclose(curves[2], curves[0], rtol=2e-4)
    np.testing.assert_allclose(curves[3], curves[1], rtol=2e-4)
    assert curves[0][-1] < curves[0][0]
    assert mine.state.best_metric == pytest.approx(theirs.state.best_metric, rel=2e-4)
    assert mine.evaluate()["eval_loss"] == pytest.approx(mine.state.best_metric, rel=1e-5)
    assert fastlora.peft.report(model).fallback_calls == 0 and fastlora.peft.report(model).fused_calls > 0


@pytest.mark.parametrize("when", ["before compile", "after compile", "after a compiled call"])
def test_compile_without_graph_breaks(when):
    stock, model = twins(torch.float64)
    counter = CompileCounterWithBackend("aot_eager")
    x = torch.randn(6, 24, dtype=torch.float64)
    torch._dynamo.reset()
    if when == "before compile":
        fastlora.peft.patch(model)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    if when == "after a compiled call":
        compiled(x)
    if when != "before compile":
        fastlora.peft.patch(compiled)
    y, want = compiled(x), stock(x)
    torch.testing.assert_close(y, want)
    for output in (y, want):
        output.square().sum().backward()
    for (name, mine), theirs in zip(model.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, msg=name)
    targets = [str(node.target) for node in counter.graphs[-1].graph.nodes]
    assert sum("fastlora" in target for target in targets) == 3
    assert fastlora.peft.report(model).fused_calls == 0  # calls in compiled code are not counted
    fastlora.peft.unpatch(compiled)
    torch.testing.assert_close(compiled(x), want)


def test_compile_of_an_exit_and_of_dropout():
    torch._dynamo.reset()
    model = fastlora.peft.patch(build(lora_dropout=0.5))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 24)
    first, second = compiled(x), compiled(x)
    assert not torch.equal(first, second)
    layer_of(model).lora_A["default"].bias = torch.nn.Parameter(torch.zeros(5))
    stock = fastlora.peft.unpatch(copy.deepcopy(model)).eval()
    torch.testing.assert_close(compiled.eval()(x), stock(x))


def test_export_is_pefts_own():
    stock, model = twins()
    fastlora.peft.patch(model)
    x = torch.randn(6, 24)
    exported = torch.export.export(model.eval(), (x,))
    assert not any("fastlora" in str(node.target) for node in exported.graph.nodes)
    torch.testing.assert_close(exported.module()(x), stock.eval()(x))
