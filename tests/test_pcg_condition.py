"Contracts of the heart-sound condition: notes and their inverse, prompts, encoders against oracles, the fuser, and folders that give back the same."
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SAGEConv
from transformers import BertConfig, BertModel

from medgen_nb.data import loader
from medgen_nb.pcg.condition import (EDGES, LEVELS, NODE, NODE_LEVEL, NODES, NOISY, STYLES, SUBSETS, ConditionFuser, GraphEncoder, TextEncoder,
                                     adjacency, attributes_in, differentials, facts_of, linear_probe, nodes_of, own_nodes, read_note, write_notes)
from medgen_nb.pcg.data import ATTRIBUTES, CONDITION, CONDITIONS, TIMINGS, attributes_of, simulate_sounds, typed
from medgen_nb.training import FitConfig, fit

PROMPT = "62-year-old woman, grade IV holosystolic murmur at the apex"


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return pd.concat([simulate_sounds(60, seconds=2, seed=k, tracks=False).attributes for k in (0, 1)], ignore_index=True)


@pytest.fixture(scope="module")
def encoder(table) -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder.fresh(write_notes(table), vocabulary=300, width=16, depth=1, heads=2, longest=64).eval()


def row(**known) -> pd.DataFrame:
    "One recording of which only this is known."
    return typed(pd.DataFrame([dict.fromkeys(ATTRIBUTES) | known], columns=list(ATTRIBUTES)))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seed", [0, 7])
def test_reading_undoes_writing(table, style, seed):
    again = attributes_in(write_notes(table, style, seed))
    assert list(again.columns) == list(ATTRIBUTES)
    for name in ("condition", "site", "sex", "timing", "shape", "grade", "pitch", "quality", "phase", "extra", "outcome"):
        assert ((again[name] == table[name]) | (again[name].isna() & table[name].isna())).all(), name
    assert (again["age"] - table["age"]).abs().max() <= 0.5 and (again["rate"] - table["rate"]).abs().max() <= 2.5
    assert (np.searchsorted(NOISY, again["snr"], side="right") == np.searchsorted(NOISY, table["snr"], side="right")).all()


def test_notes_are_seeded_and_styles_differ(table):
    assert write_notes(table, seed=3) == write_notes(table, seed=3) != write_notes(table, seed=4)
    full, short, other = (write_notes(table, style) for style in STYLES)
    words = lambda text: sorted(text.lower().replace(";", " ").replace(",", " ").replace(".", " ").split())
    assert sum(map(len, sum(short, ()))) < 0.6 * sum(map(len, sum(full, ())))
    differ = [a != b for one, two in zip(full, other) for a, b in zip(one, two)]
    assert np.mean(differ) > 0.5
    assert len(set(write_notes(pd.concat([table[:1]] * 50)))) > 10        # one recording, many wordings


def test_what_is_unknown_is_not_said():
    assert write_notes(row()) == [("", "", "")]
    for style in STYLES:
        demographics, murmur, diagnosis = write_notes(row(age=6.0, sex="F", grade=0.0, phase="none"), style)[0]
        assert demographics and murmur and diagnosis == ""
        assert attributes_in([(demographics, murmur, diagnosis)]).iloc[0].dropna().to_dict() == {"age": 6.0, "sex": "F", "grade": 0.0, "phase": "none"}
    only = attributes_in([("", "Systolic murmur.", "")]).iloc[0]
    assert only["phase"] == "systolic" and only["timing"] is None and math.isnan(only["grade"]) and only["extra"] is None
    assert attributes_in(write_notes(row(outcome="Abnormal"))).iloc[0]["outcome"] == "Abnormal"


@pytest.mark.parametrize("age, said", [(0.04, 0.04), (0.5, 0.5), (1.25, 1.25), (6.4, 6), (15, 15), (20, 20), (84.6, 85)])
@pytest.mark.parametrize("style", STYLES)
def test_ages(age, said, style):
    for seed in range(4):
        assert attributes_in(write_notes(row(age=age, sex="M"), style, seed)).iloc[0]["age"] == pytest.approx(said, abs=1e-9)


def test_bad_style_and_columns(table):
    with pytest.raises(ValueError, match="sloppy.*full"):
        write_notes(table, "sloppy")
    with pytest.raises(ValueError, match="snr"):
        write_notes(table.drop(columns="snr"))


