"""Our GPT-2 against transformers' on the same weights, its count of trainable numbers, and its encoding."""

import copy

import pytest
import tiktoken
import torch
from safetensors.torch import load_file, save_file

from fastlora.errors import UserError
from fastlora.finetune import gpt2

TINY = gpt2.GPT2Config(vocabulary=61, context=16, width=24, heads=3, layers=2)


@pytest.fixture
def ids():
    return torch.randint(61, (3, 11), generator=torch.Generator().manual_seed(1))


def random_model(seed=0):
    """Every tensor random, norms and biases too, so that none can be forgotten unnoticed."""
    return shaken(gpt2.GPT2(TINY), seed)


def shaken(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for value in model.parameters():
        value.data.normal_(std=0.3, generator=generator)
    return model.eval()


def features(model, ids):
    """The last block's output, (batch, tokens, width), not yet normalised."""
    kept = []
    with model.blocks[-1].register_forward_hook(lambda *call: kept.append(call[2])):
        model(ids)
    return kept[0]


def theirs():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_head": 3, "n_layer": 2}
    return shaken(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["with the prefix", "bare", "float16"])
def test_agrees_with_transformers(tmp_path, ids, kind):
    other, ours = theirs(), gpt2.GPT2(TINY).eval()
    if kind == "float16":
        other = other.half()
    (other.transformer if kind == "bare" else other).save_pretrained(tmp_path)
    gpt2.load_weights(ours, gpt2.find_weights(tmp_path))
    want = other.float().transformer(ids).last_hidden_state
    torch.testing.assert_close(ours.norm(features(ours, ids)), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours(ids), ours.head(want[:, -1]), rtol=1e-5, atol=1e-5)


def test_wrong_weights_leave_the_model_alone(tmp_path):
    theirs().transformer.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    good = path.read_bytes()
    tensors = {name: value.clone() for name, value in load_file(path).items()}  # it maps the file, rewritten below

    def refused(said):
        model = random_model(seed=5)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(UserError, match=said) as told:
            gpt2.load_weights(model, path)
        assert "\n" not in str(told.value)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    for content in (good[:-5], b""):
        path.write_bytes(content)
        refused("damaged")
    save_file({name: value for name, value in tensors.items() if name != "h.1.mlp.c_fc.bias"}, path)
    refused(r"holds no h\.1\.mlp\.c_fc\.bias")
    for key, value, said in (
        ("wpe.weight", torch.zeros(8, 24), "positions.weight is not of this model's shape"),
        ("h.0.attn.c_attn.weight", torch.zeros(24, 71), "query.weight is not of this|value.weight is not of this"),
        ("h.0.ln_1.bias", torch.full((24,), torch.nan), "not finite"),
        ("h.0.ln_1.bias", torch.full((24,), 1e300, dtype=torch.float64), "not finite"),
    ):
        save_file(tensors | {key: value}, path)
        refused(said)
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        gpt2.find_weights(tmp_path / "nothing")


def test_hub_cache(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, name: None)
    with pytest.raises(UserError, match="--weights random"):
        gpt2.find_weights(None)
    monkeypatch.setattr(
        hub,
        "try_to_load_from_cache",
        lambda repo, name: str(tmp_path / name) if repo == "openai-community/gpt2" else None,
    )
    assert gpt2.find_weights(None) == tmp_path / "model.safetensors"


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
    assert torch.equal(features(model, ids)[:, :-1], features(model, later)[:, :-1])


@pytest.fixture(scope="module")
def encoding(data_dir):
    return gpt2.gpt2_encoding(data_dir)


def test_encoding_is_gpt2s(encoding):
    assert encoding.n_vocab == 50257
    assert encoding.encode("Hello world") == [15496, 995]
    assert encoding.encode("£1.50 naïve 🙂\n\n  x")[:3] == [14988, 16, 13]
    text = "£1.50 naïve 🙂\n\n  Ünï don't <|endoftext|>"
    assert encoding.decode(encoding.encode_ordinary(text)) == text


def test_vocabulary_of_another_checksum(data_dir, tmp_path):
    folder = tmp_path / "gpt2"
    folder.mkdir()
    (folder / "encoder.json").write_bytes((data_dir / "gpt2" / "encoder.json").read_bytes())
    with pytest.raises(UserError, match=r"encoder\.json and vocab\.bpe.*No such file"):
        gpt2.gpt2_encoding(tmp_path)
    whole = (data_dir / "gpt2" / "vocab.bpe").read_bytes()
    (folder / "vocab.bpe").write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"Hash mismatch.*vocab\.bpe") as told:
        gpt2.gpt2_encoding(tmp_path)
    assert "\n" not in str(told.value)


def test_pad_cut_and_specials_as_text():
    ranks = {bytes([b]): b for b in range(256)}
    one_byte = tiktoken.Encoding("bytes", pat_str=r"(?s).", mergeable_ranks=ranks, special_tokens={})
    rows = gpt2.encode(["abc", "", "abcdef"], one_byte, 4)
    assert rows.tolist() == [[97, 98, 99, 50256], [50256] * 4, [97, 98, 99, 100]]
    assert gpt2.encode(["", ""], one_byte).shape == (2, 1)
    assert gpt2.encode(["<|endoftext|>"], one_byte).shape == (1, 13)
