"""Words: cut, numbered, batched; their vectors learned, cached, read from GloVe's format."""

from __future__ import annotations

import pytest
import torch

from fastlora import env
from fastlora.errors import UserError
from fastlora.finetune import words as vectors
from fastlora.finetune.imdb import TextClassifier
from fastlora.finetune.words import PAD, UNKNOWN, TextDataset, most_frequent, numbered, tokenise


def corpus(texts=300, seed=0):
    """Texts of words 2-11 or of words 12-21, never both: two topics."""
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(2, 12, (20,), generator=generator) + 10 * (i % 2) for i in range(texts)]
    offsets = torch.arange(0, 20 * texts + 1, 20)
    return torch.cat(rows).int(), offsets


def test_words_of_one_topic_lie_together():
    ids, offsets = corpus()
    learned = vectors.learn(ids, offsets, 22)
    assert learned.shape == (22, vectors.DIM)
    assert not learned[:2].any()
    unit = torch.nn.functional.normalize(learned[2:], dim=1)
    likeness = unit @ unit.T
    within = torch.cat([likeness[:10, :10].flatten(), likeness[10:, 10:].flatten()]).mean()
    assert within > 0.3 + likeness[:10, 10:].mean()


def test_nothing_is_counted_across_texts():
    # Words 2 and 3 are neighbours only across the border of two texts, and 2 4, 3 5 within.
    ids = torch.tensor([4, 2, 3, 5] * 50, dtype=torch.int32)
    offsets = torch.arange(0, 201, 2)
    learned = vectors.learn(ids, offsets, 6)
    unit = torch.nn.functional.normalize(learned, dim=1)
    assert abs(float(unit[2] @ unit[3])) < 1e-3


def test_the_svd_is_that_of_the_positive_pmi():
    ids, offsets = corpus(texts=40)
    counts = torch.zeros(22, 22, dtype=torch.float64)
    rows = ids.view(-1, 20).tolist()
    for row in rows:
        for i, word in enumerate(row):
            for context in row[max(0, i - vectors.WINDOW) : i] + row[i + 1 : i + 1 + vectors.WINDOW]:
                counts[word, context] += 1
    contexts = counts.sum(0) ** vectors.SMOOTHING
    contexts /= contexts.sum()
    pmi = (counts / counts.sum(1, keepdim=True).clamp(min=1) / contexts.clamp(min=1e-12)).clamp(min=1).log()
    left, singular, _ = torch.linalg.svd(pmi)
    learned = vectors.learn(ids, offsets, 22)[:, :22].double()
    assert float(learned[2:].norm(dim=1).mean()) == pytest.approx(vectors.NORM, rel=1e-5)
    learned *= ((left * singular) @ left.T).diagonal().sum().sqrt() / learned.norm()
    expected = (left * singular) @ left.T  # the same whatever the signs and the basis of equal singular values
    torch.testing.assert_close(learned @ learned.T, expected, atol=1e-4, rtol=1e-4)


def test_learned_vectors_are_cached_by_content(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    ids, offsets = corpus()
    first = vectors.learned(ids, offsets, 22)
    files = list((env.cache_dir() / "vectors").iterdir())
    assert len(files) == 1
    monkeypatch.setattr(vectors, "learn", lambda *_: pytest.fail("learned again"))
    assert torch.equal(vectors.learned(ids, offsets, 22), first)
    monkeypatch.undo()
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    vectors.learned(ids.flip(0), offsets, 22)
    assert len(list((env.cache_dir() / "vectors").iterdir())) == 2


@pytest.mark.parametrize("damage", ["cut", "empty"])
def test_a_damaged_cache_is_made_anew(monkeypatch, tmp_path, damage):
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path))
    ids, offsets = corpus()
    first = vectors.learned(ids, offsets, 22)
    (file,) = (env.cache_dir() / "vectors").iterdir()
    content = bytearray(file.read_bytes())
    file.write_bytes({"cut": bytes(content[:-50]), "empty": b""}[damage])
    assert torch.equal(vectors.learned(ids, offsets, 22), first)


