"Contracts of the rival maps: signs, oracles on networks whose answer is known by hand, VA-GAN's game, bad input refused."
import numpy as np
import pytest
import torch
from torch import nn

from medgen_nb.autoencoder import KLAutoencoder
from medgen_nb.cxr.baselines import (BETAS, CHUNK, VaGan, VaGanCritic, autoencoder_difference, device_of, gradcam, highest_price, in_chunks, integrated_gradients,
                                     last_convolution, mean_difference, questioned, slope_penalty, unpaired, without_momentum)
from medgen_nb.data import loader
from medgen_nb.training import FitConfig, fit

SIZE = 16


def films(n: int = 8, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(n, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def squared(x: torch.Tensor, height: float = 0.6) -> tuple[torch.Tensor, torch.Tensor]:
    "Films with a bright square, and what it added."
    effect = torch.zeros_like(x)
    effect[:, :, 4:9, 6:11] = height
    return x + effect, effect[:, 0]


class Linear(nn.Module):
    "Two logits, each a weighed sum of pixels: every attribution is known by hand."

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, SIZE * SIZE, generator=torch.Generator().manual_seed(1)))
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return self.drop(x.flatten(1)) @ self.weight.T


class Convolutional(nn.Module):
    "One channel that is the film's positive part; logit 0 is its mean, logit 1 the negative of it."

    def __init__(self):
        super().__init__()
        self.first, self.drop = nn.Conv2d(1, 1, 1, bias=False), nn.Dropout(0.5)
        nn.init.ones_(self.first.weight)

    def forward(self, x):
        score = self.drop(torch.relu(self.first(x))).mean((1, 2, 3))
        return torch.stack([score, -score], 1)


# comparisons of films

def test_mean_difference_and_autoencoder_difference_are_positive_where_the_film_is_brighter():
    healthy = films()
    x, effect = squared(healthy)
    by_mean = mean_difference(x, healthy.mean(0, keepdim=True))
    by_oracle = autoencoder_difference(lambda part: part - squared(torch.zeros_like(part))[0], x)
    assert by_mean.shape == by_oracle.shape == (8, SIZE, SIZE)
    torch.testing.assert_close(by_oracle, effect)
    assert by_mean[effect > 0].mean() > 0.5 and by_mean[effect == 0].abs().mean() < 0.2


def test_an_autoencoder_with_a_latent_is_asked_through_it_and_its_draws_can_be_repeated():
    torch.manual_seed(0)
    vae = KLAutoencoder(1, (8,), ((2, 2),), 1, 2, 1e-4).eval()
    x = films(5)
    with pytest.raises(ValueError, match="measure_scale"):
        autoencoder_difference(vae, x)
    vae.measure_scale(x)
    seeded = lambda: torch.Generator().manual_seed(3)
    first, again = (autoencoder_difference(vae, x, seeded()) for _ in range(2))
    with torch.no_grad():
        by_hand = x - vae.from_latent(vae.to_latent(x, seeded()))
    assert torch.equal(first, again) and not first.requires_grad
    torch.testing.assert_close(first, by_hand[:, 0])


def test_in_chunks_changes_nothing_and_refuses_what_are_no_films():
    x = films(7)
    assert torch.equal(in_chunks(lambda part: 2 * part[:, 0], x, chunk=3), 2 * x[:, 0])
    for wrong in (x[:, 0], x.expand(-1, 3, -1, -1), x[:0]):
        with pytest.raises(ValueError, match="at least one film"):
            in_chunks(lambda part: part[:, 0], wrong)
    assert device_of(lambda film: film).type == "cpu" and device_of(Linear()).type == "cpu"


# questions to a classifier

@pytest.mark.parametrize("finding", [0, 1])
def test_integrated_gradients_of_a_linear_classifier_are_weight_times_difference(finding):
    classifier, x, start = Linear(), films(), films(1, seed=5)
    made = integrated_gradients(classifier, x, finding, start, steps=4)
    by_hand = (x - start)[:, 0] * classifier.weight[finding].view(SIZE, SIZE)
    torch.testing.assert_close(made, by_hand.detach(), atol=1e-5, rtol=1e-4)
    assert classifier.training and classifier.drop.training, "its mode is as before"
    assert classifier.weight.grad is None, "questions leave no gradients"


