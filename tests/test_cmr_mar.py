"Contracts of masked autoregression: numbers of the released code, the bound against a slow version, what is hidden is not read, folders that give back the same, bad input."
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from medgen_nb.cmr.mar import (MaskedAutoregressor, Quantiser, SteadyAttention, TokenHead, decode_slowly, draw_from_head, draw_mask_ratio, fast_scheduler,
                               guidance_at, patchify, reveal_counts, step_bound, take, token_diffusion_loss, token_scheduler, unpatchify, variance_bounds)
from medgen_nb.data import loader
from medgen_nb.layers import Attention
from medgen_nb.training import FitConfig, fit

ORACLE = Path(__file__).resolve().parents[1].parent / "shared" / "oracles" / "cpgg_reference.json"
PAPER = dict(latent=(16, 25, 12, 12), patch=(5, 2, 2), width=768, depth=12, heads=12, phenotypes=82, uses=(True,) * 82, slots=64, head_width=1024, head_depth=3,
             untold=0.1, lowest=0.7, repeats=4, dropout=0.1, order="random", kind="continuous", groups=1, codes=2, steps=1000, says="epsilon", places="random")
SMALL = PAPER | dict(latent=(2, 4, 6, 4), patch=(2, 2, 2), width=16, depth=2, heads=2, phenotypes=3, uses=(True, True, False), slots=2, head_width=12, head_depth=2,
                     repeats=2, dropout=0.0, steps=50, groups=4, codes=5)
ROWS, TOKENS = 5, 12


@pytest.fixture(scope="module")
def oracle() -> dict:
    if not ORACLE.exists():
        pytest.skip("../shared/oracles/cpgg_reference.json is not here: numbers of the released code are compared where it is")
    return json.loads(ORACLE.read_text())


def fresh(**changes) -> MaskedAutoregressor:
    torch.manual_seed(0)
    return MaskedAutoregressor(**SMALL | changes)


def stirred(**changes) -> MaskedAutoregressor:
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
    return {"z": torch.randn(ROWS, 2, 4, 6, 4, generator=g), "phenotypes": torch.randn(ROWS, 3, generator=g)}


# ------------------------------------------------------------------------------------------------ tokens
def test_tokens_are_ordered_as_in_the_released_code(oracle):
    said, (c, t, h, w) = oracle["patchify"], oracle["config"]["latent_shape"]
    z = torch.arange(c * t * h * w).view(1, c, t, h, w)
    tokens = patchify(z, oracle["config"]["patch_size"])[0]
    assert list(tokens.shape) == said["output_shape"] and tokens[:, 0].tolist() == said["first_element_of_each_token"]
    for k in (0, 37, 179):
        assert tokens[k].tolist() == said[f"token_{k}"]


def test_tokens_and_back(batch):
    tokens = patchify(batch["z"], (2, 3, 1))
    assert tokens.shape == (ROWS, 2 * 2 * 4, 2 * 2 * 3)
    assert torch.equal(unpatchify(tokens, (2, 4, 6, 4), (2, 3, 1)), batch["z"])
    assert torch.equal(tokens[3, 2 * 4 + 4 + 1].view(2, 2, 3), batch["z"][3, :, 2:4, 3:6, 1])      # second half, second band of rows, second column
    for patch in ((3, 2, 2), (2, 2), (0, 2, 2)):
        with pytest.raises(ValueError, match="patches of"): patchify(batch["z"], patch)
    with pytest.raises(ValueError, match="do not fill"): unpatchify(tokens, (2, 4, 6, 4), (2, 2, 2))


# ------------------------------------------------------------------------------------------------ schedules
def test_reveal_counts_equal_the_released_code(oracle):
    tokens = oracle["config"]["seq_len"]
    assert reveal_counts(tokens, 16) == oracle["tokens_revealed_per_step_16"]
    for steps, counts in oracle["tokens_revealed_other_num_iter"].items():
        assert reveal_counts(tokens, int(steps)) == counts
    left = tokens - torch.tensor(reveal_counts(tokens, 16)).cumsum(0)
    assert left.tolist() == oracle["tokens_still_masked_after_step"]


