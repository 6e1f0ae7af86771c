"Gaussian diffusion against diffusers, numerical Bayes, and closed-form answers."
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel

from medgen_nb.diffusion import (KINDS, abar_at, add_noise, alpha_bars, cosine_betas, diffusion_loss, draw_noised, guide,
                                 kind_of, linear_betas, posterior, revise, sample, target, to_eps, to_x0)

SCHEDULES = {"linear": linear_betas, "squaredcos_cap_v2": cosine_betas}
STEPS = [10, 100, 1000]
SAMPLERS = [DDPMScheduler, DDIMScheduler, DPMSolverMultistepScheduler]
SHAPE = (4, 3, 5)


def make(kind=DDPMScheduler, steps=1000, schedule="linear", prediction="epsilon", **options):
    "A scheduler as the rooms set it."
    clip = {} if kind is DPMSolverMultistepScheduler else {"clip_sample": False}
    return kind(steps, beta_schedule=schedule, prediction_type=prediction, timestep_spacing="trailing", **clip, **options)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(n, seed=0, shape=SHAPE):
    return torch.randn((n, *shape), generator=seeded(seed))


def shaky(xt, t):
    "A smooth stand-in for a network: depends on every value and on the time of each sample."
    return torch.tanh(xt) * 0.5 + torch.cos(t / 300.0).reshape(-1, *[1] * (xt.ndim - 1)) * 0.1


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
def test_schedules_are_the_library_s(schedule, steps):
    theirs, betas = make(steps=steps, schedule=schedule), SCHEDULES[schedule](steps)
    torch.testing.assert_close(betas, theirs.betas, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(alpha_bars(betas), theirs.alphas_cumprod, rtol=1e-4, atol=1e-9)
    assert betas.dtype == torch.float32 and (betas > 0).all() and (betas < 1).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", STEPS)
def test_noise_and_velocity_are_the_library_s(schedule, steps):
    scheduler, (x0, eps) = make(steps=steps, schedule=schedule), draw(2)
    t = torch.randint(0, steps, (len(x0),), generator=seeded(1))
    abar_t = abar_at(scheduler, t)
    torch.testing.assert_close(add_noise(x0, eps, abar_t), scheduler.add_noise(x0, eps, t), rtol=0, atol=0)
    torch.testing.assert_close(target(x0, eps, abar_t, "v"), scheduler.get_velocity(x0, eps, t), rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS.values())
@pytest.mark.parametrize("abar_t", [0.999, 0.5, 0.01])
def test_conversions_round_trip(kind, abar_t):
    x0, eps = draw(2).double()
    xt, said = add_noise(x0, eps, abar_t), target(x0, eps, abar_t, kind)
    torch.testing.assert_close(to_x0(xt, said, abar_t, kind), x0)
    torch.testing.assert_close(to_eps(xt, said, abar_t, kind), eps)


@pytest.mark.parametrize("kind", KINDS.values())
def test_levels_belong_to_samples_not_to_the_last_axis(kind):
    "Batch and last axis of equal length: a wrong broadcast would pass unnoticed."
    x0, eps = draw(2, shape=(5, 3, 5))
    abar_t = torch.linspace(0.1, 0.9, 5)
    whole = add_noise(x0, eps, abar_t), target(x0, eps, abar_t, kind), posterior(x0, eps, abar_t / 2, abar_t)[0]
    for k in range(5):
        single = add_noise(x0[k], eps[k], abar_t[k]), target(x0[k], eps[k], abar_t[k], kind), posterior(x0[k], eps[k], abar_t[k] / 2, abar_t[k])[0]
        for a, b in zip(whole, single, strict=True):
            torch.testing.assert_close(a[k], b)


@pytest.mark.parametrize("abar_t,abar_s", [(0.8, 0.9), (0.3, 0.31), (0.001, 0.5), (1e-6, 1e-4)])
def test_posterior_is_bayes_rule(abar_t, abar_s):
    x0, xt = 1.3, -0.7
    grid = np.linspace(-8, 8, 400_001)
    alpha = abar_t / abar_s
    log = -((grid - math.sqrt(abar_s) * x0) ** 2) / (2 * (1 - abar_s)) - (xt - math.sqrt(alpha) * grid) ** 2 / (2 * (1 - alpha))
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    mean = (weight * grid).sum()
    ours = posterior(torch.tensor(xt).double(), torch.tensor(x0).double(), abar_t, abar_s)
    np.testing.assert_allclose([float(v) for v in ours], [mean, (weight * (grid - mean) ** 2).sum()], rtol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("steps", [5, 50, 1000])
def test_ancestral_step_is_the_library_s(schedule, prediction, steps):
    "Each step of a walk, from the library's own point, so that differences cannot add up; relative to the size of the values."
    scheduler, xt = make(schedule=schedule, prediction=prediction), draw(1)[0]
    scheduler.set_timesteps(steps)
    for k, t in enumerate(scheduler.timesteps[:: max(1, steps // 20)]):
        said, s = shaky(xt, t.expand(len(xt))), scheduler.previous_timestep(t)
        abar_t, abar_s = abar_at(scheduler, t), abar_at(scheduler, s) if s >= 0 else torch.tensor(1.0)
        theirs = scheduler.step(said, t, xt, generator=seeded(k)).prev_sample
        mean, variance = posterior(xt, to_x0(xt, said, abar_t, kind_of(scheduler)), abar_t, abar_s)
        ours = mean + variance.sqrt() * torch.randn(xt.shape, generator=seeded(k))
        torch.testing.assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), rtol=1e-5, atol=1e-5)
        xt = theirs.clamp(-3, 3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", KINDS)
@pytest.mark.parametrize("steps", [5, 50, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.5, 0.9])  # at 1 diffusers takes the root of a rounding error below 0 and returns NaN
def test_ddim_step_is_renoising_the_guess(schedule, prediction, steps, eta):
    scheduler, xt = make(DDIMScheduler, schedule=schedule, prediction=prediction), draw(1)[0]
    scheduler.set_timesteps(steps)
    for k, t in enumerate(scheduler.timesteps[:: max(1, steps // 20)]):
        said, s = shaky(xt, t.expand(len(xt))), t - 1000 // steps
        abar_t, abar_s = abar_at(scheduler, t), abar_at(scheduler, s) if s >= 0 else torch.tensor(1.0)
        kind = kind_of(scheduler)
        x0_hat, eps_hat = to_x0(xt, said, abar_t, kind), to_eps(xt, said, abar_t, kind)
        fresh = eta * posterior(xt, x0_hat, abar_t, abar_s)[1].sqrt()
        ours = abar_s.sqrt() * x0_hat + (1 - abar_s - fresh**2).clamp(min=0).sqrt() * eps_hat + fresh * torch.randn(xt.shape, generator=seeded(k))
        theirs = scheduler.step(said, t, xt, eta=eta, generator=seeded(k)).prev_sample
        torch.testing.assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), rtol=1e-5, atol=1e-5)
        if eta == 0:
            torch.testing.assert_close(ours, add_noise(x0_hat, eps_hat, abar_s))
        xt = theirs.clamp(-3, 3)


@pytest.mark.parametrize("pipeline,kind", [(DDPMPipeline, DDPMScheduler), (DDIMPipeline, DDIMScheduler)])
def test_sample_is_the_library_s_pipeline(pipeline, kind):
    torch.manual_seed(0)
    net = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
                      down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")).eval()
    pipe = pipeline(unet=net, scheduler=make(kind))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(batch_size=2, generator=seeded(), num_inference_steps=5, output_type="np").images
    ours = sample(lambda xt, t: net(xt, t).sample, make(kind), (2, 1, 8, 8), 5, seeded())
    np.testing.assert_allclose((ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), theirs, atol=1e-6)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("prediction", KINDS)
def test_every_sampler_recovers_a_normal_law(kind, prediction):
    "Data N(2, 0.5^2): the best prediction is known exactly, so the samples' mean and spread are too."
    scheduler, m, sd = make(kind, prediction=prediction), 2.0, 0.5

    def perfect(xt, t):
        abar_t = abar_at(scheduler, t)[:, None]
        x0 = m + abar_t.sqrt() * sd**2 / (abar_t * sd**2 + 1 - abar_t) * (xt - abar_t.sqrt() * m)
        return target(x0, to_eps(xt, x0, abar_t, "x0"), abar_t, kind_of(scheduler))

    x = sample(perfect, scheduler, (20_000, 1), 100, seeded())
    assert abs(x.mean() - m) < 0.02 and abs(x.std() - sd) < 0.03


@pytest.mark.parametrize("kind", SAMPLERS)
def test_revise_at_full_strength_samples_and_at_little_keeps(kind):
    scheduler, x0 = make(kind), draw(1)[0]
    once = lambda xt, t: to_eps(xt, x0, abar_at(scheduler, t), "x0")   # a network that knows the answer
    torch.testing.assert_close(revise(once, scheduler, x0, 0.3, 20, seeded()), x0, rtol=0, atol=0.05)
    times = []
    revise(once, scheduler, x0, 0.3, 20, seeded(), before=lambda xt, t: (times.append(int(t)), xt)[1])
    scheduler.set_timesteps(20)
    assert times == scheduler.timesteps[14:].tolist()


@pytest.mark.parametrize("kind", SAMPLERS)
def test_same_seed_same_samples_twice_with_one_scheduler(kind):
    scheduler = make(kind)
    first, second = (sample(shaky, scheduler, (2, *SHAPE), 10, seeded(3)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_noise_does_not_depend_on_the_scheduler_s_class_or_use(kind, schedule):
    "DPMSolverMultistep's own add_noise is wrong before set_timesteps and coarse after it; ours must not be."
    x0, noised = draw(1)[0], []
    for scheduler in (make(schedule=schedule), make(kind, schedule=schedule)):
        if scheduler.__class__ is kind:
            scheduler.set_timesteps(7)
        torch.manual_seed(5)
        noised.append(draw_noised(x0, scheduler))
    for ours, theirs in zip(*noised, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("prediction", KINDS)
def test_loss_is_zero_for_the_right_answer_and_has_gradients(prediction):
    scheduler, x0 = make(prediction=prediction), draw(1)[0].double()

    def knows(xt, t):
        abar_t = abar_at(scheduler, t)
        return target(x0, to_eps(xt, x0, abar_t, "x0"), abar_t, kind_of(scheduler))

    torch.manual_seed(0)
    assert diffusion_loss(knows, x0, scheduler) < 1e-12
    weight = torch.tensor(0.3, requires_grad=True)
    diffusion_loss(lambda xt, t: weight * xt.float(), x0.float(), scheduler).backward()
    assert weight.grad.isfinite() and weight.grad != 0


def test_loss_sees_every_time_and_only_the_global_generator():
    scheduler, x0, seen = make(steps=10), torch.zeros(500, 1), []
    torch.manual_seed(0)
    first = diffusion_loss(lambda xt, t: (seen.append(t), xt)[1], x0, scheduler)
    torch.manual_seed(0)
    assert set(seen[0].tolist()) == set(range(10)) and first == diffusion_loss(lambda xt, t: xt, x0, scheduler)


@pytest.mark.parametrize("kind", KINDS.values())
def test_guidance_is_the_same_in_every_language(kind):
    xt, told, untold = draw(3).double()
    mixed = guide(told, untold, 4.0)
    ours = guide(to_x0(xt, told, 0.4, kind), to_x0(xt, untold, 0.4, kind), 4.0)
    torch.testing.assert_close(ours, to_x0(xt, mixed, 0.4, kind))
    torch.testing.assert_close(guide(told, untold, 1.0), told)
    torch.testing.assert_close(guide(told, untold, 0.0), untold)


def test_learned_range_variance_goes_through_sample():
    scheduler = make(variance_type="learned_range")
    drawn = sample(lambda xt, t: torch.cat([shaky(xt, t), torch.zeros_like(xt)], 1), scheduler, (3, 4), 10, seeded())
    assert drawn.shape == (3, 4) and drawn.isfinite().all()


def test_progress_bar_is_off_by_default(capsys):
    sample(shaky, make(), (1, 2), 3)
    assert capsys.readouterr().err == ""


def test_half_precision_keeps_its_type():
    x0, eps = draw(2).bfloat16()
    assert add_noise(x0, eps, torch.rand(len(x0))).dtype == torch.bfloat16


def test_bad_arguments_are_named():
    x0, eps = draw(2)
    for wrong in (lambda: target(x0, eps, 0.5, "noise"), lambda: to_x0(x0, eps, 0.5, "epsilon"), lambda: to_eps(x0, eps, 0.5, ""),
                  lambda: kind_of(DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True))):
        with pytest.raises(ValueError, match="eps, x0, v"):
            wrong()
    for strength in (0.0, 0.01, 1.2, -1.0):
        with pytest.raises(ValueError, match="strength"):
            revise(shaky, make(), x0, strength, 20)


def test_revise_starts_from_the_noise_that_it_is_given():
    scheduler, x0 = DDIMScheduler(100, clip_sample=False), torch.zeros(2, 3)
    still = lambda xt, t: torch.zeros_like(xt)
    eps = torch.randn(2, 3, generator=seeded())
    torch.testing.assert_close(revise(still, scheduler, x0, 0.5, 10, noise=eps), revise(still, scheduler, x0, 0.5, 10, seeded()))
    assert not torch.allclose(revise(still, scheduler, x0, 0.5, 10, noise=-eps), revise(still, scheduler, x0, 0.5, 10, seeded()))