def test_prompts():
    assert read_note(PROMPT) == ("62-year-old woman, at the apex", "grade IV holosystolic murmur", "")
    said = attributes_in([read_note(PROMPT)]).iloc[0].dropna().to_dict()
    assert said == {"age": 62, "sex": "F", "site": "MV", "timing": "Holosystolic", "grade": 4, "phase": "systolic"}
    many = {"Boy of 6 with Still's murmur": {"age": 6, "sex": "M", "condition": "Still", "outcome": "Normal"},
            "MR": {"condition": "MR", "outcome": "Abnormal"}, "S3 gallop": {"condition": "S3", "outcome": "Abnormal"}, "an opening snap": {"extra": "snap"},
            "HR 120; harsh high-pitched systolic murmur 3/6, no S3": {"rate": 120, "quality": "Harsh", "pitch": "High", "phase": "systolic", "grade": 3},
            "infant without a murmur": {"age": 0.5, "grade": 0, "phase": "none"},
            "mitral stenosis rather than aortic stenosis": {"condition": "MS", "outcome": "Abnormal"}}
    for text, wanted in many.items():
        assert attributes_in([read_note(text)]).iloc[0].dropna().to_dict() == wanted, text
    with pytest.raises(ValueError, match="empty"):
        read_note("  ")
    for text, why in {"grade IX murmur at the apex": "no grade IX", "grade VI early diastolic murmur": "I to IV", "grade 7 murmur": "no grade 7", "HR 900": "outside 45", "300-year-old man": "outside 0"}.items():
        with pytest.raises(ValueError, match=why):
            read_note(text)
    assert read_note("grade VI holosystolic murmur, HR 45")[1] and read_note("grade IV early diastolic murmur")[1]
    for text in ("hello", "a lovely sound as it was"):
        with pytest.raises(ValueError, match="mitral regurgitation"):
            read_note(text)


def test_a_note_read_as_a_prompt_says_the_same(table):
    notes = write_notes(table)
    pd.testing.assert_frame_equal(attributes_in([read_note(" ".join(note)) for note in notes]), attributes_in(notes))


def test_graph_is_what_the_conditions_say():
    joined = adjacency()
    assert torch.equal(joined, joined.T) and not joined.diagonal().any() and len(set(NODES)) == len(NODES) == len(joined)
    for c in CONDITIONS:
        for timing in TIMINGS:
            assert joined[NODE["condition", c.key], NODE["timing", timing]] == (timing in c.timings)
        others = differentials(c.key)
        assert len(set(others) | {c.key}) == 3 and set(others) <= set(CONDITION)
    assert {edge for _, edge, _ in EDGES} == {"has", "heard-at", "suggests", "in-age"} and all(a[0] == "condition" for a, _, _ in EDGES)


def test_own_nodes_and_levels(table):
    nodes = nodes_of(table)
    own = own_nodes(nodes)
    assert own.shape == (len(table), len(NODES)) and own.sum(1).tolist() == [len(index) for index, _ in nodes]
    for (index, level), line in zip(nodes, table.to_dict("records")):
        assert {NODES[k] for k in index} == set(facts_of(line).items()) and (level == NODE_LEVEL[index]).all()
    assert all(LEVELS[NODE_LEVEL[NODE[node]]] == "diagnosis" for node in (("condition", "AS"), ("outcome", "Abnormal")))
    assert len(nodes_of(row())[0][0]) == 0


def test_text_embedding_is_the_mean_of_its_tokens(encoder, table):
    notes = [*write_notes(table[:40]), ("", "No murmur.", "")]
    vectors = encoder.embed(notes)
    assert vectors.shape == (41, 3, 16) and not vectors[-1, 0].any() and vectors[-1, 1].any()
    for k, level in ((0, 0), (17, 1), (40, 1)):
        alone = encoder.tokens([notes[k][level]])                # one text, no padding
        with torch.no_grad():
            state = encoder.model.base_model(**alone).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vectors[k, level], state, atol=1e-5, rtol=1e-4)
    flipped = encoder.embed(notes[::-1]).flip(0)
    torch.testing.assert_close(flipped, vectors)


def test_text_encoder_learns_and_is_reproducible(table):
    notes = write_notes(table)
    losses, vocabularies = [], []
    for _ in range(2):
        torch.manual_seed(0)
        encoder = TextEncoder.fresh(notes, vocabulary=300, width=16, depth=1, heads=2, longest=64)
        config = FitConfig(steps=60, batch_size=32, lr=1e-2, warmup=5, ema=0, precision="fp32", save_every=60)
        for training in fit(encoder, loader(encoder.table(notes), 32), config):
            pass
        losses.append([point["loss"] for point in training.history])
        vocabularies.append(encoder.tokenizer.get_vocab())
    assert losses[0] == losses[1] and losses[0][-1] < 0.9 * losses[0][0] and vocabularies[0] == vocabularies[1]