@pytest.mark.parametrize("tokens, steps", [(72, 1), (72, 16), (72, 72), (7, 6), (1, 1)])
def test_every_step_reveals_and_all_is_revealed(tokens, steps):
    counts = reveal_counts(tokens, steps)
    assert len(counts) == steps and min(counts) >= 1 and sum(counts) == tokens


def test_guidance_equals_the_released_code(oracle):
    revealed = torch.tensor(oracle["tokens_revealed_per_step_16"]).cumsum(0).clamp(max=179) / 180    # at least one counts as hidden
    said = [guidance_at(share, 3.0, "linear") for share in revealed.tolist()]
    assert said == pytest.approx(oracle["cfg_scale_per_step_linear_schedule_3.0"], abs=1e-6)
    assert guidance_at(0.3, 3.0, "constant") == 3.0


def test_mask_ratios_follow_the_released_law(oracle):
    law = oracle["mask_ratio_distribution"]
    ratios = draw_mask_ratio(0.7, size=(200_000,), generator=torch.Generator().manual_seed(0))
    assert 0.7 <= ratios.min() and ratios.max() <= 1
    assert ratios.mean().item() == pytest.approx(law["mean"], abs=1e-3) and ratios.std().item() == pytest.approx(law["std"], abs=1e-3)
    for q, value in law["quantiles"].items():
        assert ratios.quantile(float(q)).item() == pytest.approx(value, abs=2e-3)
    assert draw_mask_ratio(1.0).item() == 1


def test_noise_schedule_and_respacing_equal_the_released_code(oracle):
    scheduler = token_scheduler()
    torch.testing.assert_close(scheduler.betas.double(), torch.tensor(oracle["cosine_betas_1000"], dtype=torch.float64), atol=1e-9, rtol=1e-5)
    torch.testing.assert_close(scheduler.alphas_cumprod[::50].double(), torch.tensor(oracle["alphas_cumprod_1000_every_50"], dtype=torch.float64), atol=1e-6, rtol=1e-5)
    for steps in (100, 16):
        scheduler.set_timesteps(steps)
        assert scheduler.timesteps.flip(0).tolist() == oracle[f"respaced_timesteps_{steps}_of_1000"]
    abar = (1 - scheduler.betas.double()).cumprod(0)[oracle["respaced_timestep_map_100"]]
    betas = 1 - abar / torch.cat([torch.ones(1), abar[:-1]])
    torch.testing.assert_close(betas, torch.tensor(oracle["respaced_betas_100"], dtype=torch.float64), atol=1e-7, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ sizes
def count(part: torch.nn.Module) -> int:
    return sum(p.numel() for p in part.parameters())


def test_every_part_has_as_many_numbers_as_in_the_released_code(oracle):
    with torch.device("meta"):
        model = MaskedAutoregressor(**PAPER)
    counts = oracle["parameter_counts"]
    ours = {"class_emb": count(model.tell), "fake_latent": model.nothing.numel(),
            "z_proj": count(model.encoder.read), "z_proj_ln": count(model.encoder.start), "encoder_pos_embed_learned": model.encoder.place.numel(),
            "encoder_blocks": count(model.encoder.blocks), "encoder_norm": count(model.encoder.norm),
            "decoder_embed": count(model.decoder.bridge), "mask_token": model.decoder.hole.numel(), "decoder_pos_embed_learned": model.decoder.place.numel(),
            "decoder_blocks": count(model.decoder.blocks), "decoder_norm": count(model.decoder.norm), "diffusion_pos_embed_learned": model.decoder.last.numel(),
            "diffloss": count(model.head)}
    theirs = dict(counts["by_submodule"])
    idle = [theirs.pop(name) for name in ("rep_embedder", "decoder_pred", "fake_rep_latent")]      # take no part in loss or sampling
    assert ours == theirs and count(model.encoder.blocks[0]) == counts["one_encoder_block"]
    assert count(model) == counts["used_in_published_sampling"] == counts["total_without_fake_rep_latent"] - sum(idle[:2])
    head = model.head
    assert counts["diffloss_net"] == {"time_embed": count(head.time), "cond_embed": count(head.cond), "input_proj": count(head.read), "res_blocks": count(head.blocks),
                                      "final_layer": count(head.modulate) + count(head.norm) + count(head.say)}


# ------------------------------------------------------------------------------------------------ the head
def slow_bound(x0, xt, eps_said, share, t, betas) -> float:
    "KL between true and said step back, written out number by number in float64; bits."
    abar, total = [], 1.0
    for beta in betas: total *= 1 - beta; abar.append(total)
    bits = []
    for row in range(len(x0)):
        k = int(t[row])
        before = abar[k - 1] if k else 1.0
        variance = lambda k: betas[k] * (1 - (abar[k - 1] if k else 1.0)) / (1 - abar[k])
        least, greatest = math.log(variance(max(k, 1))), math.log(betas[k])
        for i in range(x0.shape[1]):
            a, b = math.sqrt(before) * betas[k] / (1 - abar[k]), math.sqrt(1 - betas[k]) * (1 - before) / (1 - abar[k])
            guess = (xt[row, i] - math.sqrt(1 - abar[k]) * eps_said[row, i]) / math.sqrt(abar[k])
            true_mean, mean = a * x0[row, i] + b * xt[row, i], a * guess + b * xt[row, i]
            log_var = least + (share[row, i] + 1) / 2 * (greatest - least)
            if k: nats = 0.5 * (log_var - least - 1 + math.exp(least - log_var) + (true_mean - mean) ** 2 / math.exp(log_var))
            else: nats = 0.5 * (math.log(2 * math.pi) + log_var + (x0[row, i] - mean) ** 2 / math.exp(log_var))
            bits.append(nats / math.log(2))
    return float(sum(bits) / len(bits))


@pytest.mark.parametrize("times", [[0, 0, 1, 2], [5, 20, 35, 48]])
def test_bound_equals_a_slow_version(times):
    g, scheduler, t = torch.Generator().manual_seed(0), token_scheduler(50), torch.tensor(times)
    x0, eps, said = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(3))
    said, share = eps + 0.1 * said, torch.rand(4, 3, generator=g, dtype=torch.float64) * 2 - 1
    abar = (1 - scheduler.betas.double()).cumprod(0)[t][:, None]
    xt = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    fast = step_bound((said - eps).float(), share.float(), t, scheduler).item()
    assert fast == pytest.approx(slow_bound(x0, xt, said, share, t, scheduler.betas.double().tolist()), rel=1e-3, abs=1e-5)


