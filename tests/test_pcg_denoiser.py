"Contracts of the heart-sound denoiser: attention against torch's own, switches, what is told and what is not, folders that give back the same, bad input."
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from medgen_nb.data import loader
from medgen_nb.diffusion import sample
from medgen_nb.pcg.condition import SUBSETS
from medgen_nb.pcg.data import CONDITIONS, TRACKS
from medgen_nb.pcg.denoiser import CondBlock, MedicalAttention, PcgDenoiser, StructuredNoise, from_tokens
from medgen_nb.pcg.vae import SLOW, slices_of, unroll
from medgen_nb.training import FitConfig, fit

SIZES = dict(channels=(2, 3, 3, 1), tokens=2 * SLOW, width=16, cond=8, heads=2, text_width=6, graph_width=5, listens="both", mask=True, single=False,
             sparse=0.01, rhythm=1.0, untold=0.2, steps=50, kind="epsilon")
ROWS, NUMBERS, STEPS = 12, 2 * SLOW + 7, 2


def fresh(**changes) -> PcgDenoiser:
    torch.manual_seed(0)
    return PcgDenoiser(**SIZES | changes)


def stirred(**changes) -> PcgDenoiser:
    "No weight is zero, so that every part has a say."
    model = fresh(**changes).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return {"z": torch.randn(ROWS, NUMBERS, STEPS, generator=g), "text": torch.randn(ROWS, 3, 6, generator=g), "graph": torch.randn(ROWS, 8, 5, generator=g),
            "label": torch.arange(ROWS) % len(CONDITIONS)}


def told(bits: int) -> torch.Tensor:
    return torch.full((ROWS,), bits)


