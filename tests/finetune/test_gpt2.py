"""Our GPT-2 against transformers' on the same weights, its file formats, and its count of trainable numbers."""

import copy

import pytest
import torch

from fastlora.errors import UserError
from fastlora.finetune import gpt2, gpt2_weights

TINY = gpt2.GPT2Config(vocabulary=61, context=16, width=24, heads=3, layers=2)


@pytest.fixture
def ids():
    return torch.randint(61, (3, 11), generator=torch.Generator().manual_seed(1))


def random_model(seed=0):
    """Every tensor random, norms and biases too, so that none can be forgotten unnoticed."""
    model = gpt2.GPT2(TINY)
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value.data.normal_(std=0.3, generator=generator)
    return model.eval()


def openai_names(hf):
    def name(key):
        parts = key.replace("h.0", "h0").replace("h.1", "h1").split(".")
        if parts[0] in ("wte", "wpe"):
            return f"model/{parts[0]}"
        ending = {"weight": "g" if "ln_" in key else "w", "bias": "b"}[parts[-1]]
        return "model/" + "/".join([*parts[:-1], ending])

    return {
        name(key): value[None] if ".c_" in key and key.endswith("weight") else value
        for key, value in hf.items()
        if not key.startswith("score")
    }


def assert_same_body(a, b):
    for name, value in a.state_dict().items():
        if not name.startswith("head."):
            assert torch.equal(value, b.state_dict()[name]), name


