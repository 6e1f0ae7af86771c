"Contracts of text encoding: a vocabulary that can be repeated, hidden words, vectors against oracles, states with gradient, folders, bad input."
import math

import pytest
import torch
from transformers import BertConfig, BertModel

from medgen_nb.data import loader
from medgen_nb.text import AS_MASK, HIDDEN, KEYS, SPECIAL, TextEncoder, hide_words, learn_vocabulary, read_pretrained
from medgen_nb.training import FitConfig, fit

NAMES = ("pleural effusion", "pneumothorax", "cardiomegaly", "consolidation")
TEXTS = [f"{degree} {name}{end}" for degree in ("No", "Mild", "Severe") for name in NAMES for end in (".", " on the left.", ", heart of normal size.")]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder.fresh(TEXTS, vocabulary=250, width=16, depth=1, heads=2, longest=32).eval()


def test_a_vocabulary_can_be_repeated():
    one, two = (learn_vocabulary(TEXTS, 250) for _ in range(2))
    assert one.get_vocab() == two.get_vocab() and len(one) <= 250
    assert one.convert_tokens_to_ids(list(SPECIAL)) == [0, 1, 2, 3, 4]
    assert one.tokenize("SEVERE Cardiomegaly") == ["severe", "cardiomegaly"]
    assert one.decode(one("mild consolidation")["input_ids"], skip_special_tokens=True) == "mild consolidation"


def test_every_key_is_known(encoder):
    "Letters and signs that no text used are spelled, not lost; other alphabets are unknown."
    unknown = encoder.tokenizer.unk_token_id
    assert unknown not in encoder.tokens([" ".join(KEYS), KEYS, "4/6 HSM @ apx, q. quiz; (Zyx) 2-3 = 5% #!"])["input_ids"]
    assert unknown in encoder.tokens(["\u5fc3"])["input_ids"]


def test_a_vocabulary_too_small_for_its_letters():
    letters = len(set(KEYS))
    with pytest.raises(ValueError, match=f"allow {2 * letters + len(SPECIAL)} or more"):
        learn_vocabulary(TEXTS, 2 * letters + len(SPECIAL) - 1)
    assert len(learn_vocabulary(TEXTS, 2 * letters + len(SPECIAL))) == 2 * letters + len(SPECIAL)


def test_hide_words_as_bert_does():
    torch.manual_seed(0)
    ids = torch.randint(5, 100, (400, 40))
    ids[:, 0] = 2
    read, labels = hide_words(ids, special=[0, 1, 2, 3, 4], mask=4, size=100)
    hidden = labels != -100
    assert not hidden[:, 0].any() and hidden.any(1).all() and torch.equal(labels[hidden], ids[hidden]) and torch.equal(read[~hidden], ids[~hidden])
    assert hidden[:, 1:].float().mean() == pytest.approx(HIDDEN, abs=0.01) and (read[hidden] == 4).float().mean() == pytest.approx(AS_MASK, abs=0.03)
    one = hide_words(torch.tensor([[2, 7, 3]]), [2, 3], 4, 100)[1]
    assert one.tolist() == [[-100, 7, -100]]                     # the only word there is
    assert (hide_words(torch.tensor([[2, 3, 0]]), [0, 2, 3], 4, 100)[1] == -100).all()


def test_embedding_is_the_mean_of_its_states(encoder):
    texts = [*TEXTS, "", TEXTS[0], "x"]
    vectors = encoder.embed(texts)
    assert vectors.shape == (len(texts), 16) and vectors.dtype == torch.float32 and not vectors.requires_grad
    assert not vectors[len(TEXTS)].any() and torch.equal(vectors[-2], vectors[0])                     # an empty text; a text twice
    for k in (0, 17, len(texts) - 1):
        with torch.no_grad():
            alone = encoder.states(encoder.tokens([texts[k]]))[0].mean(0)                             # one text, no padding
        torch.testing.assert_close(vectors[k], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encoder.embed(texts[::-1]).flip(0), vectors)
    assert encoder.embed([]).shape == (0, 16)


def test_each_distinct_text_is_read_once(encoder, monkeypatch):
    seen, tokens = [], encoder.tokens
    monkeypatch.setattr(encoder, "tokens", lambda texts: (seen.extend(texts), tokens(texts))[1])
    encoder.embed([*TEXTS, *TEXTS, "", ""])
    assert sorted(seen) == sorted(TEXTS)


def test_embed_leaves_the_mode_as_it_was(encoder):
    encoder.train()
    one, two = encoder.embed(TEXTS), encoder.embed(TEXTS)
    assert encoder.training and torch.equal(one, two)            # read without dropout all the same
    encoder.eval()
    assert torch.equal(encoder.embed(TEXTS), one) and not encoder.training