def test_text_encoder_folders(encoder, table, tmp_path):
    notes = write_notes(table[:5])
    encoder.save(tmp_path / "own")
    assert {"model.safetensors", "tokenizer.json", "config.json"} <= {file.name for file in (tmp_path / "own").iterdir()}
    again = TextEncoder.load(tmp_path / "own").eval()
    assert torch.equal(again.embed(notes), encoder.embed(notes)) and again.longest == encoder.longest
    assert torch.isfinite(again.loss(again.table(notes)))
    hub = TextEncoder.from_hub(str(tmp_path / "own"))                           # the same folder as any encoder of the hub
    torch.testing.assert_close(hub.embed(notes), encoder.embed(notes))
    with pytest.raises(ValueError, match="TextEncoder.fresh"):
        hub.loss(hub.table(notes))


def test_another_bert(encoder, tmp_path):
    BertModel(BertConfig(vocab_size=len(encoder.tokenizer), hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)).save_pretrained(tmp_path / "tiny")
    encoder.tokenizer.save_pretrained(tmp_path / "tiny")
    assert TextEncoder.from_hub(str(tmp_path / "tiny")).embed([("a", "", "No murmur.")]).shape == (1, 3, 24)
    with pytest.raises(ValueError, match="cannot be had.*config.json"):
        TextEncoder.from_hub(str(tmp_path / "nothing here"))


@pytest.fixture
def graph() -> GraphEncoder:
    torch.manual_seed(0)
    return GraphEncoder(nodes=len(NODES), width=16).eval()


def test_graph_vectors_agree_with_sparse_graphsage(graph, table):
    "One PyG sub-graph per patient and SAGEConv with the same weights."
    own = own_nodes(nodes_of(table[:12]))
    here, edges = graph.subgraph(own)
    convs = []
    for dense in (graph.first, graph.second):
        conv = SAGEConv(16, 16, aggr="mean")
        conv.lin_l.load_state_dict({"weight": dense.lin_rel.weight, **({"bias": dense.lin_rel.bias} if dense.lin_rel.bias is not None else {"bias": dense.lin_root.bias})})
        conv.lin_r.load_state_dict({"weight": dense.lin_root.weight})
        convs.append(conv)
    parts = []
    for k in range(len(own)):
        places = here[k].nonzero()[:, 0]
        parts.append(Data(x=(graph.node + own[k, :, None] * graph.own)[places], edge_index=edges[k][places][:, places].nonzero().T, mine=own[k, places]))
    batch = Batch.from_data_list(parts)
    with torch.no_grad():
        state = convs[1](torch.nn.functional.silu(convs[0](batch.x, batch.edge_index)), batch.edge_index)
        wanted = torch.stack([state[(batch.batch == k) & batch.mine].mean(0) for k in range(len(own))])
        torch.testing.assert_close(graph(own), wanted, atol=1e-5, rtol=1e-4)


def test_graph_hears_only_the_told_levels(graph, table):
    vectors = graph.embed(nodes_of(table))
    assert vectors.shape == (len(table), len(SUBSETS), 16) and not vectors[:, 0].any() and vectors[:, 7].any(1).all()
    other = table.copy()
    other["condition"], other["outcome"] = "normal", "Normal"
    changed = graph.embed(nodes_of(other))
    for subset in SUBSETS:
        assert torch.equal(vectors[:, subset], changed[:, subset]) == (subset < 4), subset     # bit 2 alone knows the diagnosis
    torch.testing.assert_close(graph.embed(nodes_of(table), subsets=(7,))[:, 0], graph(own_nodes(nodes_of(table))).detach(), atol=1e-5, rtol=1e-4)
    assert not graph.embed(nodes_of(row())).any()


def test_graph_loss_is_about_kinds(graph, table):
    "An indifferent guesser pays log of the number of nodes of the hidden kind."
    torch.nn.init.zeros_(graph.guess.weight)
    torch.nn.init.zeros_(graph.guess.bias)
    own = torch.zeros(5, len(NODES), dtype=torch.bool)
    own[:, NODE["pitch", "High"]] = True
    assert graph.loss({"own": own}).item() == pytest.approx(math.log(3), abs=1e-5)


def test_graph_encoder_folder(graph, table, tmp_path):
    graph.save_pretrained(tmp_path)
    again = GraphEncoder.from_pretrained(tmp_path)
    assert torch.equal(again.embed(nodes_of(table)), graph.embed(nodes_of(table)))
    with pytest.raises(ValueError, match="train it again"):
        GraphEncoder(nodes=12, width=8)


