"Contracts of guided sampling: the relaxed records, the classifier, the energy, the guided step against its optimum, and the pipeline."
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from medgen_nb.ehr.denoiser import EhrDenoiser
from medgen_nb.ehr.diffusion import MultinomialScheduler
from medgen_nb.ehr.guidance import EHRD3PMPipeline, Guidance, RecordClassifier, guide, log_target, relax

CODES, STEPS = 6, 8
CONFIG = dict(codes=CODES, classes=2, width=16, depth=1, heads=2, rank=3, attention="linear", mlp_ratio=2, steps=STEPS,
              schedule="cosine", times="uniform", objective="ce", ce_weight=0.05, evidence=True, pairs=True, conditional=False)
ICD = ["428", "427", "401", "250", "585", "V58"]
PREVALENCE = torch.tensor([0.1, 0.1, 0.3, 0.5, 0.05, 0.02])
STILL = dict(tau=0.0, sharpness=1.0)


def hospital(n: int, seed: int = 0) -> torch.Tensor:
    "Records in which codes 0 and 1 are always equal, the others independent."
    records = (torch.rand(n, CODES, generator=torch.Generator().manual_seed(seed)) < PREVALENCE).long()
    records[:, 1] = records[:, 0]
    return records


def make(**changes) -> EhrDenoiser:
    "A denoiser that depends on every part (its last matrices would start at zero)."
    torch.manual_seed(0)
    model = EhrDenoiser(**CONFIG | changes)
    model.start_at(PREVALENCE)
    for weight in (model.read_out.logits.weight, model.read_out.own):
        torch.nn.init.normal_(weight, std=0.2)
    return model.eval()


def train(model: torch.nn.Module, records: torch.Tensor, steps: int, rate: float = 1e-2) -> torch.nn.Module:
    optimiser = torch.optim.Adam(model.parameters(), lr=rate)
    for _ in range(steps):
        loss = model.loss({"codes": records[torch.randint(len(records), (128,))]})
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return model.eval()


@pytest.fixture(scope="module")
def classifier() -> RecordClassifier:
    torch.manual_seed(0)
    model = RecordClassifier(codes=CODES, hidden=32)
    model.start_at(PREVALENCE)
    return train(model, hospital(4000), steps=300)


@pytest.fixture(scope="module")
def denoiser() -> EhrDenoiser:
    model = EhrDenoiser(**CONFIG)
    torch.manual_seed(0)
    model.start_at(PREVALENCE)
    return train(model, hospital(4000), steps=150)


@pytest.fixture
def xt() -> torch.Tensor:
    return torch.randint(2, (5, CODES), generator=torch.Generator().manual_seed(0))


T = torch.full((5,), 4)
log_odds = lambda logits: (logits[..., 1] - logits[..., 0]).detach()


def pipeline(denoiser, classifier=None) -> EHRD3PMPipeline:
    made = EHRD3PMPipeline(denoiser, MultinomialScheduler(STEPS, 2, "cosine"), classifier)
    made.set_progress_bar_config(disable=True)
    made.name_codes(ICD)
    return made


# relaxed records

def test_relaxed_records_are_calibrated_beliefs():
    "The mean belief of a code is its prevalence, and among codes believed at b a share b is present."
    torch.manual_seed(0)
    x0 = (torch.rand(40_000, CODES) < PREVALENCE).long()
    belief = relax(x0, PREVALENCE)
    assert belief.shape == x0.shape and ((belief >= 0) & (belief <= 1)).all()
    torch.testing.assert_close(belief.mean(0), x0.float().mean(0), atol=0.005, rtol=0)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        chosen = (belief >= low) & (belief < low + 0.2)
        assert abs(belief[chosen].mean() - x0[chosen].float().mean()) < 0.03, low


def test_relaxed_records_reach_from_certain_to_unknown():
    torch.manual_seed(0)
    x0 = hospital(4000)
    belief = relax(x0, PREVALENCE)
    assert ((belief[:, 3] - x0[:, 3]).abs() < 0.01).float().mean() > 0.05       # hardly noised: nearly what it is
    assert ((belief[:, 3] - PREVALENCE[3]).abs() < 0.1).float().mean() > 0.02   # lost: nearly the prevalence