def stirred_head(token_dim: int = 3, cond: int = 4) -> TokenHead:
    torch.manual_seed(0)
    head = TokenHead(token_dim, cond, 8, 2)
    with torch.no_grad():
        for weight in head.parameters(): weight.add_(0.1 * torch.randn_like(weight))
    return head


@pytest.mark.parametrize("says", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [50, 1000])   # fewer times than rows, and more
def test_loss_is_squared_error_plus_bound(steps, says):
    head, scheduler, x0, cond = stirred_head(), token_scheduler(steps, says), torch.randn(30, 3), torch.randn(30, 4)
    torch.manual_seed(7)
    loss = token_diffusion_loss(head, x0, cond, scheduler, 2)
    torch.manual_seed(7)
    t = torch.randint(0, steps, (60,)); eps = torch.randn(60, 3)
    abar = scheduler.alphas_cumprod[t][:, None]
    xt = abar.sqrt() * x0.repeat(2, 1) + (1 - abar).sqrt() * eps
    said, share = head(xt, t, cond.repeat(2, 1)).chunk(2, 1)
    v = abar.sqrt() * eps - (1 - abar).sqrt() * x0.repeat(2, 1)
    noise = said if says == "epsilon" else abar.sqrt() * said + (1 - abar).sqrt() * xt
    bound = slow_bound(x0.repeat(2, 1).double(), xt.double(), noise.detach().double(), share.detach().double(), t, scheduler.betas.double().tolist())
    assert loss.item() == pytest.approx(F.mse_loss(said, eps if says == "epsilon" else v).item() + bound, rel=2e-3)