def test_a_cache_that_cannot_be_written_costs_nothing_else(monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("FASTLORA_CACHE", str(tmp_path / "cache"))
    ids, offsets = corpus()
    assert vectors.learned(ids, offsets, 22).any()


def glove(path, *lines):
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


def row(word, value=1.0, dim=vectors.DIM):
    return " ".join([word] + [f"{value}"] * dim)


def test_glove_fills_the_words_that_it_has(tmp_path):
    vocabulary = numbered(["film", "good", "rare"])
    path = glove(
        tmp_path / "g.txt", row("the", 9), row("good", 0.25), row(". . .", 3), row("film", -1e-3), row("<unk>")
    )
    found, count = vectors.read_glove(path, vocabulary)
    assert count == 2
    assert found[:, 0].tolist() == pytest.approx([0, 0, -1e-3, 0.25, 0])


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ((row("film"), row("good", dim=50)), "line 2 is not a word and 100 numbers"),
        ((row("film", "x"),), "line 1 is not a word and 100 numbers"),
        ((row("film", "nan"),), "not finite"),
        ((row("other"),), "none of the 1 words"),
        ((), "none of the 1 words"),
    ],
)
def test_a_wrong_vector_file_is_named(tmp_path, lines, message):
    path = glove(tmp_path / "g.txt", *lines)
    with pytest.raises(UserError, match=message):
        vectors.read_glove(path, numbered(["film"]))


def test_a_vector_file_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        vectors.read_glove(tmp_path / "none", numbered(["film"]))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00" * 100)
    with pytest.raises(UserError, match="line 1 is not"):
        vectors.read_glove(tmp_path / "binary", numbered(["film"]))


def test_weighted_vectors_average_to_zero_and_have_the_scale():
    ids, _ = corpus()
    raw = torch.randn(22, 100, generator=torch.Generator().manual_seed(0))
    raw[5] = 0
    ready = vectors.weighted(raw, ids, scale=3.0)
    frequency = torch.bincount(ids, minlength=22).float() / len(ids)
    assert not ready[:2].any() and not ready[5].any()
    assert float(frequency @ ready.norm(dim=1)) == pytest.approx(3.0, rel=1e-5)
    assert float((frequency @ ready).norm()) < 0.3  # zero but for the word that has no vector


TEXTS = ["a good film", "bad", "", "a film a film a good good day", "what"]


@pytest.fixture
def dataset():
    words = [tokenise(text) for text in TEXTS]
    vocabulary = numbered(most_frequent(words, size=4, least=1))
    made = TextDataset(words, [1, 0, 1, 1, 0], vocabulary)
    made.vocabulary = vocabulary
    return made


def test_tokenise():
    assert tokenise("It's <br /><br />GREAT! Isn't it, #39;really#39; 10/10?") == [
        "it's",
        "great",
        "!",
        "isn't",
        "it",
        "really",
        "10",
        "10",
        "?",
    ]


def test_vocabulary_orders_by_frequency_then_alphabet():
    words = most_frequent([["b", "a", "c"], ["c", "d"]], size=3, least=1)
    assert words == ["c", "a", "b"]
    encoded = TextDataset([["c", "d", "b"], []], [0, 1], numbered(words))
    assert encoded.ids.tolist() == [2, UNKNOWN, 4, UNKNOWN] and encoded.offsets.tolist() == [0, 3, 4]
    assert most_frequent([["b", "a", "a"]], size=9, least=2) == ["a"]


def test_a_batch_is_its_texts_one_after_the_other(dataset):
    ids, offsets, labels = dataset.batch(torch.tensor([3, 0, 2]), pad_to=16)
    texts = [TEXTS[i].split() or ["?"] for i in (3, 0, 2)]
    assert offsets.tolist() == [0, 8, 11, 12] and labels.tolist() == [1, 1, 1] and len(ids) == 16
    assert ids[:12].tolist() == [dataset.vocabulary.get(word, UNKNOWN) for text in texts for word in text]
    assert (ids[12:] == PAD).all()
    assert ids.dtype == offsets.dtype == torch.int32


def test_padding_never_enters_the_mean(dataset):
    torch.manual_seed(0)
    model = TextClassifier(6, 100, classes=2)
    torch.nn.init.normal_(model.embedding.weight)
    ids, offsets, _ = dataset.batch(torch.arange(5), pad_to=64)
    with torch.no_grad():
        logits = model(ids, offsets)
        parts = ids[: offsets[-1]].long().split(offsets.diff().tolist())
        means = torch.stack([model.embedding.weight[part].mean(0) for part in parts])
        one_by_one = model.fc2(torch.relu(model.fc1(means)))
        model.embedding.weight[PAD] = 1e6
        assert torch.equal(model(ids, offsets), logits)
    assert logits.shape == (5, 2)
    torch.testing.assert_close(logits, one_by_one)
