"Contracts of the film autoencoder: the straight line is the best linear code, parts of the loss, what is saved, bad sizes refused."
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from medgen_nb.cmr.vae import CineVae, FrameNet, Lpips, PatchCritic, balance, motion_error, outliers, pairs_at
from medgen_nb.data import loader
from medgen_nb.training import FitConfig, fit

WIDTHS, STRIDES, LATENT, SHAPE = (8, 12), ((1, 2, 2), (2, 2, 2)), 3, (6, 1, 8, 16, 16)
FIT = FitConfig(steps=10, batch_size=2, lr=1e-3, warmup=1, ema=0, save_every=10, precision="fp32")


@pytest.fixture
def x() -> torch.Tensor:
    "Films of a bright disc that shrinks and grows."
    n, _, frames, size, _ = SHAPE
    at = torch.arange(size) - size / 2 + 0.5
    far = (at[:, None].square() + at.square()).sqrt()
    radius = torch.linspace(4, 6, n)[:, None] * (0.8 + 0.2 * torch.cos(2 * torch.pi * torch.arange(frames) / frames))
    return torch.tanh(2 * (radius[..., None, None] - far))[:, None].float()


def build(features=0.0, critic=0.0, beta=1e-3) -> CineVae:
    torch.manual_seed(0)
    return CineVae(WIDTHS, STRIDES, 1, LATENT, beta, features, critic)


@pytest.fixture
def eye() -> FrameNet:
    torch.manual_seed(0)
    return FrameNet((6, 8)).eval().requires_grad_(False)


def test_it_starts_as_the_best_linear_code_of_patches(x):
    vae = build()
    vae.start(x)
    cut = x.unfold(2, 2, 2).unfold(3, 4, 4).unfold(4, 4, 4).reshape(-1, 32).numpy()
    middle = cut.mean()
    u, s, vt = np.linalg.svd(cut - middle, full_matrices=False)
    best = ((cut - middle) @ vt[:LATENT].T @ vt[:LATENT] + middle - cut) ** 2
    with torch.no_grad():
        q = vae.encode(x)
        error = (vae.decode(q.mode) - x).square().mean().item()
    assert error == pytest.approx(best.mean(), rel=1e-3)
    assert ((PCA(LATENT).fit(cut).inverse_transform(PCA(LATENT).fit_transform(cut)) - cut) ** 2).mean() <= error + 1e-6, "the library also moves each pixel's mean"
    assert torch.allclose(q.mean.square().mean((0, 2, 3, 4)), torch.ones(LATENT), atol=0.02) and torch.allclose(q.logvar, torch.tensor(-6.0))


@pytest.mark.parametrize("features,critic", [(0.0, 0.0), (0.1, 0.0), (0.1, 0.05)])
def test_fit_moves_every_part_and_lowers_the_loss(x, eye, features, critic):
    vae, adversary = build(features, critic), PatchCritic((4, 6)) if critic else None
    vae.start(x)
    vae.watch(eye)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    for state in fit(vae, loader({"x": x}, 2, 0), FIT, adversary=adversary):
        pass
    still = [name for name, p in vae.named_parameters() if torch.equal(p, before[name])]
    assert not still and np.isfinite(state.history[-1]["loss"])


def test_motion_error_minds_changes_alone_around_the_whole_circle(x):
    assert motion_error(x, x) == 0 and motion_error(x, x + 0.2) < 1e-6, "a film that is brighter in every frame moves the same"
    late = x.clone()
    late[:, :, 3] += 0.4   # one frame of eight is off: it changes twice, into the frame and out of it
    assert motion_error(x, late).item() == pytest.approx(2 * 0.4 / 8, rel=1e-4)
    first = x.clone()
    first[:, :, 0] += 0.4
    assert motion_error(x, first).item() == pytest.approx(2 * 0.4 / 8, rel=1e-4), "after the last frame comes the first"


def test_the_price_of_motion_joins_the_loss(x):
    still, moving = build(), CineVae(WIDTHS, STRIDES, 1, LATENT, 1e-3, 0.0, 0.0, motion=2.0)
    moving.load_state_dict(still.state_dict())
    losses = []
    for vae in (still, moving):
        torch.manual_seed(1)
        losses.append(vae.loss({"x": x}).item())
    torch.manual_seed(1)
    assert losses[1] - losses[0] == pytest.approx(2 * motion_error(x, still(x)[0]).item(), rel=1e-3)


