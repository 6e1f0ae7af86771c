"The chest film room's latent diffusion model: shapes, words, silence, tuning rows, Stable Diffusion's layout."
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from medgen_nb.cxr.data import FINDINGS, prompt_of
from medgen_nb.cxr.model import Artist, build_scheduler, build_unet, build_vae, draw_films, label_of, load_stable_diffusion, tuning_table
from medgen_nb.diffusion import sample
from medgen_nb.text import TextEncoder

PROMPTS = [prompt_of(code, place) for code, finding in FINDINGS.items() for place in finding.places] + [prompt_of("normal")]


def make_artist(untold=0.1, joint=False, words="sentences", says="epsilon"):
    torch.manual_seed(0)
    texts = ["normal", *FINDINGS] if words == "label" else PROMPTS
    return Artist(build_unet(8, 4, (8, 16), 1, 2, 16), TextEncoder.fresh(texts, 200, 16, 1, 2, 24), build_scheduler(says), untold, joint, words).eval()


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    made = build_vae((8, 8), 1, 4).eval()
    made.measure_scale(torch.rand(20, 1, 16, 16) * 2 - 1)
    return made


def test_latents_have_unit_spread_and_come_back(vae):
    x = torch.rand(20, 1, 16, 16) * 2 - 1
    z = vae.to_latent(x, chunk=7)
    assert z.shape == (20, 4, 8, 8) and abs(z.std() - 1) < 0.2 and abs(z.mean()) < 0.3
    again = vae.from_latent(z, chunk=3)
    assert again.shape == x.shape and again.abs().max() <= 1
    torch.testing.assert_close(again, vae.decode(vae.encode(x).latent_dist.mean).sample.clamp(-1, 1), rtol=1e-3, atol=1e-4)
    assert not torch.equal(vae.to_latent(x, torch.Generator().manual_seed(0)), z)


