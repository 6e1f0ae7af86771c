"""Multinomial diffusion: brute force, the parent's numbers (oracle), and a toy whose joint table is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from medgen_nb.ehr.diffusion import (
    CodeBridge,
    MultinomialDiffusion,
    MultinomialScheduler,
    cosine_keep,
    draw,
    linear_keep,
    sample,
)

ORACLE = Path(__file__).resolve().parents[1].parent / "shared" / "oracles" / "multinomial.npz"
LIKELY = 1e-4        # compare logs only where the probability is not tiny, as the oracle's notes advise
T = 50
RECORDS = torch.cartesian_prod(*[torch.arange(2)] * 3)                                                       # (8, 3)
TABLE = torch.tensor([0.50, 0.06, 0.01, 0.12, 0.02, 0.01, 0.18, 0.10], dtype=torch.float64)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    "Tiny tensors: more threads only wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- the parent's numbers

@pytest.fixture(params=["K2", "K5"])
def parent(request):
    if not ORACLE.exists():
        pytest.skip(f"the parent's numbers are not here ({ORACLE.name} in shared/oracles beside the checkout)")
    with np.load(ORACLE) as numbers:
        ours = {key[3:]: torch.from_numpy(numbers[key]) for key in numbers.files if key.startswith(request.param)}
    return CodeBridge(int(request.param[1]), T, "cosine"), ours


def agree(ours, log_theirs):
    "ours (rows, N, K) probabilities; theirs (rows, K, N) logs."
    theirs = log_theirs.double().mT
    torch.testing.assert_close(ours, theirs.exp(), atol=1e-6, rtol=0)
    likely = ours > LIKELY
    torch.testing.assert_close(ours[likely].log(), theirs[likely], atol=1e-3, rtol=0)


def test_schedule_is_the_parents(parent):
    process, theirs = parent
    torch.testing.assert_close(process.alpha, theirs["alpha_float64"], atol=1e-14, rtol=0)
    torch.testing.assert_close(process.abar.log(), theirs["log_cumprod_alpha"].double(), atol=1e-5, rtol=0)


def test_marginal_and_prior_are_the_parents(parent):
    process, theirs = parent
    agree(process.marginal(theirs["x0"], theirs["t"]), theirs["log_q_xt_given_x0"])
    kl = MultinomialDiffusion(process.classes, T, "cosine", "uniform").prior_kl(theirs["x0"])
    torch.testing.assert_close(kl, theirs["kl_prior"].double(), atol=2e-6, rtol=0)


@pytest.mark.parametrize("form", ["mixture", "product"])
def test_posterior_is_the_parents_where_x0_is_known(parent, form):
    process, theirs = parent
    ours = process.posterior(theirs["xt"], F.one_hot(theirs["x0"], process.classes), theirs["t"], form=form)
    torch.testing.assert_close(ours, theirs["posterior_prob_float64"].mT, atol=1e-12, rtol=0)
    agree(ours, theirs["log_q_posterior"])


def test_product_form_is_the_parents_where_x0_is_soft(parent):
    process, theirs = parent
    soft = theirs["log_x0_soft"].double().exp().mT
    agree(process.posterior(theirs["xt"], soft, theirs["t"], form="product"), theirs["log_q_posterior_soft"])


# ---- brute force

@pytest.mark.parametrize("schedule", ["cosine", "linear", "geometric"])
@pytest.mark.parametrize("classes", [2, 3, 4])
def test_posterior_is_bayes_by_matrices(classes, schedule):
    steps = 6
    process = CodeBridge(classes, steps, schedule)
    eye = torch.eye(classes, dtype=torch.float64)
    jumps = [alpha * eye + (1 - alpha) / classes for alpha in process.alpha]
    pairs = torch.cartesian_prod(torch.arange(classes), torch.arange(classes))       # x0, xt
    soft = torch.rand(len(pairs), 1, classes, dtype=torch.float64).softmax(-1)
    for t in range(steps):
        for s in range(-1, t):
            first = torch.linalg.multi_dot([eye, *jumps[: s + 1], eye])
            then = torch.linalg.multi_dot([eye, *jumps[s + 1 : t + 1], eye])
            joint = first[:, None, :] * then.T[None]                                   # x0, xt, xs
            right = joint / joint.sum(-1, keepdim=True)
            at = torch.full((len(pairs),), t)
            torch.testing.assert_close(process.marginal(pairs[:, :1], at)[:, 0], (first @ then)[pairs[:, 0]])
            for form in ("mixture", "product"):
                ours = process.posterior(pairs[:, 1:], eye[pairs[:, :1]], at, s, form)[:, 0]
                torch.testing.assert_close(ours, right[pairs[:, 0], pairs[:, 1]], rtol=1e-10, atol=1e-14)
            average = torch.einsum("po,opk->pk", soft[:, 0], right[:, pairs[:, 1]])    # sum over x0 of the posteriors
            torch.testing.assert_close(process.posterior(pairs[:, 1:], soft, at, s)[:, 0], average)


def test_s_per_row_and_default():
    process = CodeBridge(3, 9, "cosine")
    xt, soft, t = torch.randint(3, (4, 5)), torch.rand(4, 5, 3).softmax(-1), torch.tensor([0, 1, 4, 8])
    torch.testing.assert_close(process.posterior(xt, soft, t), process.posterior(xt, soft, t, t - 1))
    rows = process.posterior(xt, soft, t, torch.tensor([-1, -1, 2, 0]))
    torch.testing.assert_close(rows[2:3], process.posterior(xt[2:3], soft[2:3], t[2:3], 2))
    torch.testing.assert_close(rows[:2], soft[:2].double())           # s = -1: the law of x0 itself


def test_draws_follow_the_law_and_the_generator():
    law = torch.tensor([0.0, 0.15, 0.85, 0.0]).expand(200_000, 4)
    first, again = (draw(law, torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.dtype == torch.int64 and torch.equal(first, again) and set(first.tolist()) == {1, 2}
    assert abs((first == 1).double().mean() - 0.15) < 0.004


@pytest.mark.parametrize("keep", [cosine_keep, linear_keep])
@pytest.mark.parametrize("steps", [1, 2, 50, 1000])
def test_schedules_keep_something_and_end_near_noise(keep, steps):
    alpha = keep(steps)
    assert alpha.shape == (steps,) and alpha.dtype == torch.float64
    assert (alpha > 0).all() and (alpha < 1).all() and alpha.prod() < 0.04


# ---- the toy of three codes

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 6))

    def forward(self, xt, t):
        waves = (t[:, None] + 0.5) / T * torch.pi * torch.tensor([1, 2, 4])
        return self.net(torch.cat([2.0 * xt - 1, waves.sin(), waves.cos()], -1)).unflatten(-1, (3, 2))


@pytest.fixture(scope="module")
def toy():
    torch.manual_seed(0)
    data = RECORDS[torch.multinomial(TABLE, 20_000, replacement=True)]
    diffusion, net = MultinomialDiffusion(2, T, "cosine", "importance"), Net()
    best = torch.optim.Adam(net.parameters())
    cycle = torch.optim.lr_scheduler.OneCycleLR(best, 1e-2, 600)
    for _ in range(600):
        loss = diffusion.loss(net, data[torch.randint(len(data), (256,))])
        best.zero_grad(); loss.backward(); best.step(); cycle.step()
    diffusion.eval()
    return diffusion, net.requires_grad_(False), data


def chain_law(toy, steps):
    "Exact law (8,) of a sampled record."
    _diffusion, net, _ = toy
    scheduler = MultinomialScheduler(T, 2, "cosine")
    scheduler.set_timesteps(steps)
    law = torch.full((8,), 1 / 8, dtype=torch.float64)
    for t in scheduler.timesteps:
        way = scheduler.step(net(RECORDS, t.expand(8)), t, RECORDS).probabilities
        law = law @ way[:, torch.arange(3), RECORDS].prod(-1)
    return law


def distance(p, q):
    return 0.5 * (p - q).abs().sum().item()


def share(records):
    return (records * torch.tensor([4, 2, 1])).sum(1).bincount(minlength=8).double() / len(records)


def exact_terms(toy):
    "Chance q(xt | x0) and L_t for all (t, x0, xt), each (T, 8, 8)."
    diffusion, net, _ = toy
    t, a, b = torch.cartesian_prod(torch.arange(T), torch.arange(8), torch.arange(8)).T
    chance = diffusion.marginal(RECORDS[a], t).gather(-1, RECORDS[b][..., None]).prod(1)[:, 0]
    terms = diffusion.vlb_terms(RECORDS[b], RECORDS[a], net(RECORDS[b], t), t)
    return chance.view(T, 8, 8), terms.view(T, 8, 8)


def test_toy_recovers_its_joint_table(toy):
    assert distance(share(toy[2]), TABLE) < 0.015                     # the floor: as many real records
    assert distance(chain_law(toy, T), TABLE) < 0.03
    assert distance(chain_law(toy, 25), TABLE) < 0.04
    assert distance(chain_law(toy, 1), TABLE) > 0.2                   # one step cannot make dependence


@pytest.mark.parametrize("steps", [T, 10])
def test_samples_follow_the_exact_law(toy, steps):
    records = sample(toy[1], MultinomialScheduler(T, 2, "cosine"), (20_000, 3), steps, torch.Generator().manual_seed(1))
    assert records.dtype == torch.int64 and distance(share(records), chain_law(toy, steps)) < 0.015


def test_terms_are_never_negative_and_bound_the_likelihood(toy):
    chance, terms = exact_terms(toy)
    bound = (chance * terms).sum((0, 2)) + toy[0].prior_kl(RECORDS)
    nll = -chain_law(toy, T).log()
    assert (terms >= 0).all() and (bound >= nll).all()
    entropy = -(TABLE * TABLE.log()).sum()
    assert entropy < TABLE @ nll < TABLE @ bound < entropy + 0.1


def test_importance_lowers_the_variance_and_keeps_the_mean(toy):
    diffusion, net, data = toy
    chance, terms = exact_terms(toy)
    square = TABLE @ (chance * terms**2).sum(2).T
    bound = TABLE @ (chance * terms).sum((0, 2))
    learned = diffusion.time_law()
    assert (square / learned).sum() - bound**2 < 0.85 * ((square * T).sum() - bound**2)

    measured = {}
    visits = diffusion.time_law.visits.clone()
    torch.manual_seed(2)
    for diffusion.times in ("uniform", "importance"):
        values = [diffusion.loss(net, data[torch.randint(len(data), (64,))], "vlb") for _ in range(500)]
        measured[diffusion.times] = 3 * torch.stack(values)
        assert abs(measured[diffusion.times].mean() - bound) < 5 * measured[diffusion.times].std() / 500**0.5
    assert measured["importance"].var() < 0.95 * measured["uniform"].var()
    assert torch.equal(visits, diffusion.time_law.visits)              # nothing is learned in eval mode


def test_scale_grows_neither_with_n_nor_with_t():
    prior = torch.tensor([0.7, 0.3])
    entropy = -(prior * prior.log()).sum().item()

    def loss(n, steps, kind):
        torch.manual_seed(0)
        diffusion = MultinomialDiffusion(2, steps, "cosine", "uniform")
        records = (torch.rand(4000, n) < 0.3).long()
        return diffusion.loss(lambda xt, t: (diffusion.marginal(xt, t) * prior).log(), records, kind).item()   # the perfect network
    for n, steps in ((3, 50), (60, 50), (20, 400)):
        vlb, ce, hybrid = (loss(n, steps, kind) for kind in ("vlb", "ce", "hybrid"))
        assert vlb == pytest.approx(entropy, rel=0.15) and ce < entropy
        assert hybrid == pytest.approx(vlb + 0.05 * ce, rel=1e-6)


# ---- training machinery

@pytest.mark.parametrize("kind", ["vlb", "ce", "hybrid"])
@pytest.mark.parametrize("times", ["uniform", "importance"])
def test_gradients_are_finite_even_for_certain_networks(kind, times):
    diffusion = MultinomialDiffusion(3, 4, "cosine", times)
    logits = (2000 * torch.randn(64, 5, 3)).requires_grad_()
    diffusion.loss(lambda xt, t: logits, torch.randint(3, (64, 5)), kind).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad.abs().sum() > 0


class Denoiser(ModelMixin, ConfigMixin):
    "As notebook 32 holds the diffusion: a part of the model."

    @register_to_config
    def __init__(self, steps: int):
        super().__init__()
        self.net = nn.Linear(4, 8)
        self.diffusion = MultinomialDiffusion(2, steps, "cosine", "importance")

    def forward(self, xt, t):
        return self.net(2.0 * xt - 1).unflatten(-1, (4, 2))


def test_learned_law_of_t_is_saved_with_the_model(tmp_path):
    torch.manual_seed(0)
    model = Denoiser(8).train()
    for _ in range(3):
        model.diffusion.loss(model, torch.randint(2, (128, 4)))
    law = model.diffusion.time_law()
    assert (model.diffusion.time_law.visits >= 10).all() and (law != 1 / 8).all() and law.sum() == pytest.approx(1)
    model.save_pretrained(tmp_path)
    again = Denoiser.from_pretrained(tmp_path)
    assert sorted(k for k in model.state_dict() if "diffusion" in k) == ["diffusion.time_law.square", "diffusion.time_law.visits"]
    torch.testing.assert_close(again.diffusion.time_law(), law)
    assert again.diffusion.abar.dtype == torch.float64 and torch.equal(again.diffusion.abar, model.diffusion.abar)


def test_half_precision_networks_keep_exact_probabilities():
    torch.manual_seed(0)
    model = Denoiser(1000)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.diffusion.loss(model, torch.randint(2, (32, 4)))
        law = model.diffusion.posterior(torch.zeros(1, 4).long(), torch.rand(1, 4, 2), torch.tensor([500]))
    loss.backward()
    assert loss.dtype == law.dtype == torch.float64 and torch.isfinite(model.net.weight.grad).all()


# ---- scheduler

def test_timesteps_begin_and_end_where_they_should():
    scheduler = MultinomialScheduler(T, 2, "cosine")
    assert scheduler.timesteps.tolist() == list(range(T - 1, -1, -1))
    for n in range(2, T + 1):
        scheduler.set_timesteps(n)
        visited = scheduler.timesteps.tolist()
        assert len(set(visited)) == n and visited == sorted(visited, reverse=True) and (visited[0], visited[-1]) == (T - 1, 0)
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [T - 1]


@pytest.mark.parametrize("density", [1.5, 2.0, 4.0])
def test_dense_times_are_distinct_and_closer_in_heavy_noise(density):
    scheduler = MultinomialScheduler(T, 2, "cosine", density=density)
    for n in range(2, T + 1):
        scheduler.set_timesteps(n)
        visited = scheduler.timesteps.tolist()
        assert len(set(visited)) == n and visited == sorted(visited, reverse=True) and (visited[0], visited[-1]) == (T - 1, 0)
    scheduler.set_timesteps(T // 3)
    gaps = -scheduler.timesteps.diff()
    assert gaps[0] < gaps[-1]
    with pytest.raises(ValueError, match="density"):
        MultinomialScheduler(T, 2, "cosine", density=0.5)


def test_last_step_gives_the_networks_own_law():
    logits = torch.tensor([[[0.0, 1.0], [2.0, 0.0]]]).expand(5000, 2, 2)
    x = torch.randint(2, (5000, 2))
    for last in ("draw", "argmax"):
        step = MultinomialScheduler(T, 2, "cosine", last).step(logits, 0, x)
        torch.testing.assert_close(step.probabilities, logits.double().softmax(-1))
        if last == "argmax":
            assert (step.prev_sample == torch.tensor([1, 0])).all()
        else:
            assert (step.prev_sample.double().mean(0) - logits[0].softmax(-1)[:, 1]).abs().max() < 0.03


def test_argmax_erases_rare_codes():
    rate, process = 0.002, CodeBridge(2, 10, "cosine")
    prior = torch.tensor([1 - rate, rate])

    def knows(xt, t):
        return (process.marginal(xt, t) * prior).log()
    made = {last: sample(knows, MultinomialScheduler(10, 2, "cosine", last), (20_000, 5), 10, torch.Generator().manual_seed(0))
            for last in ("draw", "argmax")}
    assert made["argmax"].sum() == 0 and made["draw"].double().mean() == pytest.approx(rate, rel=0.3)


def test_scheduler_is_saved_and_reproducible(tmp_path):
    scheduler = MultinomialScheduler(20, 3, "linear", "argmax")
    scheduler.save_pretrained(tmp_path)
    again = MultinomialScheduler.from_pretrained(tmp_path)
    assert dict(again.config).items() >= {"num_train_timesteps": 20, "num_classes": 3, "schedule": "linear", "last": "argmax"}.items()
    guess = lambda xt, t: torch.zeros(*xt.shape, 3)
    one, two = (sample(guess, s, (50, 4), 7, torch.Generator().manual_seed(3)) for s in (scheduler, again))
    assert torch.equal(one, two)
    x0, t = torch.randint(3, (6, 4)), torch.randint(20, (6,))
    assert again.add_noise(x0, t).shape == (6, 4) and again.noise((6, 4)).max() <= 2


# ---- bad input: one clear sentence

@pytest.mark.parametrize("call, words", [
    (lambda: MultinomialDiffusion(1, T, "cosine", "uniform"), "classes >= 2"),
    (lambda: MultinomialDiffusion(2, 0, "cosine", "uniform"), "steps >= 1"),
    (lambda: MultinomialDiffusion(2, T, "sine", "uniform"), "schedule"),
    (lambda: MultinomialDiffusion(2, T, "cosine", "often"), "times"),
    (lambda: MultinomialDiffusion(2, T, "cosine", "uniform").loss(Net(), RECORDS, kind="mse"), "kind of loss"),
    (lambda: MultinomialDiffusion(2, T, "cosine", "uniform").loss(Net(), RECORDS + 1), r"values 0\.\.1"),
    (lambda: MultinomialDiffusion(2, T, "cosine", "uniform").loss(Net(), RECORDS.float()), "int64"),
    (lambda: CodeBridge(2, T, "cosine").posterior(RECORDS, torch.ones(8, 3, 2), torch.zeros(8).long(), form="sum"), "form"),
    (lambda: MultinomialScheduler(T, 2, "cosine", "best"), "last"),
    (lambda: MultinomialScheduler(T, 2, "cosine").set_timesteps(T + 1), "as many as were trained"),
    (lambda: MultinomialScheduler(T, 2, "cosine").set_timesteps(0), "as many as were trained"),
    (lambda: MultinomialScheduler(T, 2, "cosine").step(torch.zeros(8, 3, 2), T, RECORDS), "not among"),
])
def test_bad_arguments(call, words):
    with pytest.raises(ValueError, match=words):
        call()
