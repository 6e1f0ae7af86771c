"Contracts of the autoencoder: equal to diffusers' Gaussian, mirror-image shapes, a scale that is measured and saved, bad sizes refused."
import math

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch.distributions import Normal, kl_divergence

from medgen_nb.autoencoder import ConvBlock, Decoder, Encoder, Gaussian, KLAutoencoder, LatentScale, ThroughLatent, group_norm, moments
from medgen_nb.data import loader
from medgen_nb.training import FitConfig, fit

WIDTHS, STRIDES, LATENT = (8, 12), ((2, 1), (2, 4)), 3   # shrinks 4 rows and 4 columns to one; 12 is no multiple of 8
SHAPE = (5, 2, 16, 24)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(SHAPE, generator=seeded())


@pytest.fixture
def model() -> KLAutoencoder:
    torch.manual_seed(0)
    return KLAutoencoder(SHAPE[1], WIDTHS, STRIDES, 1, LATENT, 0.1)


@pytest.fixture
def q() -> Gaussian:
    "Log-variances from far below what is allowed to far above it."
    mean, logvar = torch.randn(2, 4, 3, 2, 5, generator=seeded())
    return Gaussian(mean, logvar * 30)


def library(q: Gaussian) -> DiagonalGaussianDistribution:
    return DiagonalGaussianDistribution(torch.cat([q.mean, q.logvar], 1))


def test_gaussian_is_the_library_s(q):
    theirs = library(q)
    assert (q.logvar.min(), q.logvar.max()) == (-30, 20), "the clamp is tried at both ends"
    torch.testing.assert_close(q.sample(seeded(1)), theirs.sample(seeded(1)))
    torch.testing.assert_close(q.kl(), theirs.kl())
    assert torch.equal(q.mode, theirs.mode()) and torch.equal(q.std, theirs.std)


def test_kl_is_the_sum_over_all_numbers_of_any_shape():
    for shape in ((4, 6), (4, 2, 3), (4, 2, 3, 2, 5)):
        mean, logvar = torch.randn(2, *shape, generator=seeded(), dtype=torch.float64)
        expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(torch.zeros(()).double(), torch.ones(()).double()))
        torch.testing.assert_close(Gaussian(mean, logvar).kl(), expected.flatten(1).sum(1))
    assert Gaussian(torch.zeros(2, 3), torch.zeros(2, 3)).kl().tolist() == [0, 0]


def test_gaussian_splits_channels_and_lets_gradients_through():
    h = torch.randn(2, 6, 3, 4, generator=seeded(), requires_grad=True)
    q = Gaussian.split(h)
    assert torch.equal(q.mean, h[:, :3]) and torch.equal(q.logvar, h[:, 3:])
    q.sample(seeded()).square().sum().backward()
    assert (h.grad != 0).all()
    with pytest.raises(ValueError, match="even"):
        Gaussian.split(torch.zeros(2, 5, 3, 4))
    with pytest.raises(ValueError, match="log-variance"):
        Gaussian(torch.zeros(2, 3), torch.zeros(2, 4))


@pytest.mark.parametrize("channels,groups", [(8, 8), (64, 8), (12, 4), (7, 1), (1, 1)])
def test_any_width_can_be_normed(channels, groups):
    assert group_norm(channels).num_groups == groups
    x = torch.randn(3, channels, 4, 5, generator=seeded())
    assert ConvBlock(channels, 2)(x).shape == x.shape


def test_block_starts_near_what_came_in_and_mixes_no_pictures(x):
    torch.manual_seed(0)
    block, x = ConvBlock(8, 2), torch.randn(3, 8, 6, 6, generator=seeded())
    changed = x.clone()
    changed[1] += 1
    torch.testing.assert_close(block(x)[[0, 2]], block(changed)[[0, 2]])
    torch.testing.assert_close(block(x), x + block.branch(x))


@pytest.mark.parametrize("strides", [((1, 1),), ((4, 4),), ((1, 2), (3, 1)), ((2, 2), (2, 2), (1, 2))])
@pytest.mark.parametrize("blocks", [0, 2])
def test_decoder_undoes_the_encoder_s_shape(strides, blocks):
    rows, columns = (math.prod(s[k] for s in strides) for k in (0, 1))
    widths = (8, 16, 24)[: len(strides)]
    x = torch.randn(2, 3, 2 * rows, 3 * columns)
    h = Encoder(3, widths, strides, blocks, 5)(x)
    assert h.shape == (2, 5, 2, 3) and Decoder(5, widths, strides, blocks, 3)(h).shape == x.shape


