"Contracts of the EHR denoiser: shapes, equalities, the start, the loss, and a folder that gives back the same model."
import copy

import pytest
import torch

from medgen_nb.ehr.denoiser import LOUD, CodePairs, EhrDenoiser, RecordTokens, sureness
from medgen_nb.ehr.diffusion import MultinomialDiffusion, MultinomialScheduler, sample

CONFIG = dict(codes=6, classes=2, width=16, depth=2, heads=2, rank=3, attention="linear", mlp_ratio=2, steps=8,
              schedule="cosine", times="uniform", objective="hybrid", ce_weight=0.05, evidence=False, pairs=False, conditional=False)


def make(**changes) -> EhrDenoiser:
    "A model whose answer depends on every part (the last matrix would start at zero)."
    torch.manual_seed(0)
    model = EhrDenoiser(**CONFIG | changes)
    for weight in (model.read_out.logits.weight, model.read_out.own):
        torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.fixture
def xt() -> torch.Tensor:
    return torch.randint(2, (5, 6), generator=torch.Generator().manual_seed(0))


T = torch.arange(5)


@pytest.mark.parametrize("attention", ["linear", "full"])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_stages_make_the_forward(xt, attention, classes):
    model = make(attention=attention, classes=classes)
    asked, aloud = model.embed(torch.nn.functional.one_hot(xt, classes).float(), T)
    latent = model.contextualise(asked + aloud)      # without evidence a code keeps what it says
    assert latent.shape == (5, 6, 16)
    assert torch.equal(model.read_out(latent), model(xt, T)) and model(xt, T).shape == (5, 6, classes)


@pytest.mark.parametrize("classes", [2, 4])
def test_with_evidence_a_code_tells_its_value_to_others_only(xt, classes):
    model = make(classes=classes, evidence=True, pairs=True)
    torch.nn.init.normal_(model.pairing.weight)
    belief, said = model.hear(xt, T)
    latent = model.contextualise(*model.embed(belief, T))
    torch.testing.assert_close(model(xt, T), model.read_out(latent) + said + model.pairing(belief, model.embed.prior))
    alone = make(classes=classes, evidence=True, depth=0)
    flipped = 1 - xt
    assert torch.equal(alone.listen(xt, T)[1], alone.listen(flipped, T)[1])      # the latent knows nothing of the own value,
    assert not torch.allclose(alone(xt, T), alone(flipped, T))                   # the answer does


@pytest.mark.parametrize("classes", [2, 4])
def test_pairs_speak_to_all_but_themselves(classes):
    torch.manual_seed(0)
    pairs = CodePairs(6, classes)
    prior = torch.full((6, classes), 1 / classes)
    belief = torch.rand(3, 6, classes).softmax(-1)
    assert not pairs(belief, prior).any()                                        # silent at the start
    torch.nn.init.normal_(pairs.weight)
    assert not pairs(prior[None], prior).any() and not pairs(belief, prior)[..., 0].any()
    changed = belief.clone()
    changed[:, 2] = torch.eye(classes)[-1]
    moved = (pairs(changed, prior) - pairs(belief, prior)).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [True, True, False, True, True, True]


def test_sureness_is_the_unit_in_which_exclusion_is_linear():
    "Codes i and j exclude each other: log-odds of i shift by -1 for each unit of sureness about j, at every noise (Bayes' rule by hand)."
    noise, p_i, p_j = MultinomialDiffusion(2, 20, "cosine", "uniform"), 0.1, 0.2
    absent, present = noise.marginal(torch.ones(12, 1, dtype=torch.int64), torch.arange(12))[:, 0].T   # q("present" | x0)
    j, not_j = p_j * absent * present, (1 - p_i - p_j) * absent * absent
    shift = (p_i * present * absent / (j + not_j)).log() - (p_i / (1 - p_i) * present / absent).log()
    sure = sureness(j / (j + not_j))
    torch.testing.assert_close(shift.diff(), -sure.diff())