@torch.no_grad()
def test_agrees_with_transformers_both_ways(tmp_path, ids):
    transformers = pytest.importorskip("transformers")
    ours = random_model()
    gpt2_weights.save(ours, tmp_path / "a")
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "a").eval()
    want = theirs.transformer(ids).last_hidden_state
    torch.testing.assert_close(ours.norm(ours.features(ids)), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(ids), ours.head(want[:, -1]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        ours.norm(ours.features(ids)) @ ours.tokens.weight.T, theirs(ids).logits, rtol=1e-5, atol=1e-5
    )

    theirs.save_pretrained(tmp_path / "b")  # with the prefix `transformer.`
    again = gpt2.GPT2(TINY)
    gpt2_weights.load(again, gpt2_weights.find(tmp_path / "b"))
    assert_same_body(ours, again)


@pytest.mark.parametrize("kind", ["safetensors", "npz", "float16"])
def test_openai_names(tmp_path, kind):
    import numpy
    from safetensors.torch import load_file, save_file

    ours = random_model()
    if kind == "float16":
        ours = ours.half().float()
    gpt2_weights.save(ours, tmp_path)
    tensors = openai_names(load_file(tmp_path / "model.safetensors"))
    assert "model/h1/attn/c_attn/w" in tensors and "model/ln_f/g" in tensors
    (tmp_path / "openai").mkdir()
    if kind == "npz":
        numpy.savez(tmp_path / "openai" / "model.npz", **{name: value.numpy() for name, value in tensors.items()})
    else:
        dtype = torch.float16 if kind == "float16" else torch.float32
        tensors = {name: value.to(dtype).contiguous() for name, value in tensors.items()}
        save_file(tensors, tmp_path / "openai" / "model.safetensors")
    again = gpt2.GPT2(TINY)
    gpt2_weights.load(again, gpt2_weights.find(tmp_path / "openai"))
    assert_same_body(ours, again)


def test_wrong_weights_leave_the_model_alone(tmp_path):
    from safetensors.torch import load_file, save_file

    ours = random_model()
    gpt2_weights.save(ours, tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    tensors = {name: value.clone() for name, value in load_file(path).items()}  # it maps the file, rewritten below

    def refused(said):
        model = random_model(seed=5)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(UserError, match=said) as told:
            gpt2_weights.load(model, path)
        assert "\n" not in str(told.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    path.write_bytes(good[:-5])
    refused("not a readable weights file")
    path.write_bytes(b"")
    refused("not a readable weights file")
    save_file({name: value for name, value in tensors.items() if name != "h.1.mlp.c_fc.bias"}, path)
    refused(r"holds no h\.1\.mlp\.c_fc\.bias")
    save_file(tensors | {"wpe.weight": torch.zeros(8, 24)}, path)
    refused(r"wpe\.weight has shape \(8, 24\)")
    save_file(tensors | {"h.0.attn.c_attn.weight": torch.zeros(24, 71)}, path)
    refused(r"c_attn\.weight has shape \(24, 71\), this model's is \(24, 72\)")
    save_file(tensors | {"h.0.ln_1.bias": torch.full((24,), torch.nan)}, path)
    refused("not finite")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        gpt2_weights.find(tmp_path / "nothing")


@pytest.mark.parametrize("value", [
    torch.ones(24, 96, dtype=torch.int64), torch.ones(24, 96, dtype=torch.bool), torch.ones(24, 96).to(torch.complex64),
    torch.ones(24, 96).to(torch.float8_e5m2), torch.full((24, 96), 1e300, dtype=torch.float64), torch.tensor(1.0),
], ids=str)
@pytest.mark.parametrize("key", ["h.0.mlp.c_fc.weight", "h.0.attn.c_attn.bias"])
def test_weights_that_are_not_floats_of_this_shape_are_refused(tmp_path, key, value):
    from safetensors.torch import load_file, save_file

    gpt2_weights.save(random_model(), tmp_path)
    tensors = {name: value.clone() for name, value in load_file(tmp_path / "model.safetensors").items()}
    if value.dim():
        value = value[:, :1].expand(*tensors[key].shape).contiguous() if tensors[key].dim() == 2 else (
            value.flatten()[: tensors[key].numel()].clone())
    save_file(tensors | {key: value}, tmp_path / "model.safetensors")
    model = random_model(seed=5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        gpt2_weights.load(model, tmp_path / "model.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_of_an_npz_only_the_weights_are_read_and_never_a_pickle(tmp_path):
    import numpy
    from safetensors.torch import load_file

    gpt2_weights.save(random_model(), tmp_path)
    arrays = {name: value.numpy() for name, value in load_file(tmp_path / "model.safetensors").items()}
    path, model = tmp_path / "model.npz", random_model(seed=5)
    numpy.savez_compressed(path, **arrays, other=numpy.zeros(10**7), pickled=numpy.array([{}], dtype=object))
    gpt2_weights.load(model, path)
    assert_same_body(model, random_model())
    for key, value, said in (
        ("wpe.weight", numpy.array([{}], dtype=object), "shape"),
        ("wpe.weight", numpy.full((16, 24), None, dtype=object), r"is \|O"),
        ("wpe.weight", numpy.zeros((16, 24), dtype=">f4"), "is >f4"),
        ("wpe.weight", numpy.zeros((10**4, 24)), "shape"),
        ("transformer.wpe.weight", arrays["wpe.weight"], "both"),
    ):
        numpy.savez_compressed(path, **(arrays | {key: value}))
        with pytest.raises(UserError, match=said) as told:
            gpt2_weights.load(model, path)
        assert str(path) in str(told.value)
    assert_same_body(model, random_model())


def test_hub_cache(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, name: None)
    with pytest.raises(UserError, match="--weights random"):
        gpt2_weights.find(None)
    monkeypatch.setattr(
        hub, "try_to_load_from_cache",
        lambda repo, name: str(tmp_path / name) if repo == "openai-community/gpt2" else None,
    )
    assert gpt2_weights.find(None) == tmp_path / "model.safetensors"


def test_trainable_numbers_of_the_124m_model():
    from fastlora import inject

    with torch.device("meta"):
        model = gpt2.GPT2(gpt2.CONFIGS["gpt2"])
    assert sum(value.numel() for value in model.parameters()) == 124_439_808 + 768 * 2 + 2
    inject(model, r=16, lora_alpha=16, target_modules="all-linear")
    assert sum(value.numel() for value in model.parameters() if value.requires_grad) == 2_666_528


def test_grad_checkpointing_gives_the_same_bits(ids):
    model = random_model().train()
    loss = model(ids).sum()
    loss.backward()
    want = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    model.grad_checkpointing = True
    model(ids).sum().backward()
    assert all(torch.equal(value.grad, want[name]) for name, value in model.named_parameters())


def test_last_token_sees_all_and_nothing_sees_ahead(ids):
    model = random_model()
    changed = ids.clone()
    changed[:, 0] = (changed[:, 0] + 1) % 61
    assert not torch.equal(model(ids), model(changed))
    later = ids.clone()
    later[:, -1] = (later[:, -1] + 1) % 61
    assert torch.equal(model.features(ids)[:, :-1], model.features(later)[:, :-1])