def test_no_convolution_of_the_encoder_runs_at_full_resolution():
    sizes, encoder = [], Encoder(1, (8, 8), ((4, 4), (1, 2)), 1, 4)
    for part in encoder.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.register_forward_hook(lambda part, given, made: sizes.append(made.shape[-2:].numel()))
    encoder(torch.zeros(1, 1, 16, 16))
    assert len(sizes) == 7 and max(sizes) == 16 and min(sizes) == 8


def test_every_pixel_is_seen_and_drawn(model, x):
    "A stride wider than its kernel would skip pixels."
    x.requires_grad_()
    q = model.encode(x)
    (seen,) = torch.autograd.grad(q.mean.square().sum() + q.logvar.square().sum(), x)
    assert (seen != 0).all()
    z = q.mean.detach().requires_grad_()
    (used,) = torch.autograd.grad(model.decode(z).square().sum(), z)
    assert (used != 0).all()


def test_loss_is_error_plus_price_and_reaches_every_weight(model, x):
    torch.manual_seed(3)
    loss = model.loss({"x": x})
    torch.manual_seed(3)
    x_hat, q = model(x)
    expected = (x_hat - x).square().mean() + 0.1 * q.kl().sum() / x.numel()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_loss_falls(model):
    x = torch.sin(torch.arange(24) * 0.7)[None, None, None] * torch.linspace(-1, 1, 32)[:, None, None, None].expand(32, 2, 16, 1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    torch.manual_seed(0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        losses.append(model.loss({"x": x}))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0], (losses[0], losses[-1])


def test_noise_comes_from_the_generator(model, x):
    first, second, other = (model(x, seeded(s))[0] for s in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    model.measure_scale(x)
    assert torch.equal(model.to_latent(x, seeded()), model.to_latent(x, seeded()))


def test_moments_are_those_of_many_samples():
    mean, logvar = torch.randn(2, 40, 2, 3, 4, generator=seeded())
    q = Gaussian(2 * mean + torch.tensor([3.0, -1.0])[:, None, None], logvar - torch.tensor([0.0, 4.0])[:, None, None])
    drawn = torch.cat([q.sample(seeded(k)) for k in range(400)])
    m, s, n = moments([q])
    torch.testing.assert_close(m.float(), drawn.mean((0, 2, 3)), rtol=0, atol=0.03)
    torch.testing.assert_close(s.float(), drawn.std((0, 2, 3)), rtol=0.01, atol=0)
    assert n == 40


def test_latents_have_unit_variance_however_they_are_given(model):
    x = 3 + 2 * torch.randn(300, *SHAPE[1:], generator=seeded())
    model.measure_scale(x)
    whole = model.scale.mean.clone(), model.scale.std.clone()
    model.measure_scale([{"x": x[:7]}, {"x": x[7:]}])
    torch.testing.assert_close((model.scale.mean, model.scale.std), whole)
    assert model.scale.seen == 300
    z = model.to_latent(x, seeded())
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(LATENT), rtol=0, atol=0.03)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(LATENT), rtol=0, atol=0.03)
    torch.testing.assert_close(model.from_latent(z), model.decode(model.encode(x).sample(seeded())), rtol=1e-4, atol=1e-4)


def test_measuring_changes_neither_weights_nor_the_random_stream(model, x):
    before, state = [p.clone() for p in model.parameters()], torch.get_rng_state()
    model.measure_scale(x)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and torch.equal(state, torch.get_rng_state())


def test_scale_is_saved_with_the_weights(model, x, tmp_path):
    model.measure_scale(x)
    model.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "diffusion_pytorch_model.safetensors"}
    again = KLAutoencoder.from_pretrained(tmp_path)
    assert again.scale.seen == len(x) and dict(again.config)["beta"] == 0.1
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    torch.testing.assert_close(again.to_latent(x, seeded()), model.to_latent(x, seeded()), rtol=0, atol=0)


def test_scale_works_for_any_number_of_axes():
    scale, q = LatentScale(3), Gaussian(torch.randn(6, 3, 2, 4, 5, generator=seeded()), torch.zeros(6, 3, 2, 4, 5))
    scale.measure([q])
    z = q.sample(seeded())
    torch.testing.assert_close(scale.from_unit(scale.to_unit(z)), z)