def test_linear_with_identity_mixtures_is_full(xt):
    full, linear = make(attention="full").double(), make(rank=6).double()
    identity = {f"contextualise.blocks.{i}.attention.squeeze": torch.eye(6).repeat(2, 1, 1) / LOUD for i in range(2)}
    linear.load_state_dict(full.state_dict() | identity)
    torch.testing.assert_close(linear(xt, T), full(xt, T), atol=1e-5, rtol=1e-5)   # the clocks are float32


@pytest.mark.parametrize("depth, heard", [(0, 1), (2, 6)])
def test_codes_hear_each_other_only_through_blocks(xt, depth, heard):
    model, flipped = make(depth=depth), xt.clone()
    flipped[:, 0] = 1 - flipped[:, 0]
    moved = (model(flipped, T) - model(xt, T)).abs().amax((0, 2)) > 1e-6
    assert moved.sum() == heard and moved[0]


def test_codes_have_an_identity_and_records_a_time(xt):
    model = make()
    logits = model(torch.ones_like(xt), T)
    assert not torch.allclose(logits[:, 0], logits[:, 1]) and not torch.allclose(logits[0], logits[1])


def test_start_at_gives_the_marginals(xt):
    torch.manual_seed(0)
    model, prevalence = EhrDenoiser(**CONFIG), torch.tensor([0.0, 0.01, 0.1, 0.5, 0.9, 1.0])
    model.start_at(prevalence)
    torch.testing.assert_close(model(xt, T).softmax(-1)[..., 1], prevalence.expand(5, -1), atol=1.01e-4, rtol=0)
    assert torch.isfinite(model(xt, T)).all()


@pytest.mark.parametrize("classes, prevalence", [(2, torch.full((5,), 0.5)), (2, torch.full((6,), 1.5)),
                                                 (2, torch.full((6,), torch.nan)), (3, torch.full((6,), 0.5))])
def test_start_at_refuses_what_is_no_prevalence(classes, prevalence):
    with pytest.raises(ValueError, match="mean of the training records"):
        RecordTokens(6, classes, 16).start_at(prevalence)


@pytest.mark.parametrize("objective", ["vlb", "ce", "hybrid"])
def test_the_loss_is_the_diffusions(xt, objective):
    model = make(objective=objective).eval()
    torch.manual_seed(1)
    ours = model.loss({"codes": xt})
    torch.manual_seed(1)
    theirs = MultinomialDiffusion(2, 8, "cosine", "uniform").eval().loss(model.forward, xt, objective, 0.05)
    assert ours.shape == () and torch.equal(ours, theirs)
    ours.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_it_learns_that_two_codes_are_one():
    "Codes 0 and 1 are always equal: the trained model must generate them equal, a model without blocks cannot."
    rates, records = {}, torch.randint(2, (512, 6), generator=torch.Generator().manual_seed(3))
    records[:, 1] = records[:, 0]
    for depth in (0, 1):
        model = make(depth=depth, objective="ce")
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(150):
            loss = model.loss({"codes": records[torch.randint(512, (64,))]})
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        made = sample(model, MultinomialScheduler(8, 2, "cosine"), (500, 6), 8, torch.Generator().manual_seed(0))
        rates[depth] = (made[:, 0] == made[:, 1]).float().mean()
    assert rates[0] < 0.6 and rates[1] > 0.85, rates


@pytest.mark.parametrize("attention", ["linear", "full"])
def test_a_folder_gives_back_the_same_model(tmp_path, xt, attention):
    model = make(attention=attention, times="importance")
    for _ in range(3):
        model.loss({"codes": xt})                # the law of t has learned something
    model.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").exists()
    again = EhrDenoiser.from_pretrained(tmp_path)
    assert {key: again.config[key] for key in CONFIG} == {key: model.config[key] for key in CONFIG}
    assert all(torch.equal(p, again.state_dict()[key]) for key, p in model.state_dict().items())
    assert torch.equal(again.diffusion.abar, model.diffusion.abar) and again.diffusion.abar.dtype == torch.float64
    assert torch.equal(again(xt, T), model(xt, T))


