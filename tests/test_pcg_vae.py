"MS-VAE: shapes and contracts, the formula of every loss term, who may say what, bad input, saving."

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from medgen_nb.data import loader
from medgen_nb.pcg import metrics
from medgen_nb.pcg.data import ATTRIBUTES, TRACKS, Scale, simulate_sounds, spectrogram
from medgen_nb.pcg.vae import (BINS, CONTROLLED, HEARD, JUDGED, SLOW, SPACE_OF, TOKEN, TOKENS, Detectors, MsVae, classes_of, decorrelation, halved, parts, slices_of, swap,
                               token_states, unroll)
from medgen_nb.training import FitConfig, fit

torch.set_num_threads(1)
CHANNELS, COUNTS = (2, 4, 4, 3), {name: len(JUDGED[name]) for name in HEARD}


def build(delta: float = 0.1, beta: float = 0.01) -> MsVae:
    torch.manual_seed(0)
    return MsVae(CHANNELS, 8, 16, 1, beta, delta, COUNTS)


@pytest.fixture(scope="module")
def sounds():
    return simulate_sounds(60, seed=3)


@pytest.fixture(scope="module")
def scale(sounds):
    return Scale.fit(spectrogram(sounds.waves))


@pytest.fixture(scope="module")
def x(sounds, scale):
    return torch.from_numpy(scale.as_input(spectrogram(sounds.waves)))


@pytest.fixture(scope="module")
def table(sounds, x):
    classes = classes_of(sounds.attributes)
    return {"x": x, "states": torch.from_numpy(token_states(sounds.states)), **{name: torch.tensor(classes[name].to_numpy()) for name in HEARD}}


@pytest.fixture(scope="module")
def detectors():
    torch.manual_seed(0)
    return Detectors(16, COUNTS).eval()


# names


def test_every_sub_space_has_something_to_tell():
    assert set(HEARD.values()) == set(TRACKS) - {"rhythm"} and all(SPACE_OF[name] == space for name, space in HEARD.items())


def test_classes_at_their_bounds_and_unknown_ones():
    rows = [{"rate": 74.9, "grade": 0, "timing": None, "pitch": None, "extra": "rub", "snr": 6.9, "condition": "normal"},
            {"rate": 75.0, "grade": 3, "timing": "Holosystolic", "pitch": "High", "extra": "S3", "snr": 14.0, "condition": "AS"},
            {"rate": np.nan, "grade": np.nan, "timing": None, "pitch": None, "extra": None, "snr": np.nan, "condition": None}]
    classes = classes_of(pd.DataFrame(rows, columns=ATTRIBUTES))
    named = lambda k: {name: JUDGED[name][classes.loc[k, name]] for name in JUDGED}
    assert named(0) == {"rate": "slow", "timing": "none", "grade": "none", "pitch": "none", "extra": "none", "noise": "noisy", "condition": "normal"}
    assert named(1) == {"rate": "usual", "timing": "Holosystolic", "grade": "moderate", "pitch": "High", "extra": "S3", "noise": "quiet", "condition": "AS"}
    assert (classes.loc[2] == -1).all()


def test_the_state_of_a_token_is_the_state_of_its_frames(sounds):
    states = token_states(sounds.states)
    assert states.shape == (len(sounds), TOKENS) and states.min() >= 1 and states.max() == 4
    assert (token_states(np.full((1, 250), 3, dtype=np.uint8)) == 3).all()


# detectors

def test_detectors_say_one_word_per_token_and_per_attribute(detectors, x):
    said = detectors(x[:2])
    assert said["states"].shape == (2, 4, TOKENS) and {name: said[name].shape for name in HEARD} == {name: (2, count) for name, count in COUNTS.items()}


def test_answers_are_probabilities_and_chunks_do_not_matter(detectors, x):
    whole, pieces = detectors.answers(x[:7]), detectors.answers(x[:7], chunk=3)
    assert set(whole) == {"heard_states"} | {f"heard_{name}" for name in HEARD}
    for name, value in whole.items():
        torch.testing.assert_close(value.sum(1), torch.ones_like(value.sum(1)))
        torch.testing.assert_close(value, pieces[name])
        assert not value.requires_grad