def test_states_have_a_gradient_and_ignore_padding(encoder):
    read = encoder.tokens(["No pneumothorax.", TEXTS[-1]])
    assert (read["attention_mask"][0] == 0).any()
    states = encoder.states(read | {"image": torch.zeros(2)})    # a batch may hold more
    assert states.shape == (*read["input_ids"].shape, 16)
    states.square().mean().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in encoder.model.base_model.encoder.named_parameters() if "key.bias" not in name)   # softmax does not feel that one
    encoder.zero_grad()
    padded = {name: torch.cat([tensor, torch.zeros(2, 5, dtype=torch.int64)], 1) for name, tensor in read.items()}
    padded["input_ids"][:, -5:] = 7                              # rubbish under the mask
    torch.testing.assert_close(encoder.states(padded)[1, :-5], states[1], atol=1e-5, rtol=1e-4)


def test_states_are_what_cross_attention_takes(encoder):
    from diffusers.models.attention_processor import Attention
    torch.manual_seed(0)
    attention = Attention(query_dim=8, cross_attention_dim=16, heads=2, dim_head=4).eval()
    read, pixels = encoder.tokens(["No pneumothorax.", TEXTS[-1]]), torch.randn(2, 9, 8)
    mask = read["attention_mask"][:, None].bool()
    heard = attention(pixels, encoder.states(read), attention_mask=torch.zeros(mask.shape).masked_fill(~mask, -1e4))
    alone = encoder.tokens(["No pneumothorax."])
    torch.testing.assert_close(heard[:1], attention(pixels[:1], encoder.states(alone)), atol=1e-5, rtol=1e-4)


def test_what_is_too_long_is_cut(encoder):
    read = encoder.tokens(["mild " * 100])
    assert read["input_ids"].shape == (1, 32) and read["input_ids"][0, -1] == encoder.tokenizer.sep_token_id
    assert torch.isfinite(encoder.embed(["mild " * 100])).all()


def test_texts_come_in_a_list(encoder):
    for read in (encoder.tokens, encoder.table, encoder.embed, lambda text: learn_vocabulary(text, 250), lambda text: TextEncoder.fresh(text, 250, 16, 1, 2, 32)):
        with pytest.raises(ValueError, match="brackets"):
            read("No pneumothorax.")
    for read, texts in ((encoder.tokens, []), (encoder.table, ["", ""])):
        with pytest.raises(ValueError, match="no text to read"):
            read(texts)


def test_an_indifferent_guesser_pays_the_logarithm(encoder):
    torch.manual_seed(0)
    blank = TextEncoder.fresh(TEXTS, vocabulary=250, width=16, depth=1, heads=2, longest=32)
    for parameter in blank.model.parameters():
        torch.nn.init.zeros_(parameter)
    assert blank.loss(blank.table(TEXTS)).item() == pytest.approx(math.log(len(blank.tokenizer)), abs=1e-4)


def test_learns_and_can_be_repeated():
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        encoder = TextEncoder.fresh(TEXTS, vocabulary=250, width=16, depth=1, heads=2, longest=32)
        config = FitConfig(steps=80, batch_size=32, lr=1e-2, warmup=5, ema=0, precision="fp32", save_every=80)
        for training in fit(encoder, loader(encoder.table([*TEXTS, ""]), 32), config):
            pass
        losses.append([point["loss"] for point in training.history])
    assert losses[0] == losses[1] and losses[0][-1] < 0.7 * losses[0][0]


def test_folders(encoder, tmp_path):
    encoder.save(tmp_path / "own")
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {file.name for file in (tmp_path / "own").iterdir()}
    again = TextEncoder.load(tmp_path / "own").eval()
    assert torch.equal(again.embed(TEXTS), encoder.embed(TEXTS)) and again.longest == encoder.longest == 32 and again.width == 16
    hub = TextEncoder.from_hub(str(tmp_path / "own"))            # the same folder as any encoder of the hub
    torch.testing.assert_close(hub.embed(TEXTS), encoder.embed(TEXTS))
    with pytest.raises(ValueError, match="TextEncoder.fresh"):
        hub.loss(hub.table(TEXTS))


def test_another_bert(encoder, tmp_path):
    BertModel(BertConfig(vocab_size=len(encoder.tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(tmp_path / "tiny")
    encoder.tokenizer.save_pretrained(tmp_path / "tiny")
    tiny = TextEncoder.from_hub(str(tmp_path / "tiny"))
    assert tiny.embed(["a", "", "No murmur."]).shape == (3, 24) and tiny.states(tiny.tokens(["a"])).shape == (1, 3, 24)


@pytest.mark.parametrize("get", [TextEncoder.load, TextEncoder.from_hub, lambda name: read_pretrained(name, BertModel)])
def test_what_is_not_there(get, tmp_path):
    with pytest.raises(ValueError, match="cannot be had.*config.json"):
        get(str(tmp_path / "nothing here"))