def test_integrated_gradients_sum_to_the_difference_of_the_logits():
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Conv2d(1, 6, 3), nn.SiLU(), nn.Flatten(), nn.Linear(6 * 14 * 14, 3)).eval()
    x, start = films(CHUNK + 2), films(1, seed=5)
    made = integrated_gradients(classifier, x, 2, start)
    with torch.no_grad():
        difference = classifier(x)[:, 2] - classifier(start)[:, 2]
    torch.testing.assert_close(made.sum((1, 2)), difference, atol=1e-3, rtol=1e-2)


def test_gradcam_follows_the_channel_that_speaks_for_the_finding():
    x, effect = squared(films())
    seen = gradcam(Convolutional(), x, finding=0)
    torch.testing.assert_close(seen * SIZE * SIZE * SIZE * SIZE / (x > 0).sum((1, 2, 3)).view(-1, 1, 1), x[:, 0].clamp_min(0), atol=1e-4, rtol=1e-3)
    assert (gradcam(Convolutional(), x, finding=1) >= 0).all() and gradcam(Convolutional(), x.abs(), finding=1).abs().max() == 0
    assert (seen[effect > 0] > 0).float().mean() > 0.99


def test_gradcam_enlarges_asks_a_named_layer_and_needs_no_gradients_from_outside():
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).requires_grad_(False)
    x = films()
    assert last_convolution(classifier) is classifier[2]
    with torch.no_grad():
        last, first = gradcam(classifier, x, 1), gradcam(classifier, x, 1, layer=classifier[0])
        integrated_gradients(classifier, x, 1, x[:1])
    assert last.shape == first.shape == (8, SIZE, SIZE) and not torch.equal(last, first) and classifier.training
    assert torch.equal(gradcam(classifier, x, 1, layer=classifier[2]), last)


def test_questions_that_cannot_be_asked_are_refused():
    with pytest.raises(ValueError, match="no convolution"):
        gradcam(Linear(), films(), 0)
    for wrong in (films(2), films(1)[..., :8]):
        with pytest.raises(ValueError, match="baseline"):
            integrated_gradients(Linear(), films(), 0, wrong)


def test_a_classifier_gets_its_mode_back_after_an_error():
    classifier = Linear()
    classifier.drop.eval()
    with pytest.raises(RuntimeError), questioned(classifier):
        assert not classifier.training
        raise RuntimeError
    assert classifier.training and not classifier.drop.training


# VA-GAN

def test_unpaired_uses_everybody_and_repeats_the_smaller_group():
    batch = unpaired(films(7), films(3, seed=1), seed=0)
    assert batch["x"].shape == batch["healthy"].shape == (7, 1, SIZE, SIZE)
    assert len(batch["x"].flatten(1).unique(dim=0)) == 7 and len(batch["healthy"].flatten(1).unique(dim=0)) == 3
    assert torch.equal(batch["x"], unpaired(films(7), films(3, seed=1), seed=0)["x"])
    for wrong in ((films(0), films(2)), (films(2), films(0)), (films(2), films(2)[..., :8])):
        with pytest.raises(ValueError, match="of one size"):
            unpaired(*wrong)


@pytest.mark.parametrize("slope", [0.0, 0.5, 2.0])
def test_slope_penalty_of_a_linear_critic(slope):
    direction = torch.ones(SIZE * SIZE) / SIZE
    penalty = slope_penalty(lambda x: slope * x.flatten(1) @ direction, films(4), films(4, seed=1))
    assert penalty.item() == pytest.approx((slope - 1) ** 2, abs=1e-4)


