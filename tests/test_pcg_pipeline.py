"The way from words to sound: phases, balanced rows, sampling, the pipeline's files and its errors."
import json

import numpy as np
import pandas as pd
import pytest
import soundfile
import torch

from medgen_nb.pcg.condition import NODES, SUBSETS, GraphEncoder, TextEncoder, nodes_of, write_notes
from medgen_nb.pcg.data import FS, Scale, simulate_sounds, spectrogram
from medgen_nb.pcg.denoiser import PcgDenoiser
from medgen_nb.pcg.pipeline import SAMPLERS, HLDMPipeline, balanced_rows, make_scheduler, mask_by_lag, phases, sample_latents
from medgen_nb.pcg.vae import HEARD, JUDGED, MsVae
from medgen_nb.training import FitConfig


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    sounds = simulate_sounds(24, seed=1, tracks=False)
    magnitude = spectrogram(sounds.waves)
    scale = Scale.fit(magnitude)
    vae = MsVae((1, 4, 4, 2), 8, 16, 1, 1e-2, 0.0, {name: len(JUDGED[name]) for name in HEARD})
    vae.measure_scale(torch.from_numpy(scale.as_input(magnitude)))
    notes = write_notes(sounds.attributes)
    words = TextEncoder.fresh(notes, 200, 16, 1, 2, 64).eval()
    graph = GraphEncoder(len(NODES), 8).eval()
    denoiser = PcgDenoiser((1, 4, 4, 2), 78, 16, 16, 2, 16, 8, "both", True, False, 1e-3, 4.0, 0.1, 1000, "v_prediction").eval()
    denoiser.fuse.measure(words.embed(notes), graph.embed(nodes_of(sounds.attributes)))
    made = HLDMPipeline(vae.eval(), denoiser, words.model, words.tokenizer, graph, make_scheduler(denoiser, "ddim"))
    made.magnitudes = scale
    return made


@pytest.mark.parametrize("steps", [7, 20, 1601])
def test_phases_take_exactly_the_steps(steps):
    fit = FitConfig(steps=steps, warmup=5)
    assert sum(phase.fit.steps for phase in phases(fit, True)) == steps
    assert [phase.levels for phase in phases(fit, True)] == [1, 3, 7, 7] and phases(fit, False)[0].fit == fit


def test_too_few_steps_for_the_phases():
    with pytest.raises(ValueError, match="too few"):
        phases(FitConfig(steps=2, warmup=0), True)


def test_balanced_rows_lose_nobody():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    rows = balanced_rows(labels, 0)
    counts = np.bincount(labels[rows])
    assert counts.max() == counts.min() and len(rows) >= 100 and {1, 2} <= set(labels[rows]) and set(np.flatnonzero(labels > 0)) <= set(rows)


def test_equal_noise_equal_latents_and_guidance_one_asks_once(pipeline):
    notes, wanted, told = pipeline.understand("grade IV holosystolic murmur")
    noise = torch.randn(1, 23, 6)
    calls, predict = [], pipeline.denoiser.predict
    pipeline.denoiser.predict = lambda zt, t, c: calls.append(len(zt)) or predict(zt, t, c)
    try:
        one = sample_latents(pipeline.denoiser, pipeline.scheduler, wanted, told, 3, 1.0, noise)
        two = sample_latents(pipeline.denoiser, pipeline.scheduler, wanted, told, 3, 1.0, noise)
        three = sample_latents(pipeline.denoiser, pipeline.scheduler, wanted, told, 3, 2.0, noise)
    finally:
        del pipeline.denoiser.predict
    assert torch.equal(one, two) and not torch.equal(one, three) and calls == [1] * 6 + [2] * 3


def test_lengths_and_samplers_that_do_not_fit(pipeline):
    notes, wanted, told = pipeline.understand("grade IV holosystolic murmur")
    with pytest.raises(ValueError, match="one of each"):
        sample_latents(pipeline.denoiser, pipeline.scheduler, wanted, told, 3, 1.0, torch.randn(2, 23, 6))
    with pytest.raises(ValueError, match="ddim or dpm"):
        make_scheduler(pipeline.denoiser, "euler")


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers_give_finite_latents(pipeline, sampler):
    _, wanted, told = pipeline.understand("aortic stenosis")
    z = sample_latents(pipeline.denoiser, make_scheduler(pipeline.denoiser, sampler), wanted, told, 5, 2.0, torch.randn(1, 23, 6))
    assert torch.isfinite(z).all() and z.shape == (1, 23, 6)


def test_told_levels_follow_the_words(pipeline):
    assert pipeline.understand("62-year-old woman")[2].tolist() == [0b001]
    assert pipeline.understand("62-year-old woman, grade IV holosystolic murmur, mitral regurgitation")[2].tolist() == [0b111]
    assert pipeline.understand({"condition": "AS"})[2].tolist() == [0b100] and pipeline.understand("AS murmur".replace("AS ", "harsh "))[2].tolist() == [0b010]
    assert SUBSETS[-1] == 0b111


@pytest.mark.parametrize("prompt, said", [("please be nice", "nothing in"), ({"colour": "red"}, "colour"), ({"condition": "XX"}, "AS"), ({"site": "elbow"}, "AV"), ({}, "at least one")])
def test_prompts_that_say_nothing_known(pipeline, prompt, said):
    with pytest.raises(ValueError, match=said):
        pipeline(prompt)


@pytest.mark.parametrize("words", [{"n": 0}, {"num_inference_steps": 0}, {"guidance_scale": -1.0}])
def test_numbers_that_cannot_be(pipeline, words):
    with pytest.raises(ValueError, match="at least"):
        pipeline("aortic stenosis", **words)


def test_files_can_be_opened_and_tell_what_was_asked(pipeline, tmp_path):
    made = pipeline(["grade IV holosystolic murmur at the apex", "healthy heart"], n=2, seed=0, num_inference_steps=2)
    assert made.waves.shape == (4, 20_000) and len(made.notes) == 4 and np.allclose(made.weights.sum(1), 1, atol=1e-5) and made.mask.shape == (78,)
    folder = pipeline.write(made, tmp_path / "out")
    wave, fs = soundfile.read(folder / "heart-003.wav")
    assert fs == FS and np.abs(wave - made.waves[3]).max() < 1e-3 and (folder / "heart-000.png").stat().st_size > 1000
    assert "healthy" in json.loads((folder / "heart-003.json").read_text())["diagnosis"]
    with pytest.raises(ValueError, match="is a file"):
        pipeline.write(made, folder / "heart-000.wav")
    assert pipeline.write(made, None) is None


def test_saved_and_loaded_says_the_same(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "kept")
    back = HLDMPipeline.from_pretrained(tmp_path / "kept")
    one, two = (p(pd.DataFrame([{**dict.fromkeys(simulate_sounds(1, 2.0).attributes), "condition": "AS", "extra": ""}]), seed=3, num_inference_steps=2) for p in (pipeline, back))
    assert np.allclose(one.waves, two.waves, atol=1e-4) and np.allclose(mask_by_lag(back.denoiser), one.mask)
