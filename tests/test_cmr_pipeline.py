"Contracts of fast sampling: the same words and latents as the slow way, shapes that never change, told phenotypes kept, files that come whole, bad wishes refused."
import json

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from medgen_nb.cmr.data import PHENOTYPES, draw_population, phenotypes_of, read_ukb, simulate_hearts
from medgen_nb.cmr.mar import MaskedAutoregressor, decode_slowly, token_scheduler
from medgen_nb.cmr.phenotypes import PhenotypeVae
from medgen_nb.cmr.pipeline import SOLVERS, CPGGPipeline, PixelDiffusion, decode, frame_time_of, see_all, table_of
from medgen_nb.cmr.vae import CineVae
from medgen_nb.data import loader
from medgen_nb.training import FitConfig, fit

LATENT, PATCH = (2, 4, 4, 4), (2, 2, 2)   # 8 tokens of 16 numbers


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def build(kind="continuous", slots=2, order="random"):
    torch.manual_seed(0)
    mar = MaskedAutoregressor(LATENT, PATCH, 16, 1, 2, len(PHENOTYPES), (True,) * len(PHENOTYPES), slots, 16, 1, 0.1, 0.7, 1, 0.0, order, kind, 4, 8, 1000, "v_prediction", "grid")
    for part in mar.parameters():
        part.data += 0.05 * torch.randn(part.shape, generator=seeded(1))   # heads start closed: open them
    if kind == "quantised":
        mar.quantiser.fit(torch.randn(400, 16, generator=seeded(2)), 0)
    return mar.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def wanted():
    return torch.randn(3, len(PHENOTYPES), generator=seeded())


@pytest.fixture(scope="module")
def pipeline():
    films, people = simulate_hearts(8, 8, 16, seed=0), phenotypes_of(draw_population(200, seed=1))
    torch.manual_seed(0)
    vae = CineVae((8,), ((2, 4, 4),), 0, LATENT[0], 1e-3, 0.0, 0.0).eval().requires_grad_(False)
    vae.start(films.x)
    vae.measure_scale(films.x)
    reports = PhenotypeVae(list(PHENOTYPES), 16, 8, 1e-2, 2)
    made = CPGGPipeline(vae, build(), reports.normalise(people).measure(people).eval())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.mark.parametrize("known", [0, 1, 5, 7])
