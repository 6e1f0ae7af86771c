"Counterfactuals, maps, induction and the pipeline of the chest film room."
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from medgen_nb.cxr.counterfactual import VALDPipeline, blend_outside, counterfactual, find_noise, induce, quiet_level, smooth_map
from medgen_nb.cxr.data import prompt_of
from medgen_nb.cxr.metrics import Classifier
from medgen_nb.cxr.model import Artist, build_scheduler, build_unet, build_vae
from medgen_nb.data import BadRecord
from medgen_nb.diffusion import abar_at, add_noise, revise
from medgen_nb.text import TextEncoder


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    vae = build_vae((8, 8), 1, 4).eval()
    vae.measure_scale(torch.rand(20, 1, 16, 16) * 2 - 1)
    text = TextEncoder.fresh([prompt_of("normal"), prompt_of("effusion", "left lower zone")] * 4, 200, 16, 1, 2, 24)
    return vae, Artist(build_unet(8, 4, (8, 16), 1, 2, 16), text, build_scheduler("v_prediction"), 0.1, False, "sentences").eval()


@pytest.fixture
def films():
    return torch.rand(3, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


class Coarse:
    "An autoencoder that is nothing but coarser pixels: what changes in its films was changed by the diffusion."
    device = torch.device("cpu")

    def to_latent(self, x):
        return F.avg_pool2d(x, 2).repeat(1, 4, 1, 1)

    def from_latent(self, z):
        return F.interpolate(z.mean(1, keepdim=True), scale_factor=2)


def seeded(k=0):
    return torch.Generator().manual_seed(k)


def test_found_noise_leads_back(parts):
    _, artist = parts
    z, quiet = torch.randn(2, 4, 8, 8, generator=seeded()), artist.predictor(["", ""], 1.0)
    noise = find_noise(quiet, artist.scheduler, z, 0.5, 100)
    back, other = revise(quiet, artist.scheduler, z, 0.5, 100, noise=noise), revise(quiet, artist.scheduler, z, 0.5, 100, seeded())
    assert (back - z).abs().mean() < 0.2 * (other - z).abs().mean()
    with pytest.raises(ValueError, match="choose strength"):
        find_noise(quiet, artist.scheduler, z, 0.001, 10)


def test_more_strength_changes_more(parts, films):
    coarse = Coarse().from_latent(Coarse().to_latent(films))
    changes = [(counterfactual(Coarse(), parts[1], films, strength=s, steps=20, generator=seeded()) - coarse).abs().mean().item() for s in (0.1, 0.5, 1.0)]
    assert changes[0] < changes[1] < changes[2]


def test_prompts_for_one_or_all(parts, films):
    healthy = prompt_of("normal")
    one, each = (counterfactual(*parts, films, words, 0.5, 3.0, 4, generator=seeded()) for words in (healthy, [healthy] * 3))
    torch.testing.assert_close(one, each)
    assert not torch.allclose(one, counterfactual(*parts, films, prompt_of("effusion", "left lower zone"), 0.5, 3.0, 4, generator=seeded()), atol=1e-5)
    with pytest.raises(ValueError, match="unknown mode"):
        counterfactual(*parts, films, mode="magic")


def test_inversion_draws_nothing(parts, films):
    one, two = (counterfactual(*parts, films, strength=0.5, steps=4, mode="inversion", generator=seeded(k)) for k in (0, 1))
    torch.testing.assert_close(one, two)


def test_maps_are_smoothed_inside_lungs():
    signed = np.zeros((1, 64, 64)); signed[0, 20, 20], signed[0, 50, 50] = -1.0, 1.0
    lungs = np.zeros((1, 64, 64), bool); lungs[0, :32] = True
    plain, masked = smooth_map(signed), smooth_map(signed, lungs)
    assert plain.min() >= 0 and plain[0, 21, 20] > 0 and plain.sum() == pytest.approx(2, abs=1e-3)
    assert masked[0, 32:].sum() == 0 and np.array_equal(masked[0, :32], plain[0, :32])


def test_the_level_of_quiet_films():
    maps = np.random.default_rng(0).normal(size=(20, 32, 32))
    level = quiet_level(maps, 0.9)
    assert (smooth_map(maps) > level).mean() == pytest.approx(0.1, abs=1e-3)
    with pytest.raises(ValueError, match="no maps"):
        quiet_level(maps[:0])


def test_outside_the_box_stays_what_it_was(parts, films):
    vae, artist = parts
    z, free, noise = torch.randn(2, 4, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.bool), torch.randn(2, 4, 8, 8)
    free[:, :, :4] = True
    t, xt = torch.tensor(500), torch.zeros(2, 4, 8, 8)
    blended = blend_outside(z, free, noise, artist.scheduler)(xt, t)
    assert (blended[:, :, :4] == 0).all()
    torch.testing.assert_close(blended[:, :, 4:], add_noise(z, noise, abar_at(artist.scheduler, t))[:, :, 4:])
    boxes = torch.zeros(3, 16, 16, dtype=torch.bool); boxes[:, :8] = True
    made = induce(Coarse(), artist, films, boxes, prompt_of("effusion", "left lower zone"), steps=4, generator=seeded())
    coarse = Coarse().from_latent(Coarse().to_latent(films))
    torch.testing.assert_close(made[:, :, 8:], coarse[:, :, 8:])
    assert (made - coarse)[:, :, :8].abs().mean() > 0.05
    for bad in (boxes[:2], torch.zeros_like(boxes)):
        with pytest.raises(ValueError, match="boxes"):
            induce(vae, artist, films, bad, "effusion")


@pytest.fixture(scope="module")
def pipeline(parts):
    vae, artist = parts
    torch.manual_seed(0)
    made = VALDPipeline(vae, artist.unet, artist.text.model, artist.text.tokenizer, artist.scheduler, Classifier(("effusion", "nodule"), 2, (8, 8), 8).eval(), threshold=0.2, strength=0.4, guidance=2.0)
    made.set_progress_bar_config(disable=True)
    return made


def test_one_call(pipeline, films):
    made = pipeline(films, n=3, num_steps=5, seed=0)
    again = pipeline(films[:, 0].numpy(), n=3, num_steps=5, seed=0)
    np.testing.assert_allclose(made.signed, again.signed)
    np.testing.assert_allclose(made.signed, made.films - made.healthy)
    assert made.films.shape == made.mask.shape == made.spread.shape == (3, 16, 16) and made.mask.dtype == bool and made.spread.max() > 0
    assert list(made.before) == ["effusion", "nodule"] and len(made.after) == 3 and "3 films" in repr(made)
    assert np.abs(pipeline(films, n=3, num_steps=5, seed=1).signed - made.signed).max() > 0
    assert pipeline(films, n=1, num_steps=5, seed=0).spread.max() == 0
    outside = np.zeros((3, 16, 16), bool)
    assert not pipeline(films, n=1, num_steps=5, lungs=outside, seed=0).mask.any()


def test_saved_and_loaded(pipeline, films, tmp_path):
    pipeline.save_pretrained(tmp_path)
    loaded = VALDPipeline.from_pretrained(tmp_path)
    np.testing.assert_allclose(loaded(films, n=2, num_steps=5, seed=0).signed, pipeline(films, n=2, num_steps=5, seed=0).signed, atol=1e-5)
    assert loaded.config.threshold == 0.2 and loaded.config.strength == 0.4


def test_files_in_and_out(pipeline, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 48), dtype=np.uint8)).save(tmp_path / "film.png")
    made = pipeline(tmp_path / "film.png", n=2, num_steps=5, seed=0)
    out = pipeline.write(made, tmp_path / "out")
    assert sorted(file.name for file in out.iterdir()) == ["film_000.png", "maps.npz", "probabilities.json"]
    kept = np.load(out / "maps.npz")
    np.testing.assert_allclose(kept["signed"], made.signed)
    assert set(json.loads((out / "probabilities.json").read_text())[0]["before"]) == {"effusion", "nodule"}
    with pytest.raises(ValueError, match="is there already"):
        pipeline.write(made, out)
    assert pipeline.write(made, None) is None


def test_bad_films(pipeline, tmp_path):
    for wrong in (np.zeros((3, 20, 20), np.float32), np.full((16, 16), 255.0, np.float32)):
        with pytest.raises(ValueError, match="16 x 16"):
            pipeline(wrong, n=1)
    with pytest.raises(ValueError, match="at least 1"):
        pipeline(np.zeros((16, 16), np.float32), n=0)
    (tmp_path / "film.png").write_bytes(b"no picture")
    with pytest.raises(BadRecord, match="cannot be read"):
        pipeline(str(tmp_path / "film.png"), n=1)