def test_relaxing_is_seeded_by_torch():
    x0 = hospital(50)
    torch.manual_seed(3)
    first = relax(x0, PREVALENCE)
    torch.manual_seed(3)
    assert torch.equal(first, relax(x0, PREVALENCE)) and not torch.equal(first, relax(x0, PREVALENCE))


# classifier

def test_an_untrained_classifier_believes_what_it_is_told():
    model, belief = RecordClassifier(codes=CODES, hidden=8), torch.rand(4, CODES) * 0.98 + 0.01
    torch.testing.assert_close(model(belief).sigmoid(), belief, atol=1e-5, rtol=0)


def test_the_classifier_learns_that_two_codes_are_one(classifier):
    "Code 0 unknown: its probability must follow code 1, and nothing else."
    belief = PREVALENCE.repeat(3, 1)
    belief[1, 1], belief[2, 4] = 0.99, 0.99
    unknown, twin, stranger = classifier(belief)[:, 0].sigmoid().tolist()
    assert abs(unknown - 0.1) < 0.1 and twin > 0.75 and abs(stranger - unknown) < 0.15, (unknown, twin, stranger)


def test_the_classifiers_loss_is_cross_entropy_of_relaxed_records(classifier):
    x0 = hospital(64)
    torch.manual_seed(1)
    loss = classifier.loss({"codes": x0})
    torch.manual_seed(1)
    p = classifier(relax(x0, classifier.prior)).sigmoid().double()
    by_hand = -(x0 * p.log() + (1 - x0) * (1 - p).log()).mean()
    torch.testing.assert_close(loss.double(), by_hand, atol=1e-5, rtol=1e-4)


# energy

@pytest.mark.parametrize("target", [{0: 1}, {3: 0}, {0: 1, 4: 0, 2: 1}])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 5.0])
def test_log_target_by_hand(classifier, target, sharpness):
    generator = torch.Generator().manual_seed(0)
    logp = torch.randn(4, CODES, 2, generator=generator).log_softmax(-1)
    belief = torch.rand(4, CODES, 2, generator=generator)
    seen = logp[..., 1].exp()
    for column in target:
        seen[:, column] = belief[:, column, 1]
    expected = torch.zeros(4)
    for row in range(4):
        answer = sharpness * classifier(seen[row : row + 1])[0].double()
        for column, value in target.items():
            expected[row] += logp[row, column, value] - (1 + (-answer[column] if value else answer[column]).exp()).log()
    torch.testing.assert_close(log_target(logp, belief, target, classifier, sharpness), expected, atol=1e-4, rtol=1e-4)


# the guided step

def test_a_constant_target_moves_nothing(xt):
    "V is log p of a code that is already certain, and the classifier is mute: no slope, and KL is at its minimum."
    model, mute = make(), RecordClassifier(codes=CODES, hidden=8)
    model.read_out.start.data[0] = torch.tensor([-20.0, 20.0])
    for lam in (0.0, 1.0):
        logits = guide(model, mute, xt, T, {0: 1}, Guidance(eta=1.0, lam=lam, inner=5, tau=0.0, sharpness=0.0))
        torch.testing.assert_close(logits, model(xt, T), atol=1e-3, rtol=0)


@pytest.mark.parametrize("target", [{0: 1}, {3: 0}, {0: 1, 3: 0}])
def test_guidance_goes_where_it_is_sent(denoiser, classifier, xt, target):
    logits = guide(denoiser, classifier, xt, T, target, Guidance(eta=1.0, lam=0.5, inner=5, **STILL))
    moved = log_odds(logits) - log_odds(denoiser(xt, T))
    for column, value in target.items():
        assert ((2 * value - 1) * moved[:, column] > 0).all()
    assert not logits.requires_grad


def test_the_kl_pulls_back(xt, classifier):
    "The heavier the KL, the nearer to the unguided logits. A stiffer KL needs shorter steps, else they overshoot."
    model, far = make(), []
    for lam in (0.1, 1.0, 10.0, 100.0):
        logits = guide(model, classifier, xt, T, {0: 1}, Guidance(eta=0.2 / max(lam, 1), lam=lam, inner=300, **STILL))
        far.append((log_odds(logits) - log_odds(model(xt, T))).abs().max().item())
    assert far == sorted(far, reverse=True) and far[0] > 1 and far[-1] < 0.2, far