def test_what_is_unknown_teaches_detectors_nothing(detectors, table):
    batch = {name: value[:4] for name, value in table.items()}
    silent = {**batch, **{name: torch.full((4,), -1) for name in HEARD}, "states": torch.zeros(4, TOKENS, dtype=torch.int64)}
    assert detectors.loss(silent) == 0 and detectors.loss(silent).requires_grad
    only = {**silent, "noise": batch["noise"]}
    torch.testing.assert_close(detectors.loss(only), F.cross_entropy(detectors(batch["x"])["noise"], batch["noise"]))


def test_detectors_learn(table):
    torch.manual_seed(0)
    net = Detectors(16, COUNTS)
    before = net.loss(table).item()
    for _ in fit(net, loader(table, 16), FitConfig(steps=40, batch_size=16, lr=5e-3, warmup=5, ema=0, precision="fp32"), device="cpu"):
        pass
    assert net.loss(table).item() < 0.75 * before


@pytest.mark.parametrize("shape", [(2, BINS, 312), (2, 1, 50, 312), (2, 1, BINS, 310)])
def test_detectors_refuse_other_shapes(detectors, shape):
    with pytest.raises(ValueError, match="Scale.as_input"):
        detectors(torch.zeros(shape))


# decorrelation

def test_decorrelation_is_the_mean_squared_correlation_of_numpy():
    z, slices = torch.randn(9, 5, 7, generator=torch.Generator().manual_seed(0)), {"a": slice(0, 2), "b": slice(2, 3), "c": slice(3, 5)}
    r = np.corrcoef(z.numpy().transpose(1, 0, 2).reshape(5, -1)) ** 2
    n = 9 * 7
    expected = np.mean([r[:2, 2:3].mean(), r[:2, 3:].mean(), r[2:3, 3:].mean()]) * ((n - 1) / n) ** 2   # torch's spread divides by n - 1
    assert decorrelation(z, slices).item() == pytest.approx(expected, rel=1e-3)


def test_decorrelation_knows_copies_strangers_and_silence():
    g, slices = torch.Generator().manual_seed(0), {"a": slice(0, 1), "b": slice(1, 2)}
    one, other = torch.randn(500, 1, 4, generator=g), torch.randn(500, 1, 4, generator=g)
    assert decorrelation(torch.cat([one, -3 * one], 1), slices) > 0.99
    assert decorrelation(torch.cat([one, other], 1), slices) < 0.01
    assert decorrelation(torch.cat([one, torch.ones_like(one)], 1), slices) < 1e-6


# the latent

def test_slices_share_the_latent_out():
    slices = slices_of(CHANNELS)
    assert list(slices) == list(TRACKS) and [part.stop - part.start for part in slices.values()] == [2 * SLOW, 4, 4, 3]
    assert [part.start for part in slices.values()] == [0, *[part.stop for part in slices.values()][:-1]]


@pytest.mark.parametrize("channels", [(2, 4, 4), (2, 4, 0, 3)])
def test_slices_refuse_other_sizes(channels):
    with pytest.raises(ValueError, match="at least 1"):
        slices_of(channels)


def test_unrolled_rhythm_is_in_the_order_of_time_and_the_rest_is_repeated():
    slices = slices_of((1, 1, 1, 1))
    z = torch.zeros(1, SLOW + 3, 2)
    z[0, :SLOW] = torch.arange(2 * SLOW).reshape(2, SLOW).T      # the token's own number
    z[0, SLOW] = torch.tensor([5.0, 7.0])
    h = unroll(z, slices)
    assert h.shape == (1, 4, 2 * SLOW) and h[0, 0].tolist() == list(range(2 * SLOW)) and h[0, 1].tolist() == [5.0] * SLOW + [7.0] * SLOW


def test_there_and_back(x):
    vae = build().eval()
    q = vae.encode(x[:2])
    assert q.mean.shape == (2, vae.slices["noise"].stop, 6) and vae.decode(q.mode).shape == (2, 1, BINS, 312)
    assert vae.encode(x[:2, ..., :104]).mean.shape[2] == 2, "shorter recordings in whole slow steps"


