"""Embeddings: unit rows, the same everywhere, order and wording heard; MiniLM against its published figures."""

from __future__ import annotations

import math

import numpy as np
import pytest

from m3.text.embed import Embedder, LexicalEmbedder, MiniLM, Remembering, open_embedder

LEXICAL = LexicalEmbedder()


def cosine(left: str, right: str, embedder: Embedder = LEXICAL) -> float:
    rows = embedder([left, right])
    return float(rows[0] @ rows[1])


def test_a_row_is_hashed_features_by_hand():
    """One stem, twice, and its pair with itself: three weights known, so the angle of their sum is."""
    twice, once = LexicalEmbedder(4096)(["fever fever", "fever"])
    weight, pair = 1 + math.log(2), 0.5
    assert np.count_nonzero(once) == 1
    assert np.count_nonzero(twice) == 2
    assert float(twice @ once) == pytest.approx(weight / math.hypot(weight, pair), abs=1e-6)


def test_bytes_are_the_same_on_every_machine():
    row = LexicalEmbedder(16)(["The pain radiates to the left arm."])[0]
    wanted = {0: 2, 1: -2, 3: 1, 11: 2, 12: -3, 13: 1}  # four stems of weight 2, three pairs of 1: 12 holds one of each
    golden = np.array([wanted.get(i, 0) for i in range(16)])
    np.testing.assert_allclose(row, golden / np.linalg.norm(golden), atol=1e-6)


TEXTS = ["Fever.", "", "  ", "the of and", "发烧三天", "a " * 5000, "Take 2.5 mg twice daily; don't stop suddenly."]


@pytest.mark.parametrize("embedder", [LEXICAL, LexicalEmbedder(1), LexicalEmbedder(7)], ids=lambda one: one.name)
@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_every_row_has_length_one(embedder, text):
    row = embedder([text])
    assert row.dtype == np.float32
    assert row.shape == (1, embedder.dim)
    assert np.linalg.norm(row) == pytest.approx(1, abs=1e-6)


def test_wording_is_heard():
    close = cosine("Aspirin thins the blood.", "Aspirin is thinning the blood!")
    far = cosine("Aspirin thins the blood.", "A fracture heals in six weeks.")
    assert close == pytest.approx(1, abs=1e-6), "inflection and stop words change nothing"
    assert abs(far) < 0.2


def test_order_is_heard_a_little():
    assert 0.7 < cosine("aspirin before warfarin tablets", "warfarin before aspirin tablets") < 0.99


def test_a_negation_is_a_word():
    assert cosine("There is fever.", "There is no fever.") < 0.9


def test_rows_do_not_depend_on_their_neighbours():
    assert np.array_equal(LEXICAL(["fever", "cough"])[1], LexicalEmbedder()(["cough"])[0])


def test_a_row_handed_out_is_the_callers_own():
    LEXICAL(["mine"])[:] = 7
    assert np.linalg.norm(LEXICAL(["mine"])) == pytest.approx(1, abs=1e-6)


def test_no_texts():
    assert LEXICAL([]).shape == (0, 512)


def test_one_text_is_no_sequence_of_texts():
    with pytest.raises(ValueError, match="LexicalEmbedder: texts: want a sequence of texts; got one text"):
        LEXICAL("fever")


def test_dim_is_checked():
    with pytest.raises(ValueError, match="LexicalEmbedder: dim: want an integer >= 1; got 0"):
        LexicalEmbedder(0)


def test_by_name():
    assert isinstance(open_embedder("lexical"), Embedder)
    with pytest.raises(ValueError, match=r"open_embedder: name: want of \['lexical', 'minilm'\]; got word2vec"):
        open_embedder("word2vec")


class Counting:
    """Counts what it embeds."""

    name, dim = "counting", 2

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, texts):
        self.seen += texts
        return np.array([[len(text), 0.0] for text in texts], np.float32).reshape(-1, 2)


def test_a_text_is_embedded_once():
    counting = Counting()
    remembering = Remembering(counting, capacity=2)
    assert remembering(["a", "bb", "a"])[:, 0].tolist() == [1, 2, 1]
    assert remembering(["bb", "a"])[:, 0].tolist() == [2, 1]
    assert counting.seen == ["a", "bb"]
    assert remembering(["ccc", "a"])[:, 0].tolist() == [3, 1]
    assert remembering(["a"])[:, 0].tolist() == [1], "the oldest went"
    assert counting.seen == ["a", "bb", "ccc", "a"]
    assert isinstance(remembering, Embedder)


def test_capacity_is_checked():
    with pytest.raises(ValueError, match="Remembering: capacity: want an integer >= 1; got 0"):
        Remembering(Counting(), 0)


# -- MiniLM -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def minilm() -> MiniLM:
    return MiniLM(threads=2, batch_size=2)


@pytest.mark.slow
def test_minilm_is_the_published_one(minilm):
    """The similarities that the quickstart of sentence-transformers prints for this model."""
    rows = minilm(["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."])
    published = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(rows @ rows.T, published, atol=1e-4)
    assert isinstance(minilm, Embedder)


@pytest.mark.slow
def test_minilm_row_is_the_mean_of_its_tokens(minilm):
    """Against transformers' own tokenizer and a mean written out: one text, no padding, no mask."""
    import torch
    import transformers

    from m3.models.hub import resolve_encoder

    text = "Warfarin interacts with many antibiotics."
    folder = resolve_encoder("all-MiniLM-L6-v2")
    inputs = transformers.AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.inference_mode():
        hidden = transformers.AutoModel.from_pretrained(folder)(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
        ).last_hidden_state[0]
    kept = hidden[inputs["attention_mask"][0].bool()]
    mean = kept.mean(0)
    np.testing.assert_allclose(minilm([text])[0], (mean / mean.norm()).numpy(), atol=1e-5)


@pytest.mark.slow
def test_minilm_row_does_not_depend_on_its_batch(minilm):
    texts = ["Fever.", "A much longer sentence about a fever that came and went for three days.", "Cough and cold."]
    together = minilm(texts)
    np.testing.assert_allclose(together, np.concatenate([minilm([text]) for text in texts]), atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


@pytest.mark.slow
def test_minilm_cuts_after_256_tokens(minilm):
    long = "fever " * 254
    rows = minilm([long, long + "and a cough " * 50])
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-5)


@pytest.mark.slow
def test_minilm_of_nothing(minilm):
    assert minilm([]).shape == (0, 384)