def test_bound_teaches_the_variance_only():
    head, scheduler, x0, cond = stirred_head(), token_scheduler(50), torch.randn(40, 3), torch.randn(40, 4)
    torch.manual_seed(3)
    token_diffusion_loss(head, x0, cond, scheduler).backward()
    both = head.say.weight.grad.clone()
    torch.manual_seed(3)
    t = torch.randint(0, 50, (40,)); eps = torch.randn(40, 3)
    abar = scheduler.alphas_cumprod[t][:, None]
    head.zero_grad()
    F.mse_loss(head(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, t, cond)[:, :3], eps).backward()
    torch.testing.assert_close(both[:3], head.say.weight.grad[:3], atol=1e-6, rtol=1e-4)       # the noise learns from its error alone
    assert both[3:].abs().max() > 1e-3 and head.say.weight.grad[3:].abs().max() == 0           # the variance from the bound alone


def test_variance_bounds_are_ordered():
    least, greatest, gain = variance_bounds(token_scheduler())
    assert (least < greatest).all() and (gain > 0).all() and least[0] == least[1]    # at t = 0 the step back is certain: no log of zero


def slow_ancestral(head, z, z_empty, guidance, scheduler, steps, generator) -> torch.Tensor:
    "The respaced ancestral sampler written out in float64."
    times = [round(k * (scheduler.config.num_train_timesteps - 1) / (steps - 1)) for k in range(steps)]
    abar = (1 - scheduler.betas.double()).cumprod(0)[times]
    xt = torch.randn(len(z), head.token_dim, generator=generator).double()
    for k in reversed(range(steps)):
        now, before = abar[k], abar[k - 1] if k else torch.tensor(1.0).double()
        beta, t = 1 - now / before, torch.full((len(z),), times[k])
        as_eps = lambda said: said if scheduler.config.prediction_type == "epsilon" else now.sqrt() * said + (1 - now).sqrt() * xt
        said, share = head(xt, t, z).chunk(2, 1)
        eps = as_eps(said)
        if z_empty is not None:
            nothing = as_eps(head(xt, t, z_empty).chunk(2, 1)[0])
            eps = nothing + guidance * (eps - nothing)
        x0 = (xt - (1 - now).sqrt() * eps) / now.sqrt()
        mean = before.sqrt() * beta / (1 - now) * x0 + (1 - beta).sqrt() * (1 - before) / (1 - now) * xt
        if k == 0: return mean
        least, greatest = (beta * (1 - before) / (1 - now)).log(), beta.log()
        log_var = least + (share + 1) / 2 * (greatest - least)
        xt = mean + (0.5 * log_var).exp() * torch.randn(len(z), head.token_dim, generator=generator).double()


@pytest.mark.parametrize("guided, says", [(False, "epsilon"), (True, "epsilon"), (True, "v_prediction")])
def test_drawing_equals_a_slow_sampler(guided, says):
    head, scheduler = stirred_head(), token_scheduler(40, says)
    z, z_empty = torch.randn(6, 4), torch.randn(6, 4) if guided else None
    made = draw_from_head(head, z, z_empty, 2.5, scheduler, 9, torch.Generator().manual_seed(0))
    with torch.no_grad():
        slow = slow_ancestral(head.double(), z.double(), None if z_empty is None else z_empty.double(), 2.5, scheduler, 9, torch.Generator().manual_seed(0))
    torch.testing.assert_close(made.double(), slow, atol=2e-3, rtol=2e-3)


def test_fast_solver_draws_and_a_wrong_one_is_refused():
    head, scheduler, z = stirred_head(), token_scheduler(100), torch.randn(6, 4)
    drawn = draw_from_head(head, z, None, 1.0, fast_scheduler(scheduler), 8, torch.Generator().manual_seed(0))
    assert drawn.shape == (6, 3) and drawn.isfinite().all()
    with pytest.raises(ValueError, match="variance_type=None"):
        draw_from_head(head, z, None, 1.0, DPMSolverMultistepScheduler.from_config(scheduler.config), 8)