def test_a_late_token_changes_late_frames_most():
    vae = build().eval()
    z = torch.randn(1, vae.slices["noise"].stop, 6, generator=torch.Generator().manual_seed(0))
    changed = z.clone()
    changed[0, SLOW - 1, 5] += 1.0                               # rhythm's first channel, last token
    moved = (vae.decode(changed) - vae.decode(z)).abs().amax((0, 1, 2))
    assert moved.argmax() >= 312 - 5 * TOKEN and moved[:200].max() < 0.3 * moved.max()   # norms see the whole recording: a little is felt everywhere


@pytest.mark.parametrize("shape", [(2, 1, BINS, 100), (2, BINS, 312), (2, 1, 48, 312), (2, 1, BINS, 0)])
def test_encode_refuses_other_shapes(shape):
    with pytest.raises(ValueError, match="multiple of 52 frames"):
        build().encode(torch.zeros(shape))


def test_decode_refuses_another_latent():
    with pytest.raises(ValueError, match="what `encode` made"):
        build().decode(torch.zeros(2, 7, 6))


@pytest.mark.parametrize("change", [{"beta": -1.0}, {"delta": -0.1}, {"classes": {"colour": 3}}, {"classes": {"rate": 3}}])
def test_bad_configurations(change):
    with pytest.raises(ValueError, match="give weights of 0 or more and attributes among"):
        MsVae(**{"channels": CHANNELS, "picture": 8, "width": 16, "blocks": 1, "beta": 0.01, "delta": 0.1, "classes": COUNTS, **change})


# who may say what

def test_each_head_reads_its_own_sub_space_only():
    vae = build().eval()
    z = torch.randn(2, vae.slices["noise"].stop, 6, requires_grad=True)
    for name, logits in vae.told(z).items():
        space = "rhythm" if name == "states" else HEARD[name]
        (slope,) = torch.autograd.grad(logits.square().sum(), z, retain_graph=True)
        for other, part in vae.slices.items():
            assert (slope[:, part].abs().max() > 0) == (other == space), (name, other)


# the loss

def test_loss_is_its_formula(detectors, x):
    vae = build(delta=0.3, beta=0.02).eval()
    batch = {"x": x[:4]} | detectors.answers(x[:4])
    torch.manual_seed(1)
    loss = vae.loss(batch)
    torch.manual_seed(1)
    q = vae.encode(batch["x"])
    z = q.sample()
    heard = sum(-(batch[f"heard_{name}"] * logits.log_softmax(1)).sum(1).mean() for name, logits in vae.told(z).items())
    expected = F.l1_loss(vae.decode(z), batch["x"]) + 0.02 * q.kl().sum() / batch["x"].numel() + 0.3 * (decorrelation(z, vae.slices) + heard)
    torch.testing.assert_close(loss, expected)


def test_without_delta_nothing_needs_to_be_heard(x):
    assert torch.isfinite(build(delta=0.0).loss({"x": x[:2]}))
    with pytest.raises(ValueError, match="Detectors.answers"):
        build(delta=0.1).loss({"x": x[:2]})


def test_half_a_recording_is_the_same_half_of_sound_and_states(x):
    marks = torch.arange(TOKENS).float().expand(3, 4, TOKENS)
    sound = marks[:, :1, None].repeat_interleave(TOKEN, 3).expand(3, 1, BINS, TOKENS * TOKEN)
    starts = set()
    for seed in range(20):
        torch.manual_seed(seed)
        cut = halved({"x": sound, "heard_states": marks, "other": marks})
        assert cut["x"].shape[3] == 156 and torch.equal(cut["x"][:, :, 0, ::TOKEN], cut["heard_states"][:, :1]) and cut["other"] is marks
        starts.add(int(cut["heard_states"][0, 0, 0]))
    assert starts == {0, SLOW, 2 * SLOW, 3 * SLOW}, "all places are seen, each at the start of a slow step"