@pytest.mark.parametrize("slots", [1, 4])
def test_fixed_shapes_say_the_same_words(wanted, known, slots):
    mar = build(slots=slots)
    order, tokens, cond = mar.draw_order(3, seeded()), torch.randn(3, mar.tokens, mar.token_dim, generator=seeded(1)), mar.condition(wanted)
    torch.testing.assert_close(see_all(mar, tokens, order, known, cond)[:, known:], mar.see(tokens, order, known, cond), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance,ramp", [(1.0, "constant"), (3.0, "constant"), (3.0, "linear")])
@pytest.mark.parametrize("order", ["random", "raster"])
def test_the_fast_way_draws_what_the_slow_way_draws(wanted, guidance, ramp, order):
    mar = build(order=order)
    slow = decode_slowly(mar, mar.condition(wanted), 4, guidance, ramp, token_scheduler(1000, "v_prediction", "leading"), 10, seeded())
    fast = decode(mar, wanted, 4, guidance, ramp, "ancestral", 10, seeded())
    assert fast.shape == (3, *LATENT)
    torch.testing.assert_close(fast, slow, rtol=1e-3, atol=1e-3)


def test_shapes_never_change_when_static(wanted):
    mar, shapes = build(), {"look": set(), "head": set()}
    def look(model, tokens, order, known, cond):
        words = see_all(model, tokens, order, known, cond)
        shapes["look"].add((tuple(tokens.shape), tuple(words.shape)))
        return words
    hook = mar.head.say.register_forward_hook(lambda module, inputs, out: shapes["head"].add(tuple(out.shape)))
    made = decode(mar, wanted, 4, 3.0, head_steps=3, generator=seeded(), static=True, look=look)
    hook.remove()
    assert torch.isfinite(made).all() and all(len(seen) == 1 for seen in shapes.values())


@pytest.mark.parametrize("solver", list(SOLVERS))
@pytest.mark.parametrize("bf16", [False, True])
def test_every_solver_fills_every_token(wanted, solver, bf16):
    seen = []
    made = decode(build(), wanted, 8, 2.0, solver=solver, head_steps=4, generator=seeded(), bf16=bf16, watch=lambda z: seen.append(z.isnan().float().mean().item()))
    assert torch.isfinite(made).all() and made.dtype == torch.float32 and made.std() > 0
    assert seen == sorted(seen, reverse=True) and seen[0] > 0 == seen[-1]


def test_codes_are_decoded_too(wanted):
    made = decode(build("quantised"), wanted, 4, 2.0, generator=seeded())
    assert made.shape == (3, *LATENT) and torch.isfinite(made).all()


def test_told_phenotypes_stay_and_others_are_drawn(pipeline):
    made = pipeline(LVEF=35, n=3, seed=0, num_steps=2)
    assert made.videos.shape == (3, 8, 16, 16) and made.videos.dtype == np.float32 and np.abs(made.videos).max() <= 1
    assert np.allclose(made.phenotypes["LVEF"], 35) and made.phenotypes.notna().all().all() and list(made.phenotypes) == list(PHENOTYPES)
    assert made.told["LVEF"].all() and made.told.to_numpy().sum() == 3 and made.phenotypes["LVM"].nunique() == 3
    again, other = (pipeline({"LVEF": 35}, n=3, seed=seed, num_steps=2) for seed in (0, 1))
    np.testing.assert_array_equal(again.videos, made.videos)
    assert not np.array_equal(other.videos, made.videos)
    beat = made.frame_time * 8
    assert np.allclose(60 / beat, 1000 * made.phenotypes["LVCO"] / made.phenotypes["LVSV"])


def test_a_table_asks_for_several_people(pipeline):
    asked = pd.DataFrame({"LVEF": [30.0, np.nan, 65.0], "LVEDV": [np.nan, 150.0, 140.0]})
    made = pipeline(asked, n=2, seed=0, num_steps=2)
    assert len(made.videos) == 6 and np.allclose(made.phenotypes["LVEF"][[0, 1, 4, 5]], [30, 30, 65, 65]) and made.told["LVEDV"].tolist() == [False, False, True, True, True, True]
    assert "LVEF" in repr(made)


def test_saved_and_loaded_it_draws_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    again = CPGGPipeline.from_pretrained(tmp_path)
    np.testing.assert_allclose(again(n=2, seed=3, num_steps=2).videos, pipeline(n=2, seed=3, num_steps=2).videos, atol=1e-4)
    assert not list(tmp_path.rglob("*.bin")) and list(tmp_path.rglob("*.safetensors"))


def test_films_are_written_whole_and_read_back(pipeline, tmp_path):
    made = pipeline(LVEF=40, n=2, seed=0, num_steps=2)
    out = pipeline.write(made, tmp_path / "films")
    assert sorted(p.name for p in out.iterdir()) == ["films.gif", "phenotypes.csv", "told.json", "video_00000.nii.gz", "video_00001.nii.gz"]
    image = nibabel.load(out / "video_00001.nii.gz")
    assert image.shape == (16, 16, 1, 8) and np.allclose(image.header.get_zooms(), (made.spacing, made.spacing, image.header.get_zooms()[2], made.frame_time[1]), rtol=1e-5)
    assert json.loads((out / "told.json").read_text())[0] == {"LVEF": 40.0}
    records, rejected = read_ukb(out)
    assert len(records) == 2 and not rejected
    with pytest.raises(ValueError, match="new or empty"):
        pipeline.write(made, out)
    assert pipeline.write(made, None) is None


def test_nothing_is_left_behind_when_writing_fails(pipeline, tmp_path, monkeypatch):
    made = pipeline(n=1, seed=0, num_steps=2)
    monkeypatch.setattr("medgen_nb.cmr.pipeline.write_gif", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        pipeline.write(made, tmp_path / "films")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("wish,said", [({"LVFE": 35}, "no such phenotype: LVFE"), ({"LVEF": "low"}, "numbers"), ({"LVEF": 350}, "far from all people"), ({"LVEF": 60, "LVEDV": 100, "LVESV": 90}, "contradict")])
def test_wishes_that_nobody_can_have_are_refused(pipeline, wish, said):
    with pytest.raises(ValueError, match=said):
        pipeline(wish, num_steps=2)


@pytest.mark.parametrize("settings,said", [({"n": 0}, "at least 1"), ({"guidance_scale": -1}, "at least 0"), ({"solver": "euler"}, "unknown solver"), ({"guidance": "steep"}, "constant or linear"), ({"num_steps": 0}, "in 1 to")])
def test_settings_that_cannot_be_are_refused(pipeline, settings, said):
    with pytest.raises(ValueError, match=said):
        pipeline(**{"LVEF": 50, "seed": 0, "num_steps": 2, **settings})


def test_rate_and_frames_make_the_frame_time():
    assert frame_time_of(pd.DataFrame({"LVSV": [80.0], "LVCO": [4.8]}), 20)[0] == pytest.approx(1 / 20), "60 beats a minute, 20 frames"
    assert table_of(None, {}).isna().all().all()


def pixels(frames=6, size=16, untold=0.5):
    torch.manual_seed(0)
    return PixelDiffusion(frames, size, len(PHENOTYPES), (8, 16), untold, 100)


def test_the_pixel_rival_learns_and_draws_the_same_films_again(wanted):
    rival, told = pixels(), wanted.clone()
    told[0, 5] = torch.nan   # unknown is the mean
    films = torch.linspace(-1, 1, 3 * 6 * 16 * 16).view(3, 1, 6, 16, 16)
    for state in fit(rival, loader({"x": films, "phenotypes": told}, 3, 0), FitConfig(steps=40, batch_size=3, lr=3e-3, warmup=1, ema=0, save_every=40, precision="fp32")):
        pass
    assert state.history[-1]["loss"] < state.history[0]["loss"]
    rival.eval()
    once, again, other = (rival.draw(told, 4, 2.0, seeded(k)) for k in (0, 0, 1))
    assert once.shape == (3, 1, 6, 16, 16) and once.abs().max() <= 1
    assert torch.equal(once, again) and not torch.equal(once, other)


def test_guidance_of_the_pixel_rival_leaves_one_alone_and_hears_the_report(wanted):
    rival = pixels().eval()
    for part in rival.parameters():
        part.data += 0.05 * torch.randn(part.shape, generator=seeded(1))
    plain, unguided = rival.draw(wanted, 3, 1.0, seeded()), rival.draw(wanted, 3, 1.0 + 1e-6, seeded())
    torch.testing.assert_close(plain, unguided, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(plain, rival.draw(wanted + 1, 3, 1.0, seeded())), "another report, another film"
    torch.testing.assert_close(rival.draw(wanted, 3, 0.0, seeded()), rival.draw(wanted + 1, 3, 0.0, seeded()), msg="at 0 nobody listens")


def test_the_pixel_rival_refuses_films_that_cannot_be_halved():
    with pytest.raises(ValueError, match="halved"):
        pixels(size=15)
    with pytest.raises(ValueError, match="multiple of 8"):
        PixelDiffusion(6, 16, 3, (8, 12), 0.1, 100)