@pytest.mark.parametrize("lam", [0.5, 1.0, 2.0])
def test_at_rest_log_odds_have_moved_by_the_gradient_over_lambda(xt, classifier, lam):
    "The optimum of lam KL - V: Bayes' rule to first order (derived in the notebook), for the wanted code and the others."
    model, target = make(), {0: 1}
    logits = guide(model, classifier, xt, T, target, Guidance(eta=0.2, lam=lam, inner=4000, **STILL))
    belief, p = model.hear(xt, T)[0], logits.softmax(-1)[..., 1].requires_grad_()
    logp = torch.stack([1 - p, p], -1).log()
    slope, = torch.autograd.grad(log_target(logp, belief, target, classifier, 1.0).sum(), p)
    torch.testing.assert_close(log_odds(logits) - log_odds(model(xt, T)), slope / lam, atol=0.1, rtol=0)
    assert slope[:, 1:].abs().max() > 0.5


def test_noise_follows_the_generator(xt, classifier):
    model = make()
    step = lambda tau, seed: guide(model, classifier, xt, T, {0: 1}, Guidance(eta=0.1, lam=1.0, inner=3, tau=tau, sharpness=1.0),
                                   torch.Generator().manual_seed(seed))
    assert torch.equal(step(0.1, 0), step(0.1, 0)) and not torch.allclose(step(0.1, 0), step(0.1, 1))
    assert torch.equal(step(0.0, 0), step(0.0, 1))


def test_langevin_noise_has_the_size_that_eta_and_tau_say():
    "With a mute classifier, a certain target and lam = 0 one step is pure noise: spread sqrt(2 eta tau) in the latent, seen through a linear read-out."
    model, mute = make(), RecordClassifier(codes=CODES, hidden=8)
    model.read_out.logits.weight.data.zero_()
    model.read_out.start.data[0] = torch.tensor([-20.0, 20.0])
    xt, eta, tau = torch.zeros(4000, CODES, dtype=torch.int64), 2.0, 0.3
    logits = guide(model, mute, xt, torch.full((4000,), 4), {0: 1}, Guidance(eta=eta, lam=0.0, inner=1, tau=tau, sharpness=0.0),
                   torch.Generator().manual_seed(0))
    moved = logits - model(xt, torch.full((4000,), 4))
    one = torch.eye(16).expand(CODES, -1, -1).transpose(0, 1)                              # a unit of each number of the latent
    length = (model.read_out(one) - model.read_out(torch.zeros(1, CODES, 16))).square().sum(0).sqrt()
    torch.testing.assert_close(moved.std(0) / length, torch.full((CODES, 2), (2 * eta * tau) ** 0.5), rtol=0.06, atol=0)


@pytest.mark.parametrize("bad", [dict(eta=0.0), dict(eta=-1.0), dict(lam=-0.1), dict(tau=-1.0), dict(inner=0), dict(sharpness=-1.0)])
def test_constants_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match="guidance needs eta > 0"):
        Guidance(**dict(eta=1.0, lam=1.0, tau=0.0, inner=1, sharpness=1.0) | bad)


# the pipeline

STRONG = dict(eta=10.0, lam=0.2, tau=0.0, inner=5)


def test_guided_records_have_the_disease_and_its_company(denoiser, classifier):
    pipe = pipeline(denoiser, classifier)
    as_they_come = pipe(n=300, seed=0)
    guided = pipe(n=300, target={"428": 1}, seed=0, **STRONG)
    stamped = pipe(n=300, target={"428": 1}, seed=0, sharpness=0.0, **STRONG)
    assert as_they_come["428"].mean() < 0.25 and guided["428"].mean() > 0.9
    assert guided["427"].mean() > max(0.7, stamped["427"].mean() - 0.05)     # code 1 is code 0's twin
    assert abs(guided["250"].mean() - as_they_come["250"].mean()) < 0.2      # a stranger stays


def test_a_code_that_depends_on_nothing_needs_longer_steps(denoiser, classifier):
    "Its read-out has hardly any weight, so the latent hardly moves its log-odds: the useful eta belongs to the read-out."
    pipe = pipeline(denoiser, classifier)
    present = [pipe(n=200, target=target, seed=0, **STRONG | {"eta": eta})["250"].mean()
               for target, eta in ((None, 10.0), ({"250": 0}, 10.0), ({"250": 0}, 1000.0))]
    assert present[0] > 0.35 > present[1] > 0.1 and present[2] < 0.05, present