def inputs(n: int = 6) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    graph = torch.randn(n, 8, 5)
    graph[:, 0] = 0
    return dict(text=torch.randn(n, 3, 4), graph=graph, label=torch.arange(n), told=torch.full((n,), 7))


@pytest.mark.parametrize("kind, heard", [("both", {"text", "graph"}), ("text", {"text"}), ("graph", {"graph"}), ("labels", {"label"})])
def test_fuser_listens_to_its_kind(kind, heard):
    torch.manual_seed(0)
    fuser, given = ConditionFuser(4, 5, 8, kind, 17), inputs()
    given["label"] = given["label"] + 1
    c = fuser(**given)
    assert c.shape == (6, 8)
    for name in ("text", "graph", "label"):
        changed = given | {name: given[name] - 1}
        assert torch.allclose(fuser(**changed), c) == (name not in heard), name
    untold = given | {"told": torch.zeros(6, dtype=torch.int64)}
    empty = fuser(**untold)
    torch.testing.assert_close(empty, empty[:1].expand(6, -1))                   # nothing told: all are the same
    assert not torch.allclose(empty, c)
    assert torch.equal(fuser.lambdas, torch.tensor([0.5 * ("text" in heard), 0.5 * ("graph" in heard)]))


def test_untold_levels_have_no_influence():
    torch.manual_seed(0)
    fuser, given = ConditionFuser(4, 5, 8, "both", 17), inputs()
    given["told"] = torch.tensor([0, 1, 2, 3, 5, 7])
    c = fuser(**given)
    for level in range(3):
        moved = given["text"].clone()
        moved[:, level] += 1
        same = (fuser(**given | {"text": moved}) - c).abs().amax(1) == 0
        assert same.tolist() == [not told >> level & 1 for told in (0, 1, 2, 3, 5, 7)]
    labels = ConditionFuser(4, 5, 8, "labels", 17)(**given)
    assert torch.equal(labels[0], labels[3]) and not torch.equal(labels[0], labels[4])      # a label is told with the diagnosis


def test_fuser_measures_and_learns():
    torch.manual_seed(0)
    fuser, given = ConditionFuser(4, 5, 8, "both", 17), inputs(500)
    given["label"] = torch.zeros(500, dtype=torch.int64)
    text = 100 + 0.01 * given["text"]
    text[:50, 2] = 0                                                                 # empty texts do not count
    fuser.measure(text, given["graph"])
    torch.testing.assert_close(fuser.text.mean[2], text[50:, 2].mean(0))
    heard = fuser.text(text, torch.ones(500, 3, dtype=torch.bool))
    assert heard[50:].mean().abs() < 1e-2 and heard[50:].std().item() == pytest.approx(1, abs=0.05)
    assert torch.equal(heard[:50, 2], fuser.text.silence[2].expand(50, -1))
    fuser(**given | {"text": text})[:, 0].sum().backward()
    assert fuser.weights.grad.abs().min() > 0
    with pytest.raises(ValueError, match="both, text, graph or labels"):
        ConditionFuser(4, 5, 8, "songs", 17)


def test_linear_probe():
    rng = np.random.default_rng(0)
    y = rng.integers(3, size=600)
    x = np.eye(3)[y] + 0.1 * rng.normal(size=(600, 3))
    assert linear_probe(x[:300], y[:300], x[300:], y[300:]) == 1
    assert linear_probe(rng.normal(size=(300, 3)), y[:300], x[300:], y[300:]) < 0.6
    assert linear_probe(torch.tensor(x[:300]), y[:300], torch.tensor(x[300:]), y[300:]) == 1


def test_real_metadata_make_notes():
    "CirCor's words, as `prepare` gives them."
    from medgen_nb.pcg.data import Recording
    fields = {"Age": "Child", "Sex": "Female", "Murmur": "Present", "Murmur locations": "AV+MV", "Systolic murmur timing": "Holosystolic", "Systolic murmur shape": "Plateau",
              "Systolic murmur grading": "III/VI", "Systolic murmur pitch": "High", "Systolic murmur quality": "Harsh", "Outcome": "Abnormal"}
    record = Recording(np.zeros(4000, np.float32), 4000, "1_AV", "1", "AV", np.zeros((0, 3)), fields, ())
    frame = typed(pd.DataFrame([attributes_of(record)], columns=list(ATTRIBUTES)))
    for style in STYLES:
        said = attributes_in(write_notes(frame, style)).iloc[0].dropna().to_dict()
        assert said == {"site": "AV", "age": 6, "sex": "F", "timing": "Holosystolic", "shape": "Plateau", "grade": 3, "pitch": "High", "quality": "Harsh",
                        "phase": "systolic", "outcome": "Abnormal"}
