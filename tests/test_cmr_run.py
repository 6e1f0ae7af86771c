"Every line of the cine room's grid runs at smoke scale; in this process, without a kernel."
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from medgen_nb.cmr.data import PHENOTYPES
from medgen_nb.cmr.pipeline import CPGGPipeline
from medgen_nb.cmr.room import ABLATIONS, MEANING, TOLD, Config, draw_reports, simulate, swap_neighbours

REAL = Path(__file__).parents[2] / "shared" / "real" / "cine_mri" / "acdc_cropped4d"
ALWAYS = {"vae_error", "vae_error_heart", "vae_dice", "vae_psnr", "vae_ssim", "phenotype_fd", "phenotype_fd_floor", "fid_star", "fvd_star", "fvd_floor", "fvd_ratio", "r2_lvef", "r2_lvedv", "r2_lvm",
          "r2_median", "r2_lvef_ceiling", "r2_median_ceiling", "jitter_ratio", "diversity", "memorisation", "seconds_per_video", "seconds_per_video_raster", "structure_shift", "alarm", "edge_sharpness"}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_line_of_the_grid_runs(run_cells, tmp_path, name):
    metrics = run_cells("26_cmr_run", name=name)
    tokens = name != "pixel-diffusion"   # the rival has no tokens to reveal one by one, and no CPGGPipeline
    assert {m for m in ALWAYS if m not in metrics} == (set() if tokens else {"seconds_per_video_raster"})
    assert ("downstream_r2" in metrics) == (name.startswith("pretrain") or name == "augmentation")
    assert (tmp_path / "run" / "pipeline").is_dir() == tokens
    if tokens:
        made = CPGGPipeline.from_pretrained(tmp_path / "run" / "pipeline")(LVEF=50, seed=0, num_steps=2, solver="dpm-solver++", head_steps=3)
        assert made.videos.shape == (1, 20, 24, 24) and np.isfinite(made.videos).all() and made.phenotypes["LVEF"][0] == 50
    captions = json.loads((tmp_path / "run" / "figures" / "captions.json").read_text())
    assert ({"2-films.gif", "7-order.gif"} if tokens else {"2-films.gif"}) <= set(captions)
    measured = {m for m in metrics if not m.endswith(("_lo", "_hi", "_n", "_floor", "_trivial"))}
    assert measured <= set(MEANING), sorted(measured - set(MEANING))


def test_real_films_run(run_cells):
    if not REAL.is_dir():
        pytest.skip("the real films of ACDC do not lie beside the checkout")
    metrics = run_cells("26_cmr_run", data="acdc", root=str(REAL))
    assert not {m for m in ALWAYS if m not in metrics} and "tail_error" not in metrics


@pytest.mark.parametrize("scale", ["smoke", "demo", "teach", "paper"])
def test_scales_are_whole_configs(scale):
    config = Config.at(scale)
    shrink = np.prod(config.vae.strides, axis=0)
    latent = [size // part for size, part in zip((config.data.frames, config.data.size, config.data.size), shrink)]
    assert all(size % part == 0 for size, part in zip(latent, config.mar.patch)) and config.mar.width % config.mar.heads == 0
    if scale == "paper":
        assert latent == [25, 12, 12] and config.vae.channels == 16


def test_what_is_told_first():
    assert set(TOLD) == set(PHENOTYPES) and TOLD[:5] == ("LVEF", "LVEDV", "LVM", "RVEF", "RVEDV")


def test_people_of_judges_are_others():
    config = Config.at("smoke").data
    hearts, split, others = simulate(config)
    assert not set(hearts.patients) & set(others.patients) and len(split.train) == config.train and len(split.test) == config.test
    one, other = (draw_reports(50, config, k) for k in range(2))
    assert (one["LVEF"] != other["LVEF"]).any() and list(one) == list(PHENOTYPES)


def test_swapped_frames_are_neighbours():
    videos = np.arange(9.0)[None, :, None, None] + np.zeros((200, 9, 2, 2))
    swapped = swap_neighbours(videos, 0)[:, :, 0, 0]
    assert (np.abs(swapped - np.arange(9)) <= 1).all() and (np.sort(swapped, 1) == np.arange(9)).all() and (swapped[:, 8] == 8).all()
    assert 0.4 < (swapped[:, :8:2] != np.arange(0, 8, 2)).mean() < 0.6
    assert not torch.equal(torch.tensor(videos), torch.tensor(swap_neighbours(videos, 0)))
