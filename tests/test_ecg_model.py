"Contracts of the ECG models: the released code's sizes and shapes, equalities, every switch, what is refused, and a folder that gives back the same pipeline."
import importlib.util
import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen_nb.ecg.model import (CHOICES, SEVERAL, TAPS, Contrast, DifferentialAttention, EcgConfig, EcgPipeline, EcgTransformer, LeadEncoder, PlainAttention, Prna,
                                 PrnaConfig, contrastive_loss, info_nce, positions, token_counts, windows)

ROOT = Path(__file__).resolve().parents[1]
ORACLE = ROOT.parent / "shared" / "oracles" / "ecg_reference.json"
PAPER = dict(classes=27, samples=7500, width=288, heads=8, hidden=2048, layers=(4, 4, 4), conv="depthwise", conv_layers=6, attention="differential",
             cls="passed", gate="off", wide=22, dropout=0.1)
PRNA = dict(classes=27, samples=7500, width=256, heads=8, hidden=2048, layers=8, wide=22, dropout=0.1)
TEACH = PAPER | dict(samples=2500, width=96, heads=4, hidden=384, layers=(1, 1, 1), gate="released")
TINY = PAPER | dict(classes=3, samples=1000, width=24, heads=2, hidden=32, layers=(1, 1, 1), gate="released")


def make(**changes) -> EcgTransformer:
    "A small model in eval mode whose learned tokens are not nearly zero."
    torch.manual_seed(0)
    model = EcgTransformer(EcgConfig(**TINY | changes)).eval()
    if model.read.tokens is not None:
        torch.nn.init.normal_(model.read.tokens)
    return model