def test_the_scale_is_saved(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    loaded = type(vae).from_pretrained(tmp_path)
    x = torch.rand(2, 1, 16, 16)
    torch.testing.assert_close(loaded.to_latent(x), vae.to_latent(x))
    with pytest.raises(ValueError, match="no films"):
        vae.measure_scale(x[:0])


def test_the_autoencoder_learns_one_film():
    torch.manual_seed(0)
    vae, x = build_vae((8, 8), 1, 4), torch.linspace(-1, 1, 16).expand(1, 1, 16, 16).contiguous()
    optimiser, losses = torch.optim.Adam(vae.parameters(), 1e-2), []
    for _ in range(40):
        loss = vae.loss({"x": x}); optimiser.zero_grad(); loss.backward(); optimiser.step(); losses.append(loss.item())
    assert losses[-1] < 0.3 * losses[0]


@pytest.mark.parametrize("widths", [(), (4,), (8, 12)])
def test_widths_that_do_not_fit(widths):
    with pytest.raises(ValueError, match="multiples of 8"):
        build_vae(widths, 1, 4)
    with pytest.raises(ValueError, match="multiples of 8"):
        build_unet(8, 4, widths, 1, 2, 16)


def test_a_latent_that_cannot_be_halved():
    with pytest.raises(ValueError, match="cannot be halved"):
        build_unet(6, 4, (8, 8, 8), 1, 2, 16)


def test_words_matter_and_padding_does_not():
    artist, z, t = make_artist(), torch.randn(2, 4, 8, 8), torch.tensor([300, 300])
    with torch.no_grad():
        one = artist.predictor([prompt_of("normal"), prompt_of("effusion", "left lower zone")], 1.0)(z, t)
        alone = artist.predictor([prompt_of("normal")], 1.0)(z[:1], t[:1])
        other = artist.predictor([prompt_of("nodule", "left upper zone")], 1.0)(z[:1], t[:1])
    torch.testing.assert_close(one[:1], alone, rtol=1e-4, atol=1e-4)      # beside a longer prompt, so padded
    assert not torch.allclose(other, alone, atol=1e-5)


def test_guidance_is_the_straight_line_through_both_answers():
    artist, z, t = make_artist(), torch.randn(1, 4, 8, 8), torch.tensor([300])
    with torch.no_grad():
        said, quiet, guided = (artist.predictor(words, g)(z, t) for words, g in (([prompt_of("covid")], 1.0), ([""], 1.0), ([prompt_of("covid")], 2.5)))
        away = artist.predictor([prompt_of("covid")], 2.0, against=prompt_of("normal"))(z, t)
    torch.testing.assert_close(guided, quiet + 2.5 * (said - quiet), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(away, guided, atol=1e-5)


@pytest.mark.parametrize("untold, same", [(1.0, True), (0.0, False)])
def test_what_is_left_unsaid_has_no_words(untold, same):
    artist = make_artist(untold)
    z = torch.randn(4, 4, 8, 8)
    losses = []
    for prompts in (["", "", "", ""], PROMPTS[:4]):
        torch.manual_seed(1)
        losses.append(artist.loss(artist.table(z, prompts)).item())
    assert (abs(losses[0] - losses[1]) < 1e-5) == same


@pytest.mark.parametrize("joint", [True, False])
def test_the_encoder_learns_only_where_it_shall(joint):
    artist = make_artist(joint=joint).train()
    artist.loss(artist.table(torch.randn(2, 4, 8, 8), PROMPTS[:2])).backward()
    learned = any(p.grad is not None and p.grad.abs().max() > 0 for p in artist.text.parameters())
    assert learned == joint and artist.text.training == joint


def test_weights_of_rows_count():
    artist, z = make_artist(0.0), torch.randn(4, 4, 8, 8)
    rows = artist.table(z, PROMPTS[:4])
    torch.manual_seed(0); one = artist.loss(rows)
    torch.manual_seed(0); half = artist.loss(rows | {"weight": torch.full((4,), 0.5)})
    assert half.item() == pytest.approx(one.item() / 2, rel=1e-5)
    mixed = tuning_table(artist, z[:2], PROMPTS[:2], (z[2:], PROMPTS[2:4]), 0.25)
    assert mixed["weight"].tolist() == [1, 1, 0.25, 0.25] and len({len(column) for column in mixed.values()}) == 1


def test_labels_are_what_prompts_are_about():
    assert [label_of(prompt_of(code, finding.places[0])) for code, finding in FINDINGS.items()] == list(FINDINGS)
    assert label_of(prompt_of("normal")) == "normal" and label_of("") == "" and label_of("Clear lungs, no pneumothorax.") == "normal"
    artist = make_artist(words="label")
    left, right = (artist.read([prompt_of("nodule", place)])["input_ids"] for place in ("left upper zone", "right lower zone"))
    assert torch.equal(left, right) and not torch.equal(left, artist.read([prompt_of("covid")])["input_ids"])


def test_wrong_parts():
    text = TextEncoder.fresh(PROMPTS, 200, 16, 1, 2, 24)
    with pytest.raises(ValueError, match="build them for each other"):
        Artist(build_unet(8, 4, (8, 16), 1, 2, 24), text, build_scheduler("epsilon"), 0.1, False, "sentences")
    for untold, words in ((1.5, "sentences"), (0.1, "emojis")):
        with pytest.raises(ValueError, match="correct them"):
            Artist(build_unet(8, 4, (8, 16), 1, 2, 16), text, build_scheduler("epsilon"), untold, False, words)


def test_films_are_drawn_by_the_shared_sampler(vae):
    artist = make_artist()
    films = draw_films(vae, artist, PROMPTS[:2], 3, 2.0, torch.Generator().manual_seed(0))
    same = sample(artist.predictor(PROMPTS[:2], 2.0), artist.scheduler, (2, 4, 8, 8), 3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(films, vae.from_latent(same))


def test_the_schedule_is_stable_diffusions():
    torch.testing.assert_close(build_scheduler("epsilon").alphas_cumprod, DDIMScheduler(1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod)


def test_a_folder_in_stable_diffusions_layout(tmp_path):
    AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), norm_num_groups=4).save_pretrained(tmp_path / "sd" / "vae")
    artist = make_artist()
    artist.unet.save_pretrained(tmp_path / "sd" / "unet"); artist.scheduler.save_pretrained(tmp_path / "sd" / "scheduler"); artist.text.save(tmp_path / "bert")
    vae, loaded = load_stable_diffusion(str(tmp_path / "sd"), str(tmp_path / "bert"))
    assert isinstance(loaded.unet, UNet2DConditionModel) and loaded.joint and vae.config.in_channels == 3
    z = vae.to_latent(torch.zeros(2, 1, 16, 16))
    assert z.shape == (2, 4, 8, 8) and vae.from_latent(z).shape == (2, 1, 16, 16)
    loaded.train().loss(loaded.table(z, PROMPTS[:2])).backward()
    with pytest.raises(ValueError, match="cannot be had"):
        load_stable_diffusion(str(tmp_path / "nowhere"), str(tmp_path / "bert"))
    with pytest.raises(ValueError, match="cannot be had"):
        load_stable_diffusion(str(tmp_path / "sd"), str(tmp_path / "nobody"))
    assert np.isfinite(z.numpy()).all()
