"Contracts of the rivals: one interface, folders that give back the same model, seeds, bad input, and that each of them learns."

import pytest
import torch
from diffusers import EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from medgen_nb.data import loader
from medgen_nb.ehr.baselines import (COMPANY, CodeAutoencoder, Coins, GaussianRecords, MedGan, MedGanCritic, flip,
                                     own_odds, precondition, records_of)
from medgen_nb.training import FitConfig, fit

CODES = 6
EDM = dict(codes=CODES, width=16, depth=1, evidence=False, sigma_data=0.4, sigma_min=0.02, sigma_max=80.0, rho=7.0, p_mean=-1.2, p_std=1.2)
PREVALENCE = torch.tensor([0.02, 0.3, 0.3, 0.1, 0.5, 0.9])


def coins() -> Coins:
    model = Coins(codes=CODES)
    model.start_at(PREVALENCE)
    return model


def gan(output: str = "draw") -> MedGan:
    torch.manual_seed(0)
    return MedGan(codes=CODES, width=8, depth=2, output=output)


def critic(averaging: bool = True, penalty: float = 1.0) -> MedGanCritic:
    torch.manual_seed(1)
    return MedGanCritic(codes=CODES, width=8, averaging=averaging, penalty=penalty)


def gaussian(evidence: bool = False, trained: bool = True) -> GaussianRecords:
    "A model whose answer depends on every part (gates and last matrix would start at zero)."
    torch.manual_seed(0)
    model = GaussianRecords(**EDM | {"evidence": evidence})
    model.start_at(PREVALENCE)
    for part in [model.read.down, *(norm.modulate for norm in model.read.norms)] * trained:
        torch.nn.init.normal_(part.weight, std=0.2)
    return model


GENERATORS = {"coins": coins, "gan round": lambda: gan("round"), "gan draw": gan, "gaussian": gaussian, "evidence": lambda: gaussian(True)}
seeded = lambda seed=0: torch.Generator().manual_seed(seed)
every_generator = pytest.mark.parametrize("make", GENERATORS.values(), ids=GENERATORS)


@pytest.fixture
def records() -> torch.Tensor:
    "Codes 1 and 2 are always equal; the others are coins."
    x = (torch.rand(2000, CODES, generator=seeded(5)) < PREVALENCE).long()
    x[:, 2] = x[:, 1]
    return x


def train(model, records, steps, lr, adversary=None, **changes) -> list[float]:
    settings = dict(steps=steps, batch_size=64, lr=lr, critic_lr=lr, critic_steps=2, warmup=5, ema=0.9, save_every=10, precision="fp32")
    config = FitConfig(**settings | changes)
    for training in fit(model, loader({"codes": records}, 64), config, adversary=adversary, device="cpu"):
        pass
    return [point["loss"] for point in training.history]


# One interface

@every_generator
def test_generate_gives_records_that_a_seed_decides(make):
    model = make()
    one, same, other = (model.generate(20, 4, seeded(seed)) for seed in (0, 0, 1))
    assert one.shape == (20, CODES) and one.dtype == torch.int64 and set(one.unique().tolist()) <= {0, 1}
    assert not one.requires_grad and torch.equal(one, same)
    assert not torch.equal(one, other) or one.unique(dim=0).shape[0] == 1   # an untrained GAN may round all records to one
    assert model.generate(1, 1).shape == (1, CODES)


@every_generator
@pytest.mark.parametrize("n, steps", [(0, 4), (-1, 4), (4, 0)])
def test_impossible_orders_are_refused(make, n, steps):
    with pytest.raises(ValueError, match="at least 1"):
        make().generate(n, steps, seeded())