def test_the_critic_pushes_as_hard_as_the_error_pulls(x):
    vae, critic = build(), PatchCritic((4, 6))
    x_hat, _ = vae(x)
    error, fooled = (x_hat - x).abs().mean(), -critic(x_hat).mean()
    weight = vae.line_out.weight
    scaled = torch.autograd.grad(balance(error, fooled, weight) * fooled, weight, retain_graph=True)[0].norm()
    assert torch.isclose(scaled, torch.autograd.grad(error, weight)[0].norm(), rtol=0.02)
    with torch.no_grad():
        assert balance(error, fooled, weight) == 1


def test_the_critic_is_rewarded_for_telling_real_from_made(x):
    critic = PatchCritic((4, 6))
    critic.forward = lambda film: torch.where((film == x[0, 0, 0, 0, 0]).flatten(1).any(1), 2.0, -2.0)
    class Same:
        def __call__(self, film): return torch.full_like(film, 9.0), None
    assert critic.loss(Same(), {"x": x}) == 0
    with torch.no_grad():
        assert PatchCritic((4, 6)).loss(build(), {"x": x}).item() == pytest.approx(1, abs=0.2), "undecided: one from each side, halved"


def test_a_frame_pair_goes_round_the_beat(x):
    pair = pairs_at(x[:2], torch.tensor([3, 7]))
    assert torch.equal(pair[0], x[0, 0, [3, 4]]) and torch.equal(pair[1], x[1, 0, [7, 0]])


def test_features_see_what_differs_and_nothing_else(x, eye):
    assert eye.distance(x, x) == 0 < eye.distance(x, x[:, :, :1].expand_as(x))
    torch.manual_seed(1)
    net = FrameNet((6, 8))
    first = net.loss({"x": x}).item()
    for state in fit(net, loader({"x": x}, 4, 0), FitConfig(steps=60, batch_size=4, lr=5e-3, warmup=1, ema=0, save_every=60, precision="fp32")):
        pass
    assert np.mean([net.loss({"x": x}).item() for _ in range(5)]) < first, "it learns when in the beat a frame was taken"


def test_only_sparks_are_outliers():
    even = torch.linspace(-1, 1, 256).view(1, 1, 1, 16, 16).expand(2, 1, 3, 16, 16)   # nothing lies three spreads above the mean
    assert outliers(even) == 0
    spark = even.clone()
    spark[0, 0, 0, 0, 0] = 50.0
    frame = spark[0, 0, 0]
    assert outliers(spark) == pytest.approx(((50 - frame.mean() - 3 * frame.std()) / spark.numel()).item(), rel=1e-4)


def test_saved_with_its_scale_and_without_the_eye(x, eye, tmp_path):
    vae = build(features=0.1)
    vae.start(x)
    vae.watch(eye)
    vae.measure_scale(x)
    vae.save_pretrained(tmp_path)
    again = CineVae.from_pretrained(tmp_path)
    z = vae.to_latent(x, torch.Generator().manual_seed(0))
    assert z.shape == (6, LATENT, 4, 4, 4) and again.from_latent(z).shape == x.shape
    torch.testing.assert_close(again.from_latent(z), vae.from_latent(z), rtol=0, atol=0)
    assert not again.eyes and all("eye" not in name for name in vae.state_dict())
    assert set(again.config) >= {"widths", "strides", "blocks", "latent_channels", "beta", "features", "critic"} and "in_channels" not in again.config


@pytest.mark.parametrize("wrong,said", [
    (lambda x: build(features=0.1).loss({"x": x}), "watch"), (lambda x: build(critic=-1.0), "0 or more"), (lambda x: build(beta=-1.0), "0 or more"),
    (lambda x: build().encode(x[:, :, :7]), "2 x 4 x 4"), (lambda x: build().measure_scale(x[:0]), "at least one"),
])
def test_what_cannot_be_is_refused(x, wrong, said):
    with pytest.raises(ValueError, match=said):
        wrong(x)


def test_lpips_says_what_it_needs(x):
    try:
        net = Lpips()
    except ValueError as error:
        assert "torchvision" in str(error)
    else:
        assert net.distance(x, x) == pytest.approx(0, abs=1e-5)