def test_half_precision_does_not_round_the_nats(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        q, loss = model.encode(x), model.loss({"x": x})
    assert q.mean.dtype == q.kl().dtype == loss.dtype == torch.float32


def test_fit_trains_it_and_keeps_the_scale(model, x):
    model.measure_scale(x)
    before, kept = model.decoder.read_in.weight.clone(), model.scale.std.clone()
    for training in fit(model, loader({"x": x}, batch_size=4), FitConfig(steps=3, lr=1e-3)):
        pass
    assert not torch.equal(training.model.decoder.read_in.weight, before) and torch.equal(training.model.scale.std, kept)


class Wrapped(ThroughLatent, torch.nn.Module):
    "Diffusers' autoencoder with our scale."

    def __init__(self, vae):
        super().__init__()
        self.vae, self.scale = vae, LatentScale(vae.config.latent_channels)

    def encode(self, x):
        law = self.vae.encode(x).latent_dist
        return Gaussian(law.mean, law.logvar)

    def decode(self, z):
        return self.vae.decode(z).sample


def test_the_library_s_autoencoder_fits_into_the_same_place(x):
    torch.manual_seed(0)
    vae = AutoencoderKL(2, 2, ["DownEncoderBlock2D"] * 2, ["UpDecoderBlock2D"] * 2, (8, 8), 1, latent_channels=LATENT, norm_num_groups=4)
    model = Wrapped(vae).requires_grad_(False)
    torch.testing.assert_close(model(x, seeded())[0], vae(x, sample_posterior=True, generator=seeded()).sample)
    model.measure_scale(x)
    z = model.to_latent(x, seeded())
    assert z.shape == (5, LATENT, 8, 12) and model.from_latent(z).shape == x.shape
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(LATENT), rtol=0, atol=0.1)


def test_bad_arguments_are_named(model, x):
    for wrong, said in ((lambda: model.to_latent(x), "never measured"), (lambda: model.from_latent(x), "never measured"),
                        (lambda: model.measure_scale([]), "at least one"), (lambda: model.measure_scale(x[:0]), "at least one"),
                        (lambda: model.measure_scale(x * math.nan), "finite"),
                        (lambda: model.encode(x[:, :, :15]), "4 x 4 pixels one"), (lambda: model.encode(x[0]), "4 x 4 pixels one"),
                        (lambda: KLAutoencoder(1, (8,), STRIDES, 1, 2, 0.1), "same length"),
                        (lambda: Decoder(1, (), (), 1, 2), "at least one level"), (lambda: Encoder(1, (8,), ((2,),), 1, 2), "rows, columns"),
                        (lambda: KLAutoencoder(1, WIDTHS, STRIDES, 1, 2, -0.1), "0 or more")):
        with pytest.raises(ValueError, match=said):
            wrong()
    assert model.scale.seen == 0, "a failed measurement leaves no trace"


FILM_STRIDES = ((1, 2, 2), (2, 2, 2))   # two frames, four rows, four columns become one place


@pytest.mark.parametrize("blocks", [0, 1])
def test_films_shrink_along_three_axes_and_come_back(blocks):
    torch.manual_seed(0)
    model = KLAutoencoder(1, WIDTHS, FILM_STRIDES, blocks, LATENT, 0.1)
    x = torch.randn(2, 1, 6, 8, 12, generator=seeded())
    q = model.encode(x)
    assert model.encoder.shrink == (2, 4, 4) and q.mean.shape == (2, LATENT, 3, 2, 3) and model.decode(q.mean).shape == x.shape
    model.measure_scale(x)
    z = model.to_latent(x, seeded())
    assert model.scale.mean.shape == (LATENT,) and model.from_latent(z).shape == x.shape
    model.loss({"x": x}).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_film_autoencoder_sees_time():
    torch.manual_seed(0)
    model = KLAutoencoder(1, WIDTHS, FILM_STRIDES, 1, LATENT, 0.1)
    x = torch.randn(1, 1, 8, 8, 8, generator=seeded())
    moved = x.clone()
    moved[:, :, 3] += 1
    change = (model.encode(moved).mean - model.encode(x).mean).abs().amax((0, 1, 3, 4))
    assert change.shape == (4,) and change[1] > 0 and change[0] > 0, "the frame's own place and, through the border, its neighbour"


@pytest.mark.parametrize("wrong,said", [
    (lambda: Encoder(1, (8, 8), ((2, 2), (2, 2, 2)), 1, 2), "all \\(rows, columns\\) or all"),
    (lambda: KLAutoencoder(1, WIDTHS, FILM_STRIDES, 1, LATENT, 0.1).encode(torch.zeros(1, 1, 7, 8, 8)), "2 x 4 x 4 pixels one"),
    (lambda: KLAutoencoder(1, WIDTHS, FILM_STRIDES, 1, LATENT, 0.1).encode(torch.zeros(1, 1, 8, 8)), "frames, height, width"),
])
def test_films_of_another_shape_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong()