def test_guidance_of_one_is_no_guidance():
    head, scheduler, z = stirred_head(), token_scheduler(30), torch.randn(6, 4)
    alone, both = (draw_from_head(head, z, empty, 1.0, scheduler, 10, torch.Generator().manual_seed(0)) for empty in (None, torch.randn(6, 4)))
    torch.testing.assert_close(alone, both, atol=1e-3, rtol=1e-3)


# ------------------------------------------------------------------------------------------------ the transformer
def test_attention_in_float32_is_attention():
    torch.manual_seed(0)
    ours, theirs, x = SteadyAttention(16, 4), Attention(16, 4), torch.randn(3, 9, 16)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours(x).float(), theirs(x).float(), atol=0.03, rtol=0.03)


def as_released(model: MaskedAutoregressor, tokens, mask, cond) -> torch.Tensor:
    "All places in their natural order, masked ones dropped and put back by their index; (b, tokens, width)."
    b, slots = len(tokens), cond.shape[1]
    x = torch.cat([cond, model.encoder.read(tokens)], 1) + model.encoder.place
    visible = torch.cat([torch.ones(b, slots, dtype=torch.bool), ~mask], 1)
    x = model.encoder.start(x)[visible].view(b, -1, x.shape[-1])
    for block in model.encoder.blocks: x = block(x)
    x = model.decoder.bridge(model.encoder.norm(x))
    full = model.decoder.hole.expand(b, slots + tokens.shape[1], -1).clone()
    full[visible] = x.flatten(0, 1)
    x = full + model.decoder.place
    for block in model.decoder.blocks: x = block(x)
    return model.decoder.norm(x)[:, slots:] + model.decoder.last


@pytest.mark.parametrize("known", [0, 1, 5, 11])
def test_seeing_equals_the_released_way(batch, known):
    model = stirred()
    tokens, order, cond = patchify(batch["z"], (2, 2, 2)), model.draw_order(ROWS), model.condition(batch["phenotypes"])
    mask = torch.ones(ROWS, TOKENS, dtype=torch.bool).scatter(1, order[:, :known], False)
    slow = take(as_released(model, tokens, mask, cond), order[:, known:])
    fast = model.see(tokens, order, known, cond)
    assert fast.shape == (ROWS, TOKENS - known, 16)
    torch.testing.assert_close(fast, slow, atol=1e-4, rtol=1e-4)
    assert torch.equal(fast, model(tokens, order, known, cond))


def test_what_is_hidden_is_not_read(batch):
    model = stirred()
    tokens, order, cond = patchify(batch["z"], (2, 2, 2)), model.draw_order(ROWS), model.condition(batch["phenotypes"])
    said = model.see(tokens, order, 4, cond)
    blind = tokens.scatter(1, order[:, 4:, None].expand(-1, -1, tokens.shape[2]), torch.nan)
    assert torch.equal(model.see(blind, order, 4, cond), said)
    nudged = tokens.scatter_add(1, order[:, :1, None].expand(-1, -1, tokens.shape[2]), torch.ones(ROWS, 1, tokens.shape[2]))
    assert ((model.see(nudged, order, 4, cond) - said).abs().amax(-1) > 1e-5).all()             # one visible token moves every word
    swapped = torch.cat([order[:, :4].flip(1), order[:, 4:]], 1)
    torch.testing.assert_close(model.see(tokens, swapped, 4, cond), said, atol=1e-5, rtol=1e-4)  # in which order the visible ones came does not matter


def test_condition(batch):
    model, x = stirred(), batch["phenotypes"]
    c = model.condition(x)
    assert c.shape == (ROWS, 2, 16) and torch.equal(c[:, 0], c[:, 1])
    changed = x.clone(); changed[:, 2] = 9.0                                                    # uses says: never told
    assert torch.equal(model.condition(changed), c)
    changed[:, 1] += 1
    assert (model.condition(changed) - c).abs().amax(-1).min() > 1e-3
    unknown, mean = x.clone(), x.clone()
    unknown[0, 1], mean[0, 1] = torch.nan, 0.0
    assert torch.equal(model.condition(unknown), model.condition(mean))
    half = model.condition(x, torch.tensor([True, False, True, False, True]))
    assert torch.equal(half[::2], c[::2]) and torch.equal(half[1::2], model.empty(2))
    nobody = stirred(uses=(False,) * 3)
    assert torch.equal(nobody.condition(x)[0], nobody.condition(x)[1])