@every_generator
def test_a_folder_gives_back_the_same_generator(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    again = type(model).from_pretrained(tmp_path)
    assert again.config.keys() >= model.config.keys() and all(again.config[key] == model.config[key] for key in model.config if key[0] != "_")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(again.generate(30, 4, seeded()), model.generate(30, 4, seeded()))


@pytest.mark.parametrize("make", [lambda: CodeAutoencoder(codes=CODES, width=4), critic], ids=["autoencoder", "critic"])
def test_a_folder_gives_back_the_same_part(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())


@every_generator
def test_generating_neither_needs_nor_changes_the_mode(make):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert torch.equal(model.train().generate(10, 3, seeded()), model.eval().generate(10, 3, seeded()))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("make", [coins, lambda: CodeAutoencoder(codes=CODES, width=4), gaussian, lambda: gaussian(True)],
                         ids=["coins", "autoencoder", "gaussian", "evidence"])
def test_bad_records_are_refused(make, records):
    model = make()
    assert model.loss({"codes": records}).shape == () and torch.isfinite(model.loss({"codes": records}))
    with pytest.raises(ValueError, match="6 codes and got 5"):
        model.loss({"codes": records[:, :5]})
    with pytest.raises(ValueError, match="0..1"):
        model.loss({"codes": records + 1})
    with pytest.raises(ValueError, match="int64"):
        model.loss({"codes": records.float()})


def test_the_gan_and_its_critic_refuse_bad_records(records):
    with pytest.raises(ValueError, match="6 codes and got 5"):
        gan().loss({"codes": records[:, :5]}, critic())
    with pytest.raises(ValueError, match="6 codes and got 5"):
        critic().loss(gan(), {"codes": records[:, :5]})


@pytest.mark.parametrize("make", [coins, gaussian], ids=["coins", "gaussian"])
@pytest.mark.parametrize("prevalence", [PREVALENCE[:5], PREVALENCE * 2, PREVALENCE * torch.nan, PREVALENCE[None]])
def test_start_at_refuses_what_is_no_prevalence(make, prevalence):
    with pytest.raises(ValueError, match="mean of the training records"):
        make().start_at(prevalence)


@pytest.mark.parametrize("kind", [Coins, CodeAutoencoder, MedGan, MedGanCritic, GaussianRecords])
def test_constructors_have_no_defaults(kind):
    with pytest.raises(TypeError, match="missing"):
        kind(**({} if kind is Coins else {"codes": CODES}))


# Coins

def test_coins_have_the_prevalences_and_nothing_to_train():
    model = coins()
    assert not list(model.parameters())
    torch.testing.assert_close(model.generate(20_000, 1, seeded()).float().mean(0), PREVALENCE, atol=0.02, rtol=0)


def test_coins_loss_is_the_entropy(records):
    model, share = Coins(codes=CODES), records.float().mean(0)
    assert model.loss({"codes": records}) == pytest.approx(0.6931, abs=1e-4)             # fair coins: log 2
    model.start_at(share)
    entropy = -(share * share.log() + (1 - share) * (1 - share).log()).mean()
    torch.testing.assert_close(model.loss({"codes": records}), entropy)


def test_coins_survive_codes_that_nobody_or_everybody_has():
    model = Coins(codes=CODES)
    model.start_at(torch.tensor([0.0, 1, 0, 1, 0, 1]))
    assert torch.isfinite(model.loss({"codes": torch.ones(3, CODES, dtype=torch.int64)}))
    assert (model.generate(2000, 1, seeded()).float().mean(0) - torch.tensor([0.0, 1, 0, 1, 0, 1])).abs().max() < 0.005


def test_flip_keeps_sure_things():
    sure = torch.tensor([[0.0, 1.0]]).expand(500, 2)
    assert torch.equal(flip(sure, seeded()), sure.long())


# GAN

def test_the_autoencoder_learns_to_copy(records):
    torch.manual_seed(0)
    model = CodeAutoencoder(codes=CODES, width=8)
    losses = train(model, records, 200, 2e-2)
    assert losses[-1] < 0.5 * losses[0]
    back = (model.decode(model.encode(records_of({"codes": records}, CODES))) > 0).long()
    assert (back == records).float().mean() > 0.98


def test_take_over_copies_weights_and_refuses_other_sizes():
    model, trained = gan(), CodeAutoencoder(codes=CODES, width=8)
    model.autoencoder.take_over(trained)
    assert torch.equal(model.autoencoder.decoder.weight, trained.decoder.weight)
    assert model.autoencoder.decoder.weight.data_ptr() != trained.decoder.weight.data_ptr()
    with pytest.raises(ValueError, match=r"\(6, 9\), this one \(6, 8\)"):
        model.autoencoder.take_over(CodeAutoencoder(codes=CODES, width=9))


def test_batch_statistics_are_those_of_the_batch():
    "No running means that averaged weights could disagree with; each unit normed over the batch at hand, in eval mode, too."
    model = gan().eval()
    assert not any("running" in name for name in model.state_dict())
    block, h = model.blocks[0], torch.randn(300, 8, generator=seeded()) * 5 + 3
    with torch.no_grad():
        normed = block.norm(block.linear(h))
    torch.testing.assert_close(normed.mean(0), torch.zeros(8), atol=1e-5, rtol=0)
    torch.testing.assert_close(normed.var(0, unbiased=False), torch.ones(8), atol=1e-3, rtol=0)


def test_nobody_is_generated_alone():
    probabilities = gan().probabilities
    few, more = probabilities(3, seeded()), probabilities(COMPANY, seeded())
    torch.testing.assert_close(few, more[:3])


def test_fakes_are_hard_but_let_gradients_through():
    model = gan("draw")
    fakes = model.fakes(50)
    assert set(fakes.detach().unique().tolist()) == {0.0, 1.0}
    fakes.sum().backward()
    assert model.blocks[0].linear.weight.grad.abs().sum() > 0
    soft = gan("round").fakes(50)
    assert ((soft > 0) & (soft < 1)).all()


def test_averaging_tells_the_critic_about_the_company(records):
    x, others = records[:4].float(), records[4:8].float()
    for averaging in (True, False):
        judge = critic(averaging)
        same = torch.allclose(judge(x), judge(torch.cat([x, others]))[:4])
        assert same is not averaging


def test_the_penalty_is_the_squared_slope(records):
    "R1 (Mescheder et al. 2018), against slopes taken record by record; without averaging records do not touch each other."
    free, charged = critic(False, 0.0), critic(False, 3.0)
    x = records[:32]
    torch.manual_seed(3)
    without = free.loss(gan(), {"codes": x})
    torch.manual_seed(3)
    with_it = charged.loss(gan(), {"codes": x})
    real = x.float()
    slopes = torch.stack([torch.autograd.functional.jacobian(lambda r: free(r[None])[0], row) for row in real])
    torch.testing.assert_close(with_it - without, 1.5 * slopes.square().sum(-1).mean(), atol=1e-5, rtol=1e-3)


def test_the_critics_step_leaves_no_gradient_in_the_generator(records):
    model, judge = gan(), critic()
    judge.loss(model, {"codes": records[:32]}).backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in judge.parameters())