# ------------------------------------------------------------------------------------------------ parts
def by_hand(part: MedicalAttention, h: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    "The same attention through torch's own function, heads cut by hand."
    q, k, v = part.qkv(part.norm(h)).chunk(3, 1)
    cut = lambda x: x.unflatten(1, (part.heads, -1)).transpose(2, 3)
    heard = F.scaled_dot_product_attention(cut(q), cut(k), cut(v), attn_mask=bias)
    return h + part.out(heard.transpose(2, 3).flatten(1, 2))


def test_zero_mask_is_plain_attention_and_a_mask_is_added():
    torch.manual_seed(0)
    part, h = MedicalAttention(8, 2, 20), torch.randn(3, 8, 20)
    torch.testing.assert_close(part(h), by_hand(part, h, None), atol=1e-5, rtol=1e-5)
    torch.nn.init.normal_(part.lag); torch.nn.init.normal_(part.free)
    assert not torch.allclose(part(h), by_hand(part, h, None), atol=1e-3)
    torch.testing.assert_close(part(h), by_hand(part, h, part.mask()[None]), atol=1e-5, rtol=1e-5)


def test_mask_by_lag_says_who_listens_to_whom():
    part = MedicalAttention(4, 2, 9)
    with torch.no_grad():
        part.lag[:, 9 - 1 + 3] = 2.0                      # three tokens later
        part.free[5, 5] = 9.0
    mask = part.mask()
    assert mask.shape == (2, 9, 9) and mask[1, 2, 5] == 2 and mask[1, 5, 2] == 0 and mask[0, 5, 5] == 9
    torch.testing.assert_close(part.by_lag(), torch.tensor([1.0, 0, 0, 1.0, 0, 0, 0, 0, 0]))   # half of both directions; one of nine moments
    by_moment = torch.stack([mask[..., i, j].mean() * (abs(i - j) == 3) for i in range(9) for j in range(9)]).sum() / 12
    torch.testing.assert_close(part.by_lag()[3], by_moment)


def test_block_starts_as_identity_and_listens_afterwards():
    torch.manual_seed(0)
    block, h, cond = CondBlock(8, 8, 4), torch.randn(2, 8, 11), torch.randn(2, 4)
    assert torch.equal(block(h, cond), h)
    wider = CondBlock(8, 16, 4)
    assert torch.equal(wider(h, cond), wider.skip(h))
    for weight in block.parameters(): torch.nn.init.normal_(weight)
    assert (block(h, cond) - block(h, 2 * cond)).abs().max() > 1e-3


@pytest.mark.parametrize("fast", [1, 2])
def test_tokens_and_back(fast):
    z = torch.randn(3, fast * SLOW + 4, 5)
    h = unroll(z, slices_of((fast, 1, 2, 1)))
    assert h.shape == (3, fast + 4, 5 * SLOW)
    torch.testing.assert_close(from_tokens(h, fast), z)
    assert torch.equal(h[1, 0, 2 * SLOW : 3 * SLOW], z[1, :SLOW, 2])                          # token by token, in order of time
    assert torch.equal(h[1, fast, 2 * SLOW : 3 * SLOW], z[1, fast * SLOW, 2].expand(SLOW))    # once per slow step



def test_structured_noise_is_the_weighted_sum_of_its_heads():
    torch.manual_seed(0)
    noise, h, noisy, cond = StructuredNoise(6, (2, 3, 3, 1), 4, False), torch.randn(5, 6, 13), torch.randn(5, 9, 13), torch.randn(5, 4)
    assert torch.equal(noise.weights(cond), torch.full((5, 4), 0.25))
    torch.nn.init.normal_(noise.weigh.weight)
    w = noise.weights(cond)
    torch.testing.assert_close(w.sum(1), torch.ones(5))
    assert w.std(0).min() > 0.01
    parts = [head(torch.cat([h, part], 1)) for head, part in zip(noise.heads, noisy.split((2, 3, 3, 1), 1))]
    torch.testing.assert_close(noise(h, noisy, cond), 4 * sum(w[:, i, None, None] * parts[i] for i in range(4)))
    nudged = noisy.clone(); nudged[:, 2:5] += 1                                               # only the head of S1/S2 reads these
    changed = (noise.said(h, nudged) - noise.said(h, noisy)).abs().amax((0, 2, 3)) > 1e-4
    assert changed.tolist() == [False, True, False, False]


# ------------------------------------------------------------------------------------------------ the model
def test_shapes_and_that_the_time_and_the_condition_matter(batch):
    model = stirred()
    c = model.condition(batch, told(7))
    said = model.predict(batch["z"], torch.full((ROWS,), 5), c)
    assert c.shape == (ROWS, 8) and said.shape == batch["z"].shape
    assert torch.equal(said, model(batch["z"], torch.full((ROWS,), 5), c))
    assert not torch.allclose(said, model.predict(batch["z"], torch.full((ROWS,), 40), c), atol=1e-4)
    assert not torch.allclose(said, model.predict(batch["z"], torch.full((ROWS,), 5), c.flip(0)), atol=1e-4)


def test_rows_do_not_see_each_other(batch):
    model, t = stirred(), torch.arange(ROWS)
    c = model.condition(batch, told(7))
    torch.testing.assert_close(model.predict(batch["z"][:3], t[:3], c[:3]), model.predict(batch["z"], t, c)[:3], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changes", [{}, {"single": True}, {"mask": False}, {"listens": "text"}, {"listens": "graph"}, {"listens": "labels"}], ids=str)
def test_gradients_reach_all_parts(batch, changes):
    model = stirred(**changes | {"untold": 0.3})
    torch.manual_seed(0)
    model.loss(batch).backward()
    deaf = {"both": ("label",), "text": ("label", "g.", "graph"), "graph": ("label", "f.", "text"), "labels": ("f.", "g.", "text", "graph", "weights")}[model.config.listens]
    for name, weight in model.named_parameters():
        unused = name.startswith(tuple(f"fuse.{part}" for part in deaf)) or model.config.single and name.startswith("noise.weigh")
        reached = weight.grad is not None and bool(weight.grad.abs().max() > 0)
        assert reached != unused, name


def test_switches_change_only_what_they_name():
    names = lambda **changes: {name: weight.shape for name, weight in fresh(**changes).state_dict().items()}
    base = names()
    without = {name for name in base if name.endswith((".lag", ".free"))}
    assert len(without) == 4 and names(mask=False) == {name: shape for name, shape in base.items() if name not in without}
    single = {name for name in base.keys() ^ names(single=True).keys()}
    assert single and all(name.startswith("noise.heads") for name in single)
    assert len(fresh().noise.heads) == len(TRACKS) and len(fresh(single=True).noise.heads) == 1
    assert all(fresh(listens=kind).fuse.kind == kind for kind in ("both", "text", "graph", "labels"))


def test_without_a_mask_it_is_the_same_function_as_a_zero_mask(batch):
    masked, plain = fresh(), fresh(mask=False)
    plain.load_state_dict({name: weight for name, weight in masked.state_dict().items() if not name.endswith((".lag", ".free"))})
    t = torch.arange(ROWS)
    torch.testing.assert_close(masked.predict(batch["z"], t, masked.condition(batch, told(7))), plain.predict(batch["z"], t, plain.condition(batch, told(7))), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("listens", ["both", "text", "graph", "labels"])
def test_untold_is_not_heard(batch, listens):
    model, other = stirred(listens=listens), {key: value.flip(0) if value.is_floating_point() else (value + 3) % len(CONDITIONS) for key, value in batch.items()}
    assert torch.equal(model.condition(batch, told(0)), model.condition(other, told(0)))
    torch.testing.assert_close(model.condition(batch, told(0)), model.condition(batch, told(0))[:1].expand(ROWS, -1))
    assert not torch.allclose(model.condition(batch, told(7)), model.condition(other, told(7)), atol=1e-4)


def test_one_level_is_heard_alone(batch):
    model = stirred(listens="text")
    other = batch | {"text": batch["text"].clone()}
    other["text"][:, 2] += 1                                # what the diagnosis says
    assert torch.equal(model.condition(batch, told(3)), model.condition(other, told(3)))
    assert not torch.allclose(model.condition(batch, told(4)), model.condition(other, told(4)), atol=1e-4)


@pytest.mark.parametrize("levels", [0, 1, 3, 7])
def test_what_training_tells(levels):
    model = fresh(untold=0.1)
    model.levels = levels
    torch.manual_seed(0)
    drawn = model.draw_told(20_000, torch.device("cpu"))
    assert drawn.dtype == torch.int64 and set(drawn.tolist()) == {s for s in SUBSETS if s & levels == s}
    count = bin(levels).count("1")
    assert abs((drawn == levels).float().mean().item() - (0.9 ** (count + 1) if levels else 1)) < 0.015
    assert abs((drawn == 0).float().mean().item() - (0.1 + 0.9 * 0.1 ** count if levels else 1)) < 0.015


def test_untold_at_its_ends():
    assert fresh(untold=0.0).draw_told(100, "cpu").eq(7).all() and fresh(untold=1.0).draw_told(100, "cpu").eq(0).all()


def test_loss_by_hand(batch):
    model = stirred(sparse=0.0)
    torch.manual_seed(3)
    loss = model.loss(batch)
    torch.manual_seed(3)
    t, eps = torch.randint(0, 50, (ROWS,)), torch.randn_like(batch["z"])
    zt, tell = model.scheduler.add_noise(batch["z"], eps, t), model.draw_told(ROWS, "cpu")
    error = (model.predict(zt, t, model.condition(batch, tell)) - eps).square()                    # (b, numbers, steps)
    torch.testing.assert_close(loss, error.mean())
    heard, rhythm = stirred(sparse=0.0, rhythm=4.0), model.config.channels[0] * SLOW
    torch.manual_seed(3)
    share = 4 * rhythm / (4 * rhythm + error.shape[1] - rhythm)
    torch.testing.assert_close(heard.loss(batch), share * error[:, :rhythm].mean() + (1 - share) * error[:, rhythm:].mean())
    dear = stirred(sparse=0.5)
    torch.manual_seed(3)
    price = sum(part.mask().abs().mean() for part in (dear.listen_in, dear.listen_out))
    torch.testing.assert_close(dear.loss(batch), loss + 0.5 * price)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_trained_with_fit_it_learns(batch, kind):
    model = fresh(kind=kind, untold=0.0)
    torch.manual_seed(0)
    model.fuse.measure(batch["text"], batch["graph"])
    rows = 64
    many = {key: value.repeat(8, *[1] * (value.ndim - 1))[:rows] for key, value in batch.items()}
    many["z"] = many["z"][:, :, :1].expand(-1, -1, STEPS).contiguous()
    config = FitConfig(steps=60, batch_size=32, lr=3e-3, precision="fp32")
    history = [state.loss.item() for state in fit(model, loader(many, 32, seed=0), config, device="cpu")]
    assert sum(history[-10:]) < 0.85 * sum(history[:10])


def test_sampling_through_diffusers(batch):
    model = stirred()
    for other in (DDIMScheduler, DPMSolverMultistepScheduler):                    # diffusers forgets what was not given by name
        assert other.from_config(model.scheduler.config).config.num_train_timesteps == 50
    c = model.condition(batch, told(7))
    draw = lambda seed: sample(lambda zt, t: model.predict(zt, t, c), DDIMScheduler.from_config(model.scheduler.config), (ROWS, NUMBERS, STEPS), 5, torch.Generator().manual_seed(seed))
    assert draw(0).shape == batch["z"].shape and torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


@pytest.mark.parametrize("changes", [{}, {"mask": False, "single": True, "listens": "labels"}], ids=str)
def test_saved_and_loaded_equal(batch, tmp_path, changes):
    model = stirred(**changes)
    model.fuse.measure(batch["text"], batch["graph"])
    model.save_pretrained(tmp_path)
    again, t = PcgDenoiser.from_pretrained(tmp_path), torch.arange(ROWS)
    assert not again.training and (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    assert torch.equal(again.predict(batch["z"], t, again.condition(batch, told(7))), model.predict(batch["z"], t, model.condition(batch, told(7))))
    assert again.scheduler.config.prediction_type == "epsilon" and again.levels == 7


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("changes, says", [({"tokens": 20}, "multiple of 13"), ({"cond": 7}, "even"), ({"channels": (2, 3, 3)}, "one per sub-space"), ({"channels": (2, 3, 0, 1)}, "at least 1"),
                                           ({"heads": 3}, "multiple of the heads"), ({"untold": 1.5}, "chance"), ({"sparse": -1.0}, "finite"), ({"rhythm": 0.0}, "above 0"), ({"kind": "eps"}, "epsilon"), ({"listens": "all"}, "choose")], ids=str)
def test_sizes_that_do_not_fit(changes, says):
    with pytest.raises(ValueError, match=says):
        fresh(**changes)


def test_input_that_does_not_fit(batch):
    model, t = fresh(), torch.arange(ROWS)
    c = model.condition(batch, told(7))
    for z, cond in ((batch["z"][:, :-1], c), (batch["z"][..., :1], c), (batch["z"], c[:, :-1]), (batch["z"], c[:-1])):
        with pytest.raises(ValueError, match="autoencoder"):
            model.predict(z, t, cond)
    for wrong in ({"text": batch["text"][:, :2]}, {"graph": batch["graph"][:-1]}, {"label": batch["label"][:, None]}):
        with pytest.raises(ValueError, match=f"wrong: {next(iter(wrong))}"):
            model.condition(batch | wrong, told(7))
    with pytest.raises(ValueError, match="label missing"):
        model.condition({key: batch[key] for key in ("text", "graph")}, told(7))
    for bits in (-1, 8):
        with pytest.raises(ValueError, match="wrong: told"):
            model.condition(batch, told(bits))
    with pytest.raises(ValueError, match="needs a latent z"):
        model.loss({"text": batch["text"]})
    model.levels = 8
    with pytest.raises(ValueError, match="bitmask"):
        model.loss(batch)


def test_parts_that_do_not_fit():
    with pytest.raises(ValueError, match="26 tokens"):
        MedicalAttention(4, 2, 26)(torch.randn(1, 4, 39))
    with pytest.raises(ValueError, match="without a mask"):
        MedicalAttention(4, 2, 0).by_lag()
    assert MedicalAttention(4, 2, 0).mask() is None and MedicalAttention(4, 2, 0)(torch.randn(1, 4, 39)).shape == (1, 4, 39)
    with pytest.raises(ValueError, match="multiple of 13"):
        from_tokens(torch.randn(1, 5, 27), 2)