def test_orders_and_hidden_tokens():
    model = fresh(lowest=0.5)
    order = model.draw_order(200)
    assert torch.equal(order.sort(1).values, torch.arange(TOKENS).expand(200, -1)) and len(order[:, 0].unique()) == TOKENS
    hidden = {model.draw_hidden() for _ in range(300)}
    assert hidden == set(range(7, 13))                                                          # ceil(12 * more than a half) ... 12
    raster = fresh(order="raster")
    assert torch.equal(raster.draw_order(3), torch.arange(TOKENS).expand(3, -1)) and {raster.draw_hidden() for _ in range(300)} == set(range(1, 13))


@pytest.mark.parametrize("kind", ["continuous", "quantised"])
def test_loss_reaches_every_weight(batch, kind):
    model = stirred(kind=kind, untold=0.5).train()
    if kind == "quantised": model.quantiser.fit(patchify(batch["z"], (2, 2, 2)))
    for seed in range(4):                                                                       # told and untold rows, other places
        torch.manual_seed(seed)
        loss = model.loss(batch)
        assert loss.isfinite() and loss.ndim == 0
        loss.backward()
    idle = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.abs().max() > 0]
    assert idle == []


def test_dropout_is_in_the_branches_only(batch):
    model = stirred(dropout=0.5)
    tokens, order, cond = patchify(batch["z"], (2, 2, 2)), model.draw_order(ROWS), model.condition(batch["phenotypes"])
    torch.testing.assert_close(model.see(tokens, order, 3, cond), model.see(tokens, order, 3, cond))
    model.train()
    assert not torch.allclose(model.see(tokens, order, 3, cond), model.see(tokens, order, 3, cond))
    assert count(model) == count(fresh())


def test_training_lowers_the_loss_and_a_folder_gives_back_the_same(batch, tmp_path):
    model = fresh(untold=0.0)
    for state in fit(model, loader(batch, 5), FitConfig(steps=60, batch_size=5, lr=5e-3, ema=0, precision="fp32"), device="cpu"): pass
    assert state.history[-1]["loss"] < 0.9 * state.history[0]["loss"]
    model.save_pretrained(tmp_path)
    again = MaskedAutoregressor.from_pretrained(tmp_path)
    assert again.config.slots == 2 and all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    tokens, order = patchify(batch["z"], (2, 2, 2)), model.draw_order(ROWS)
    see = lambda model: model.see(tokens, order, 5, model.condition(batch["phenotypes"]))
    torch.testing.assert_close(see(again), see(model))


# ------------------------------------------------------------------------------------------------ decoding
@pytest.mark.parametrize("order, kind", [("random", "continuous"), ("raster", "continuous"), ("random", "quantised")])
def test_decoding_reveals_as_the_schedule_says(batch, order, kind):
    model, shares = stirred(order=order, kind=kind), []
    if kind == "quantised": model.quantiser.fit(patchify(batch["z"], (2, 2, 2)))
    watch = lambda z: shares.append((~z.isnan()).float().mean().item() * TOKENS)
    draw = lambda seed: decode_slowly(model, model.condition(batch["phenotypes"]), 5, 3.0, "linear", None, 6, torch.Generator().manual_seed(seed), watch)
    z = draw(0)
    assert z.shape == batch["z"].shape and z.isfinite().all()
    assert shares == pytest.approx(torch.tensor(reveal_counts(TOKENS, 5)).cumsum(0).tolist(), abs=1e-4)
    assert torch.equal(draw(0), z) and not torch.allclose(draw(1), z, atol=1e-3)
    if kind == "quantised": torch.testing.assert_close(model.quantiser.error(patchify(z, (2, 2, 2))), 0.0, atol=1e-6, rtol=0)   # only codes come out