def test_the_gan_learns_prevalences_and_that_two_codes_are_one(records):
    torch.manual_seed(0)
    autoencoder = CodeAutoencoder(codes=CODES, width=8)
    train(autoencoder, records, 100, 1e-2)
    model = gan("draw")
    model.autoencoder.take_over(autoencoder)
    before = (model.generate(4000, 1, seeded()).float().mean(0) - records.float().mean(0)).abs().max()
    train(model, records, 300, 1e-2, adversary=critic())
    made = model.generate(4000, 1, seeded())
    error = (made.float().mean(0) - records.float().mean(0)).abs().max()
    assert error < 0.06 < before, (error, before)
    assert (made[:, 1] == made[:, 2]).float().mean() > 0.85        # coins of 30 %: 0.58


def test_unknown_output_is_refused():
    with pytest.raises(ValueError, match="'round' or 'draw'"):
        gan("soft")


# Gaussian noise

@pytest.mark.parametrize("kind", [EDMDPMSolverMultistepScheduler, EDMEulerScheduler])
@pytest.mark.parametrize("sigma_data", [0.14, 0.5])
def test_preconditioning_equals_the_schedulers(kind, sigma_data):
    scheduler = kind(sigma_min=0.02, sigma_max=80.0, sigma_data=sigma_data)
    sigma = torch.logspace(-1.7, 1.9, 40)[:, None]
    x, said = torch.randn(2, 40, CODES, generator=seeded())
    wrap = precondition(sigma, sigma_data)
    torch.testing.assert_close(wrap.c_in * x, scheduler.precondition_inputs(x, sigma))
    torch.testing.assert_close(wrap.c_skip * x + wrap.c_out * said, scheduler.precondition_outputs(x, said, sigma))
    torch.testing.assert_close(wrap.c_noise, scheduler.precondition_noise(sigma))