def test_the_penalty_teaches_the_critic_and_stays_in_float32():
    torch.manual_seed(0)
    critic = VaGanCritic((4, 8), penalty=10.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        penalty = slope_penalty(critic, films(4), films(4, seed=1))
    penalty.backward()
    assert penalty.dtype == torch.float32 and all(torch.isfinite(p.grad).all() for p in critic.parameters() if p.grad is not None)
    assert critic.look[0].weight.grad.abs().sum() > 0


def test_losses_are_what_they_say():
    x, _ = squared(films())
    batch = {"x": x, "healthy": films(seed=2)}
    class Adds:
        def __call__(self, part): return torch.full_like(part, -0.1)
    critic = VaGanCritic((4,), penalty=0.0)
    critic.forward = lambda part: part.mean((1, 2, 3))
    assert critic.loss(Adds(), batch).item() == pytest.approx((x - 0.1).mean().item() - batch["healthy"].mean().item(), abs=1e-5)
    torch.manual_seed(0)
    model = VaGan((4, 8), price=3.0)
    nn.init.normal_(model.read_out.weight, std=0.1)
    change = model(x)
    assert model.loss(batch, critic).item() == pytest.approx((3.0 * change.abs().mean() - (x + change).mean()).item(), abs=1e-5)
    torch.testing.assert_close(model.map_of(x), -change[:, 0].detach())


def test_it_starts_with_no_change_and_refuses_odd_sizes():
    model = VaGan((4, 8, 8), price=1.0)
    assert not model.map_of(films()).any()
    assert model.map_of(torch.zeros(2, 1, 8, 12)).shape == (2, 8, 12)
    for wrong in (torch.zeros(2, 1, 16, 18), torch.zeros(2, 3, 16, 16), torch.zeros(1, 16, 16)):
        with pytest.raises(ValueError, match="multiples of 4"):
            model(wrong)


def test_one_film_does_not_change_another_ones_map():
    torch.manual_seed(0)
    model = VaGan((4, 8), price=1.0)
    nn.init.normal_(model.read_out.weight, std=0.1)
    x = films()
    torch.testing.assert_close(model.map_of(x)[:1], model.map_of(x[:1]), atol=1e-6, rtol=1e-4)


def test_beyond_the_highest_price_removing_costs_more_than_a_critic_of_slope_one_pays():
    effect = squared(torch.zeros(1, 1, SIZE, SIZE))[1][0]
    limit = highest_price(SIZE, (effect > 0).float().mean().item())
    paid, cost = effect.norm().item(), effect.abs().mean().item()   # slope 1 along the effect; L1 of weight 1
    assert paid == pytest.approx(limit * cost, rel=1e-5)
    for wrong in ((0, 0.1), (8, 0.0), (8, 1.1)):
        with pytest.raises(ValueError, match="share"):
            highest_price(*wrong)


def train(steps: int, precision: str = "fp32", price: float = 3.0) -> tuple[VaGan, torch.Tensor, torch.Tensor]:
    x, effect = squared(films(64))
    torch.manual_seed(0)
    model, critic = VaGan((4, 8), price), VaGanCritic((8, 16), penalty=10.0)
    config = FitConfig(steps=steps, batch_size=8, lr=3e-3, critic_lr=3e-3, critic_steps=3, schedule="constant", warmup=1, ema=0, clip=100.0, precision=precision)
    for state in fit(model, loader(unpaired(x, films(64, seed=9)), 8), config, adversary=critic, device="cpu"):
        without_momentum(state)
    assert {tuple(g["betas"]) for o in state.optimizers.values() for g in o.param_groups} == {BETAS}
    return model, x, effect


def test_it_learns_to_take_the_square_away():
    model, x, effect = train(60)
    maps = model.map_of(x)
    similar = [np.corrcoef(m.flatten(), e.flatten())[0, 1] for m, e in zip(maps.numpy(), effect.numpy())]
    assert np.mean(similar) > 0.6, np.mean(similar)
    assert maps[effect > 0].mean() > 0.15 and maps[effect == 0].abs().mean() < 0.3 * maps[effect > 0].mean()


def test_too_dear_a_change_is_not_made():
    model, x, effect = train(20, price=2 * highest_price(SIZE, 25 / SIZE**2))
    assert model.map_of(x)[effect > 0].abs().mean() < 0.05


def test_half_precision_trains_too():
    model, x, _ = train(3, precision="bf16")
    assert all(torch.isfinite(p).all() for p in model.parameters()) and torch.isfinite(model.map_of(x)).all()


def test_both_players_are_saved(tmp_path):
    for model in (VaGan((4, 8), price=2.0), VaGanCritic((4,), penalty=10.0)):
        model.save_pretrained(tmp_path / type(model).__name__)
        again = type(model).from_pretrained(tmp_path / type(model).__name__)
        assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
        assert tuple(again.config.widths) == model.config.widths
