"""Seconds of a healthy counterfactual with its uncertainty (8 draws), random weights: `python tests/bench/bench_cxr.py [--scale teach] [--draws 8] [--repeat 5]`.

Medians over repetitions in one process; image-to-image and inversion, float32 and bf16 products."""
import argparse
import statistics
import time

import torch

from medgen_nb.cxr.counterfactual import counterfactual
from medgen_nb.cxr.data import prompt_of
from medgen_nb.cxr.model import Artist, build_scheduler, build_unet, build_vae
from medgen_nb.cxr.room import Config
from medgen_nb.text import TextEncoder

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--scale", default="teach", choices=("smoke", "teach"), help="sizes of the networks")
parser.add_argument("--draws", type=int, default=8, help="of one film")
parser.add_argument("--repeat", type=int, default=5, help="repetitions, of which the median counts")
told = parser.parse_args()

config = Config.at(told.scale)
net, judge, size = config.model, config.judge, config.data.size
torch.manual_seed(0)
vae = build_vae(net.vae, net.blocks, net.latent).eval()
vae.measure_scale(torch.rand(8, 1, size, size) * 2 - 1)
text = TextEncoder.fresh([prompt_of("normal")], net.vocabulary, net.width, net.depth, net.heads, 32)
artist = Artist(build_unet(size // 2 ** (len(net.vae) - 1), net.latent, net.unet, net.blocks, net.heads, net.width), text, build_scheduler(net.says), net.untold, False, "sentences").eval()
film = (torch.rand(1, 1, size, size) * 2 - 1).repeat(told.draws, 1, 1, 1)

print(f"{told.scale}: {size} x {size}, {told.draws} draws, strength {judge.strength}, {judge.steps} steps, {torch.get_num_threads()} threads, torch {torch.__version__}")
for mode, rows in (("img2img", film), ("inversion", film[:1])):
    for bf16 in (False, True):
        seconds = []
        for k in range(told.repeat + 1):
            started = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                counterfactual(vae, artist, rows, strength=judge.strength, guidance=judge.guidance, steps=judge.steps, mode=mode, generator=torch.Generator().manual_seed(k))
            seconds.append(time.perf_counter() - started)
        print(f"{mode:10} {'bf16' if bf16 else 'float32':8} {len(rows)} films at once: median {statistics.median(seconds[1:]):.2f} s ({min(seconds[1:]):.2f} to {max(seconds[1:]):.2f})", flush=True)