@pytest.mark.parametrize("evidence", [False, True])
def test_the_loss_is_edms(records, evidence):
    "Weighted squared error of the denoised record, written out with the scheduler's own factors."
    model = gaussian(evidence)
    torch.manual_seed(7)
    ours = model.loss({"codes": records[:200]})
    torch.manual_seed(7)
    x0, s = records[:200].float(), EDM["sigma_data"]
    sigma = (EDM["p_mean"] + EDM["p_std"] * torch.randn(200, 1)).exp()
    x = x0 + sigma * torch.randn_like(x0)
    scheduler = EDMDPMSolverMultistepScheduler(sigma_data=s)
    said = model(scheduler.precondition_inputs(x, sigma), scheduler.precondition_noise(sigma)[:, 0])
    weight = (sigma**2 + s**2) / (sigma * s) ** 2
    theirs = (weight * (scheduler.precondition_outputs(x, said, sigma) - x0) ** 2).mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    ours.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_untrained_with_evidence_is_bayes_for_single_codes():
    model, sigma = gaussian(True, trained=False), torch.logspace(-1, 1, 30)[:, None]
    x = torch.randn(30, CODES, generator=seeded()) * sigma + 0.5
    wrap = precondition(sigma, EDM["sigma_data"])
    with torch.no_grad():
        denoised = wrap.c_skip * x + wrap.c_out * model(wrap.c_in * x, wrap.c_noise[:, 0])
    likelihood = lambda value: torch.distributions.Normal(torch.tensor(value).double(), sigma.double()).log_prob(x.double()).exp()
    joint = PREVALENCE * likelihood(1.0)
    torch.testing.assert_close(denoised.double(), joint / (joint + (1 - PREVALENCE) * likelihood(0.0)), atol=1e-4, rtol=1e-3)


def test_untrained_with_evidence_generates_coins():
    "Single-code Bayes is the exact denoiser of independent codes, so sampling must return their prevalences."
    made = gaussian(True, trained=False).generate(5000, 40, seeded())
    torch.testing.assert_close(made.float().mean(0), PREVALENCE, atol=0.03, rtol=0)


def test_own_odds_without_information_are_the_prevalence():
    torch.testing.assert_close(own_odds(torch.full((CODES,), 0.5), torch.tensor(0.3), PREVALENCE).sigmoid(), PREVALENCE)
    assert (own_odds(torch.tensor([0.4, 0.6]), torch.tensor(0.01), torch.tensor([0.5, 0.5])).sigmoid() > 0.5).tolist() == [False, True]


@pytest.mark.parametrize("evidence", [False, True])
def test_gaussian_noise_learns_prevalences_and_that_two_codes_are_one(records, evidence):
    torch.manual_seed(0)
    model = GaussianRecords(**EDM | {"evidence": evidence, "width": 48})
    model.start_at(records.float().mean(0))
    losses = []
    for steps in (0, 300):
        if steps:
            train(model, records, steps, 1e-2)
        torch.manual_seed(9)
        losses.append(model.loss({"codes": records}).item())        # the same noise before and after
    made = model.generate(2000, 20, seeded())
    assert losses[1] < 0.97 * losses[0]
    assert (made.float().mean(0) - records.float().mean(0)).abs().max() < 0.1
    assert (made[:, 1] == made[:, 2]).float().mean() > 0.85        # coins of 30 %: 0.58


@pytest.mark.parametrize("make", [lambda: (gan("draw"), critic()), lambda: (gan("round"), critic(False, 0.0)), lambda: (gaussian(), None),
                                  lambda: (gaussian(True), None)], ids=["gan draw", "gan round", "gaussian", "evidence"])
def test_half_precision_trains_too(make, records):
    "What `fit` chooses on a GPU."
    model, adversary = make()
    before = [p.clone() for p in model.parameters()]
    assert all(torch.isfinite(torch.tensor(train(model, records, 20, 1e-3, adversary, precision="bf16"))))
    assert any(not torch.equal(p, q) for p, q in zip(before, model.parameters()))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_records_are_the_values_rounded():
    model = gaussian()
    values = model.values(40, 5, seeded())
    assert values.dtype == torch.float32 and torch.equal(model.generate(40, 5, seeded()), (values > 0.5).long())


@pytest.mark.parametrize("wrong", [{"sigma_data": 0.0}, {"sigma_min": 0.0}, {"sigma_min": 90.0}])
def test_sigmas_out_of_order_are_refused(wrong):
    with pytest.raises(ValueError, match="sigma_min < sigma_max"):
        GaussianRecords(**EDM | wrong)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@every_generator
def test_a_seed_on_the_cpu_makes_the_same_records_on_a_gpu(make):
    model = make()
    here, there = model.generate(200, 8, seeded()), model.to("cuda").generate(200, 8, seeded())
    assert there.device.type == "cuda" and (here == there.cpu()).float().mean() > 0.98