def test_a_copy_is_independent(xt):
    model = make()
    twin, before = copy.deepcopy(model), model(xt, T)
    twin.start_at(torch.full((6,), 0.1))
    assert torch.equal(model(xt, T), before) and not torch.allclose(twin(xt, T), before)


@pytest.mark.parametrize("changes, word", [({"attention": "local"}, "'linear' or 'full'"), ({"heads": 3}, "multiple of the heads"),
                                           ({"times": "often"}, "times"), ({"schedule": "steep"}, "schedule"),
                                           ({"conditional": True}, "evidence=True")])
def test_bad_settings_are_refused(changes, word):
    with pytest.raises(ValueError, match=word):
        EhrDenoiser(**CONFIG | changes)


def test_constructors_have_no_defaults():
    with pytest.raises(TypeError, match="missing"):
        EhrDenoiser(codes=6)


def test_bad_records_are_refused(xt):
    with pytest.raises(ValueError, match="6 codes and got 5"):
        make()(xt[:, :5], T)
    with pytest.raises(ValueError):
        make(objective="gan").loss({"codes": xt})
    with pytest.raises(ValueError, match="0..1"):
        make().loss({"codes": xt + 1})


@pytest.mark.parametrize("schedule", ["cosine", "geometric"])
def test_untrained_with_evidence_is_bayes_for_single_codes(schedule):
    model, prevalence = EhrDenoiser(**CONFIG | {"evidence": True, "schedule": schedule}), torch.tensor([0.01, 0.05, 0.1, 0.3, 0.5, 0.9])
    model.start_at(prevalence)
    xt, t = torch.randint(0, 2, (40, 6), generator=torch.Generator().manual_seed(0)), torch.arange(40) % 8
    joint = model.diffusion.marginal(xt, t) * torch.stack([1 - prevalence, prevalence], -1).double()
    torch.testing.assert_close(model(xt, t).double().softmax(-1), joint / joint.sum(-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_model_with_evidence_learns_and_round_trips(tmp_path):
    model = make(evidence=True)
    model.loss({"codes": torch.randint(0, 2, (16, 6))}).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.save_pretrained(tmp_path)
    xt, t = torch.randint(0, 2, (4, 6)), torch.arange(4)
    assert torch.equal(EhrDenoiser.from_pretrained(tmp_path).eval()(xt, t), model.eval()(xt, t))


def test_told_codes_are_believed_and_answered():
    model = make(evidence=True, conditional=True)
    model.start_at(torch.full((6,), 0.2))
    xt, t, told = torch.zeros(4, 6, dtype=torch.int64), torch.full((4,), 7), torch.full((4, 6), -1)
    told[:, 2] = 1
    plain, knowing = model(xt, t).softmax(-1), model(xt, t, told).softmax(-1)
    assert (knowing[:, 2, 1] > 0.999).all() and (plain[:, 2, 1] < 0.9).all()
    assert not torch.allclose(plain[:, 0], knowing[:, 0])          # the others hear of it
    assert torch.equal(model(xt, t, torch.full((4, 6), -1)), model(xt, t))
    model.loss({"codes": xt}).backward()
    with pytest.raises(ValueError, match="conditional=True"):
        make(evidence=True)(xt, t, told)


def test_a_rare_code_is_louder_than_a_common_one():
    "Present against absent: the token of a rare code moves further, and no surprise leaves every value silent."
    torch.manual_seed(0)
    tokens = RecordTokens(2, 2, 64)
    tokens.start_at(torch.tensor([0.01, 0.5]))
    silent, present = (tokens(belief[None], torch.tensor([0]))[1][0] for belief in (tokens.prior, torch.tensor([[0.0, 1], [0, 1]])))
    moved = (present - silent).norm(dim=-1)
    assert moved[0] > 5 * moved[1] > 0
    assert not silent.any()