def batch(n: int = 4, samples: int = 1000, classes: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {"signal": torch.rand(n, 12, samples, generator=draw) * 2 - 1, "wide": torch.randn(n, 22, generator=draw),
            "labels": torch.randint(2, (n, classes), generator=draw).float()}


def size(*parts) -> int:
    return sum(p.numel() for part in parts for p in (part.parameters() if isinstance(part, torch.nn.Module) else [part]))


@pytest.fixture(scope="module")
def oracle() -> dict:
    if not ORACLE.exists():
        pytest.skip("../shared/oracles/ecg_reference.json is not here: sizes and shapes of the released code are compared where it is")
    return json.loads(ORACLE.read_text())


def test_parameter_counts_are_the_released_codes(oracle):
    counts = oracle["parameter_counts"]
    for gate, name in (("off", "gate_off"), ("released", "gate_on")):
        with torch.device("meta"):
            model = EcgTransformer(EcgConfig(**PAPER | {"gate": gate}))
        theirs, decide = counts[name]["by_submodule"], model.decide
        assert size(model) == counts[name]["total"]
        assert size(model.convolve) == theirs["encoder"] and size(model.read.tokens) == theirs["transformer.cls_token"]
        assert size(model.read.stages) == theirs["transformer.layers"]
        if gate != "off":
            assert size(decide.content, decide.opening, decide.score) == theirs["global_attn_pool"] and size(decide.rho) == theirs["global_rho"]
            assert size(decide.lift) == theirs["wide_project"] and size(decide.answers) == theirs["classifiers"]
        else:
            assert size(decide.deep) == theirs["fc1"] and size(decide.answer) == theirs["fc2"]
    for conv, norm, found in zip(model.convolve.convs, model.convolve.norms, counts["encoder_conv_layers"]):
        assert (size(conv), size(norm)) == (found["conv"], found["batchnorm"])
    one, layer = counts["one_transformer_layer"], model.read.stages[1][2]
    assert [size(layer), size(layer.attention), size(layer.up), size(layer.down)] == [one["total"], one["self_attn"], one["linear1"], one["linear2"]]
    starts = [layer.attention.start for stage in model.read.stages for layer in stage]
    assert starts == pytest.approx(oracle["lambda_init_by_layer"])


def test_prna_has_the_described_size(oracle):
    with torch.device("meta"):
        model = Prna(PrnaConfig(**PRNA))
    theirs = oracle["prna_baseline_rebuilt"]
    assert size(model) == theirs["total"] and size(model.convolve) == theirs["by_submodule"]["encoder"]
    assert size(model.read) == theirs["by_submodule"]["transformer"]
    assert size(model.decide.deep) == theirs["by_submodule"]["fc1"] and size(model.decide.answer) == theirs["by_submodule"]["fc2"]


@pytest.mark.parametrize("gate", ["off", "released"])
def test_shapes_are_the_released_codes(oracle, gate):
    theirs = oracle["shapes_input_then_outputs"]["gate_off" if gate == "off" else "gate_on"]
    with torch.device("meta"):
        model = EcgTransformer(EcgConfig(**PAPER | {"gate": gate})).eval()
    found, note = {}, lambda name: lambda module, given, made: found.update({name: [tuple(given[0].shape), tuple(made.shape)]})
    for i, conv in enumerate(model.convolve.convs):
        conv.register_forward_hook(note(f"encoder.{3 * i}"))
    for s, stage in enumerate(model.read.stages):
        stage[0].register_forward_hook(note(f"transformer.transformer_encoder.{4 * s}"))
    positions.cache_clear()
    answer = model(torch.randn(2, 12, 7500, device="meta"), torch.randn(2, 22, device="meta"))
    positions.cache_clear()
    for name, (given, made) in found.items():
        if name.startswith("transformer"):   # theirs: tokens first
            given, made = ([shape[1], shape[0], shape[2]] for shape in (given, made))
        assert [list(given), list(made)] == theirs[name], name
    assert len(found) == 9 and list(answer.logits.shape) == theirs["output"]
    if gate != "off":
        assert model.decide.content.in_features == theirs["global_attn_pool"][0][2] and answer.lead_weights.shape == (2, 27, 12)


def test_windows_by_measuring_one():
    torch.manual_seed(0)
    encoder = LeadEncoder(24, "depthwise", taps=(2, 3, 4, 5, 6), layers=6).eval()
    seen, steps = windows()
    assert seen == [14, 53, 134, 296, 620, 944] and steps == [3, 9, 18, 36, 36, 36] and token_counts(7500, 6) == [2497, 828, 410, 201, 192, 183]
    signal = torch.randn(1, 12, 3000, requires_grad=True)
    for feature, wide in zip(encoder(signal), seen[1:]):
        gradient, = torch.autograd.grad(feature[0, feature.shape[1] // 2].sum(), signal, retain_graph=True)
        heard = gradient.abs().sum((0, 1)).nonzero()
        assert int(heard.max() - heard.min()) + 1 == wide


def test_depthwise_keeps_the_leads_apart():
    signal = batch()["signal"]
    changed = signal.clone()
    changed[:, 3] = changed[:, 3].flip(-1)
    for conv in CHOICES["conv"]:
        torch.manual_seed(0)
        encoder = LeadEncoder(24, conv, taps=(2, 4), layers=4).eval()
        moved = sum((a - b).abs().sum((0, 1)).unflatten(0, (12, -1)).sum(-1) for a, b in zip(encoder(signal), encoder(changed))) > 0
        assert moved.tolist() == [lead == 3 or conv == "ordinary" for lead in range(12)]


def test_differential_attention_is_its_formula():
    torch.manual_seed(0)
    attention, x = DifferentialAttention(24, 2, depth=2), torch.randn(3, 11, 24)
    torch.nn.init.normal_(attention.norm.weight)
    wq, wk, wv = attention.qkv.weight.double().chunk(3)
    q1, k1, q2, k2 = attention.lambdas.double()
    start = 0.8 - 0.6 * math.exp(-0.6)
    lam = (q1 * k1).sum().exp() - (q2 * k2).sum().exp() + start
    made = []
    for head in range(2):
        rows = slice(12 * head, 12 * head + 12)
        q, k, v = (x.double() @ w[rows].T for w in (wq, wk, wv))
        first, second = ((q[..., part] @ k[..., part].transpose(1, 2) / 6**0.5).softmax(-1) for part in (slice(0, 6), slice(6, 12)))
        read = (first - lam * second) @ v
        made.append(read / (read.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * attention.norm.weight * (1 - start))
    wanted = torch.cat(made, dim=-1) @ attention.out.weight.double().T
    torch.testing.assert_close(attention(x), wanted.float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(attention(x, keep=3), wanted[:, :3].float(), atol=1e-5, rtol=1e-5)


def test_plain_attention_is_the_librarys():
    torch.manual_seed(0)
    attention, theirs, x = PlainAttention(24, 2, 0), torch.nn.MultiheadAttention(24, 2, bias=False, batch_first=True), torch.randn(3, 11, 24)
    theirs.load_state_dict({"in_proj_weight": attention.qkv.weight, "out_proj.weight": attention.out.weight})
    torch.testing.assert_close(attention(x), theirs(x, x, x)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate", ["off", "released", "named"])
def test_equal_to_the_naive_structure(gate):
    spec = importlib.util.spec_from_file_location("bench_ecg", ROOT / "tests" / "bench" / "bench_ecg.py")
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    model, given = make(gate=gate, layers=(2, 1, 2)), batch()
    with torch.no_grad():
        torch.testing.assert_close(bench.Naive(model)(given["signal"], given["wide"]), model(given["signal"], given["wide"]).logits, atol=1e-5, rtol=1e-5)


SWITCHES = [dict(conv=conv, conv_layers=depth, attention=attention, cls=cls, gate=gate, layers=(1,) * stages)
            for conv, depth, attention, cls, gate, stages in itertools.product(*CHOICES.values(), (1, 2, 3, 4, 5))
            if stages in TAPS[depth] and (conv == "depthwise" or (attention, cls) == ("plain", "passed"))]   # convolutions and reading do not touch


def test_every_switch_trains_and_saying_fits(tmp_path):
    given = batch(2)
    for number, switches in enumerate(SWITCHES):
        model = EcgTransformer(EcgConfig(**TINY | switches))
        model.loss(given).backward()
        idle = {name for name, p in model.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()}
        assert idle == {f"convolve.norms.{switches['conv_layers'] - 1}.{what}" for what in ("weight", "bias")}, (switches, idle)
        if number % 20 == 0:
            model.eval().save_pretrained(tmp_path)
            again = EcgTransformer.from_pretrained(tmp_path)
            assert torch.equal(model(**{k: given[k] for k in ("signal", "wide")}).logits, again(given["signal"], given["wide"]).logits)
            assert again.config.layers == switches["layers"]


@pytest.mark.parametrize("cls", CHOICES["cls"])
def test_every_stage_reaches_the_decision(cls):
    reader = make(cls=cls, gate="off").read
    features = [torch.randn(2, n, 24) for n in (9, 6, 4)]
    decides = reader(features, every=False)
    for stage in range(3):
        assert (reader([f.flip(1) if i == stage else f for i, f in enumerate(features)], every=False) - decides).abs().max() > 1e-4
    torch.testing.assert_close(reader(features, every=True)[:, :1], decides, atol=1e-5, rtol=1e-5)
    assert reader(features, every=True).shape == (2, 20 if cls == "all" else 5, 24)
    assert (None if reader.tokens is None else reader.tokens.shape[:2]) == {"passed": (1, 1), "fresh": (3, 1), "several": (1, SEVERAL), "all": (1, 1), "mean": None}[cls]


def test_lead_weights():
    given, model = batch(), make()
    answer = model(given["signal"], given["wide"])
    assert answer.lead_weights.shape == (4, 3, 12)
    torch.testing.assert_close(answer.lead_weights.sum(-1), torch.ones(4, 3))
    assert make(gate="off")(given["signal"], given["wide"]).lead_weights is None
    torch.nn.init.zeros_(model.decide.score.weight)                  # all channels alike: a twelfth each
    torch.testing.assert_close(model(given["signal"], given["wide"]).lead_weights, torch.full((4, 3, 12), 1 / 12))
    favourite = torch.zeros(2, 5, 24)
    favourite[:, :, 14:16] = 5                                       # channels of lead 7
    from medgen_nb.ecg.model import GatedHead
    head = GatedHead(5, 24, 0, 3, 0.0, named=False)
    for linear in (head.content, head.score):
        torch.nn.init.ones_(linear.weight)
    assert head(favourite, None)[1].argmax(-1).eq(7).all()


def test_teach_size_and_no_wide():
    model, given = EcgTransformer(EcgConfig(**TEACH | {"wide": 0})), batch(2, 2500, 27)
    assert model(given["signal"]).logits.shape == (2, 27)
    assert torch.equal(*(model.eval()(given["signal"], wide).logits for wide in (None, given["wide"])))   # given all the same: not read
    assert EcgTransformer(EcgConfig(**TEACH | {"classes": 24})).decide.answers.out_features == 24


def test_loss_is_binary_cross_entropy():
    given, model = batch(), make()
    p = model(given["signal"], given["wide"]).logits.double().sigmoid()
    wanted = -(given["labels"] * p.log() + (1 - given["labels"]) * (1 - p).log()).mean()
    assert model.loss(given).item() == pytest.approx(wanted.item(), rel=1e-5)


def test_start():
    torch.manual_seed(0)
    model = EcgTransformer(EcgConfig(**TEACH))
    bound = (6 / (2 * 96)) ** 0.5                                     # Xavier of a square matrix, though three are kept in one
    for stage in model.read.stages:
        assert 0.95 * bound < stage[0].attention.qkv.weight.abs().max() <= bound
    assert model.read.tokens.std() < 2e-6 and model.decide.score.weight.std().item() == pytest.approx(model.decide.score.in_features**-0.5, rel=0.2)
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith(".bias"))


@pytest.mark.parametrize("change, word", [({"width": 100}, "width"), ({"heads": 5}, "width"), ({"layers": ()}, "layers"), ({"layers": (1, 0)}, "layers"),
                                          ({"layers": (1,) * 5, "conv_layers": 4}, "layers"), ({"conv": "x"}, "conv"), ({"conv_layers": 5}, "conv_layers"),
                                          ({"attention": "x"}, "attention"), ({"cls": "x"}, "cls"), ({"samples": 900}, "samples")])
def test_configs_that_cannot_be_built(change, word):
    with pytest.raises(ValueError, match=word):
        EcgConfig(**TINY | change)


def test_inputs_that_do_not_fit():
    model, given = make(), batch()
    for signal, wide in ((given["signal"][..., :-1], given["wide"]), (given["signal"][:, :11], given["wide"]), (given["signal"], None), (given["signal"], given["wide"][:, :20])):
        with pytest.raises(ValueError, match="this model"):
            model(signal, wide)
    with pytest.raises(ValueError, match="width"):
        PrnaConfig(**PRNA | {"width": 100})


def test_prna_answers_alike(tmp_path):
    given, model = batch(), Prna(PrnaConfig(**PRNA | dict(classes=3, samples=1000, width=16, heads=2, hidden=32, layers=2))).eval()
    answer = model(given["signal"], given["wide"])
    assert answer.logits.shape == (4, 3) and answer.lead_weights is None and model.loss(given).isfinite()
    model.save_pretrained(tmp_path)
    assert torch.equal(Prna.from_pretrained(tmp_path)(given["signal"], given["wide"]).logits, answer.logits)


def test_info_nce():
    same = torch.nn.functional.normalize(torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert info_nce(same, same) < 0.2 < math.log(6) * 0.9 < info_nce(same, same.roll(1, 0))
    blind = torch.ones(6, 8) / 8**0.5
    assert info_nce(blind, blind).item() == pytest.approx(math.log(6))


def test_contrastive_trains_all_but_the_decision():
    contrast = Contrast(make(conv_layers=4), size=8)
    contrast.loss({"signal": batch(6)["signal"]}).backward()
    idle = {name.split(".")[1] for name, p in contrast.named_parameters() if p.grad is None and "norms.3" not in name}
    assert idle == {"decide"}
    with pytest.raises(ValueError, match="two records"):
        contrastive_loss(contrast, batch(1)["signal"])
    with pytest.raises(ValueError, match="too short"):
        contrastive_loss(Contrast(make(), size=8), batch(2)["signal"])


@pytest.fixture
def pipeline() -> EcgPipeline:
    from medgen_nb.ecg.data import Diagnosis, WideScaler
    names = [Diagnosis("1", "A", "an a"), Diagnosis("2", "B", "a b"), Diagnosis("3", "C", "a c")]
    return EcgPipeline(make(), WideScaler.fit(np.random.default_rng(0).normal(size=(20, 22))), names, [0.5, 0.0, 1.0], fs=250)


def curves(seconds: float, fs: float) -> np.ndarray:
    time = np.arange(round(seconds * fs)) / fs
    beat = np.exp(-(((time % 0.8) - 0.4) / 0.02) ** 2)
    return (beat * np.linspace(0.2, 1.5, 12)[:, None] + 0.01 * np.sin(7 * time)).astype(np.float32)


def test_pipeline_says_and_comes_back(pipeline, tmp_path):
    table, leads = pipeline(curves(6, 500), fs=500, age=60, sex="F")
    assert list(table.columns) == ["diagnosis", "probability", "threshold", "says"] and table.index.tolist() == ["A", "B", "C"]
    assert table.says.tolist() == [table.probability["A"] >= 0.5, True, False] and leads.shape == (3, 12) and leads.sum(axis=1).to_numpy() == pytest.approx(1)
    pipeline.save_pretrained(tmp_path)
    again, its_leads = EcgPipeline.from_pretrained(tmp_path)(curves(6, 500), fs=500, age=60, sex="F")
    assert again.equals(table) and its_leads.equals(leads)
    assert sorted(file.suffix for file in tmp_path.iterdir() if file.suffix != ".lock") == [".json", ".json", ".safetensors"]


def test_pipeline_refuses(pipeline, tmp_path):
    for signal, fs in ((curves(6, 500), None), (curves(6, 500).T, 500), (curves(6, 500)[:3], 500)):
        with pytest.raises(ValueError, match="array"):
            pipeline(signal, fs=fs)
    with pytest.raises(ValueError, match="thresholds"):
        EcgPipeline(pipeline.model, pipeline.scaler, pipeline.diagnoses, [0.5], 250)
    with pytest.raises(ValueError, match="scaler"):
        EcgPipeline(pipeline.model, None, pipeline.diagnoses, [0.5] * 3, 250)
    with pytest.raises(ValueError, match="pipeline"):
        EcgPipeline.from_pretrained(tmp_path)


def test_pipeline_reads_a_file(pipeline):
    found = sorted((ROOT.parent / "shared" / "real" / "ecg" / "challenge-2021").rglob("*.hea"))
    if not found:
        pytest.skip("../shared/real/ecg/challenge-2021 is not here: a real record is read where it is")
    table, leads = pipeline(found[0])
    assert table.probability.between(0, 1).all() and leads.notna().all(axis=None)
    assert table.equals(pipeline(str(found[0].with_suffix("")))[0])