def test_the_same_seed_makes_the_same_patients(denoiser, classifier):
    pipe = pipeline(denoiser, classifier)
    ask = dict(n=30, target={"428": 1}, **STRONG | {"tau": 0.05})
    pd.testing.assert_frame_equal(pipe(seed=1, **ask), pipe(seed=1, **ask))
    assert not pipe(seed=1, **ask).equals(pipe(seed=2, **ask))


def test_the_table(denoiser):
    made = pipeline(denoiser)(n=7, seed=0, batch_size=3, num_inference_steps=2)
    assert made.shape == (7, CODES) and list(made.columns) == ICD and made.index.is_unique and made.index.name == "patient"
    assert set(np.unique(made)) <= {0, 1} and (made.dtypes == np.uint8).all()


@pytest.mark.parametrize("with_classifier", [True, False])
def test_a_folder_gives_back_the_same_pipeline(tmp_path, denoiser, classifier, with_classifier):
    pipe = pipeline(denoiser, classifier if with_classifier else None)
    pipe.name_codes(ICD, [f"disease {code}" for code in ICD])
    pipe.save_pretrained(tmp_path)
    assert (tmp_path / "classifier").exists() == with_classifier
    assert not list(tmp_path.rglob("*.bin"))                                 # safetensors and JSON only
    again = EHRD3PMPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    ask = dict(n=20, seed=0, **(dict(target={"428": 1}, **STRONG) if with_classifier else {}))
    pd.testing.assert_frame_equal(again(**ask), pipe(**ask))
    assert again.codes == ICD and again.names[0] == "disease 428" and (again.classifier is None) != with_classifier


def test_a_conditional_denoiser_is_told_and_needs_no_classifier():
    pipe = pipeline(train(make(conditional=True), hospital(4000), steps=60))
    told = pipe(n=200, target={"428": 1, "250": 0}, seed=0)
    assert told["428"].mean() > 0.97 and told["250"].mean() < 0.03
    assert 0.2 < pipe(n=200, seed=0)["250"].mean() < 0.8                     # nothing told: as they come


def test_targets_become_columns(denoiser):
    pipe = pipeline(denoiser)
    assert pipe.columns({"250": 0, "428": 1}) == {3: 0, 0: 1} and pipe.columns({428: 1}) == {0: 1}


@pytest.mark.parametrize("ask, message", [(dict(target={"999": 1}), "unknown code 999; this pipeline knows 428, 427"),
                                          (dict(target={"428": 2}), "1 .with the disease. or 0"),
                                          (dict(n=0), "n and batch_size must be at least 1, got 0"),
                                          (dict(batch_size=0), "n and batch_size"),
                                          (dict(num_inference_steps=9), "1..8 steps"),
                                          (dict(eta=-1.0), "guidance needs eta > 0")])
def test_bad_questions_are_refused(denoiser, classifier, ask, message):
    with pytest.raises(ValueError, match=message):
        pipeline(denoiser, classifier)(**ask)


def test_a_target_without_a_classifier_is_refused(denoiser):
    with pytest.raises(ValueError, match="no classifier to guide with"):
        pipeline(denoiser)(target={"428": 1})


@pytest.mark.parametrize("codes, names", [(ICD[:5], None), (ICD, ["only one"])])
def test_a_vocabulary_must_fit(denoiser, codes, names):
    with pytest.raises(ValueError, match="the model makes 6 codes"):
        pipeline(denoiser).name_codes(codes, names)


def test_records_are_written_whole(tmp_path, denoiser):
    pipe = pipeline(denoiser)
    made = pipe(n=4, seed=0)
    file = pipe.write(made, tmp_path / "new" / "records.csv")
    pd.testing.assert_frame_equal(pd.read_csv(file, index_col="patient"), made, check_dtype=False)
    assert [p.name for p in file.parent.iterdir()] == ["records.csv"] and pipe.write(made, None) is None
    with pytest.raises(ValueError, match="is a folder"):
        pipe.write(made, tmp_path)