def test_one_slow_step_is_not_halved_to_nothing():
    cut = halved({"x": torch.zeros(2, 1, BINS, TOKEN * SLOW)})
    assert cut["x"].shape[3] == TOKEN * SLOW and torch.isfinite(build(delta=0.0).loss(cut))


def test_training_lowers_the_loss(detectors, x):
    batch = {"x": x} | detectors.answers(x)
    vae = build()
    before = vae.eval().loss(batch).item()
    for _ in fit(vae.train(), loader(batch, 16), FitConfig(steps=30, batch_size=16, lr=5e-3, warmup=5, ema=0, precision="fp32"), device="cpu"):
        pass
    assert vae.eval().loss(batch).item() < 0.9 * before


def test_nats_stay_exact_under_bf16(x):
    vae = build().eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = vae.encode(x[:2])
        assert q.mean.dtype == torch.float32 and q.kl().dtype == torch.float32
    torch.testing.assert_close(q.kl(), vae.encode(x[:2]).kl(), rtol=0.1, atol=1.0)


def test_weights_and_scale_are_saved(tmp_path, x):
    vae = build().eval()
    vae.measure_scale(x)
    vae.save_pretrained(tmp_path)
    again = MsVae.from_pretrained(tmp_path)
    assert again.slices == vae.slices and again.scale.seen == len(x)
    z = vae.scale.to_unit(vae.encode(x).mode)
    torch.testing.assert_close(again.from_latent(z), vae.from_latent(z), rtol=0, atol=0)


# edits

def test_swap_takes_one_sub_space_and_leaves_both_alone():
    slices, g = slices_of(CHANNELS), torch.Generator().manual_seed(0)
    z, other = (torch.randn(3, slices["noise"].stop, 6, generator=g) for _ in range(2))
    before = z.clone()
    for space in TRACKS:
        mixed = swap(z, other, space, slices)
        for name, part in slices.items():
            assert torch.equal(mixed[:, part], (other if name == space else z)[:, part])
    assert torch.equal(z, before) and torch.equal(swap(z, other[:1], "murmur", slices)[2, slices["murmur"]], other[0, slices["murmur"]])


def test_swap_refuses_what_does_not_fit():
    slices = slices_of(CHANNELS)
    z = torch.zeros(3, slices["noise"].stop, 6)
    for other, space in ((z, "melody"), (z[:2], "murmur"), (z[..., :5], "murmur")):
        with pytest.raises(ValueError, match="latents of equal shape"):
            swap(z, other, space, slices)


class Adder:
    "A decoder whose rows of pixels are the sub-spaces: what each part adds is known exactly."
    slices = {name: slice(k, k + 1) for k, name in enumerate(TRACKS)}

    def decode(self, z):
        x = torch.zeros(len(z), 1, BINS, 3)
        x[:, 0, :4] = z.expand(-1, -1, 3)
        return x


def test_parts_are_what_each_sub_space_adds():
    z, quiet = torch.tensor([[3.0, 2.0, 1.0, 4.0]])[..., None], torch.tensor([[1.0, 0.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])[..., None]
    power = parts(Adder(), z, quiet, Scale(0.0, 1.0))
    expected = np.zeros((1, 4, BINS, 3))
    expected[0, 0, 0], expected[0, 1, 1] = 3.0**6 - 1, 2.0**6 - 1.0**6   # magnitude is x^3; the third would be less than nothing, the fourth is as quiet
    np.testing.assert_allclose(power, expected, rtol=1e-5)
    assert power.shape == (1, 4, BINS, 3)


def test_parts_fit_component_error(x, sounds, scale):
    vae = build().eval()
    z = vae.encode(x[:5]).mode
    power = parts(vae, z, z, scale, chunk=2)
    assert power.shape == (5, 4, BINS, 312) and (power >= 0).all()
    np.testing.assert_allclose(power, parts(vae, z, z, scale), rtol=1e-3, atol=1e-6)
    assert metrics.component_error(power, sounds.truth["tracks"][:5]).shape == (4, 4)
    with pytest.raises(ValueError, match="no quiet recording"):
        parts(vae, z, z[:0], scale)