def test_decoding_in_one_step_draws_what_the_head_draws(batch):
    model, g = stirred(), lambda: torch.Generator().manual_seed(0)
    cond = model.condition(batch["phenotypes"])
    z = decode_slowly(model, cond, 1, 1.0, head_steps=6, generator=g())
    other = g()
    order = model.draw_order(ROWS, other)
    word = model.see(torch.full((ROWS, TOKENS, 16), torch.nan), order, 0, cond)
    drawn = model.draw_tokens(word.flatten(0, 1), steps=6, generator=other).view(ROWS, TOKENS, 16)
    assert torch.equal(take(patchify(z, (2, 2, 2)), order), drawn)


# ------------------------------------------------------------------------------------------------ codes
def test_quantiser_takes_the_nearest_centre():
    torch.manual_seed(0)
    tokens = torch.randn(60, 7, 6)
    quantiser = Quantiser(6, 2, 9).fit(tokens)
    index = quantiser.encode(tokens)
    assert index.shape == (60, 7, 2) and index.max() < 9
    for k in (0, 17, 59):
        for g in range(2):
            far = ((quantiser.codebook[g] - tokens[k, 3, 3 * g : 3 * g + 3]) ** 2).sum(1)
            assert index[k, 3, g] == far.argmin()
            assert torch.equal(quantiser.decode(index)[k, 3, 3 * g : 3 * g + 3], quantiser.codebook[g, far.argmin()])
    assert torch.equal(quantiser.encode(quantiser.decode(index)), index)
    floors = [Quantiser(6, 2, codes).fit(tokens).error(tokens) for codes in (2, 9, 60)]
    assert 1 > floors[0] > floors[1] > floors[2] > 0


def test_quantised_loss_is_cross_entropy_of_the_hidden_codes(batch):
    model = stirred(kind="quantised", order="raster", untold=0.0)
    tokens = patchify(batch["z"], (2, 2, 2))
    index = model.quantiser.fit(tokens).encode(tokens)
    torch.manual_seed(5)
    loss = model.loss(batch)
    torch.manual_seed(5)
    known = TOKENS - model.draw_hidden()
    said = model.logits(model.see(model.quantiser.decode(index), model.draw_order(ROWS), known, model.condition(batch["phenotypes"]))).log_softmax(-1)
    slow = [-said[b, k, g, index[b, known + k, g]] for b in range(ROWS) for k in range(TOKENS - known) for g in range(4)]
    assert loss.item() == pytest.approx(torch.stack(slow).mean().item(), rel=1e-5)


# ------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize("changes, says", [
    ({"uses": (True, False)}, "truth values"), ({"slots": 0}, "slot"), ({"order": "spiral"}, "random or raster"), ({"kind": "vq"}, "continuous or quantised"),
    ({"untold": 1.5}, "untold"), ({"lowest": -0.1}, "lowest"), ({"patch": (3, 2, 2)}, "patches of"), ({"heads": 3}, "heads"),
    ({"kind": "quantised", "groups": 5}, "groups")])
def test_bad_sizes(changes, says):
    with pytest.raises(ValueError, match=says): fresh(**changes)


def test_bad_input(batch):
    with pytest.raises(ValueError, match="steps"): reveal_counts(12, 13)
    with pytest.raises(ValueError, match="steps"): reveal_counts(12, 0)
    with pytest.raises(ValueError, match="constant or linear"): guidance_at(0.5, 3.0, "cosine")
    with pytest.raises(ValueError, match="mask ratios"): draw_mask_ratio(1.2)
    with pytest.raises(ValueError, match="got"): fresh().loss(batch | {"z": batch["z"][..., :2]})
    with pytest.raises(ValueError, match="fit"): fresh(kind="quantised").loss(batch)
    with pytest.raises(ValueError, match="codes"): Quantiser(16, 2, 100).fit(torch.randn(20, 16))


def test_scheduler_is_as_released():
    scheduler = token_scheduler()
    later = token_scheduler(spacing="leading"); later.set_timesteps(100)
    assert later.timesteps[0] == 990 and fresh(says="v_prediction").scheduler.config.prediction_type == "v_prediction"
    assert isinstance(scheduler, DDPMScheduler) and scheduler.config.prediction_type == "epsilon" and not scheduler.config.clip_sample
