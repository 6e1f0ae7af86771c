"""Seconds per cine latent at the paper's size (180 tokens, 192 million weights), 16 rounds, guidance 3, random weights: ours against the structure of the released sampler.

Run by hand: python tests/bench/bench_cmr.py [--batch 2] [--repeats 3] [--threads 2] [--device cpu]. Medians of several repetitions, and ratios within one run; the settings take turns,
because machines are noisy. Decoding to films is not counted. On a GPU `compiled` adds fixed shapes through torch.compile.
"""

import argparse
import statistics
import time

import torch

from medgen_nb.cmr.data import PHENOTYPES
from medgen_nb.cmr.mar import MaskedAutoregressor, decode_slowly, token_scheduler
from medgen_nb.cmr.pipeline import decode, see_all

PAPER = dict(latent=(16, 25, 12, 12), patch=(5, 2, 2), width=768, depth=12, heads=12, phenotypes=len(PHENOTYPES), uses=(True,) * len(PHENOTYPES), slots=64, head_width=1024, head_depth=3,
             untold=0.1, lowest=0.7, repeats=4, dropout=0.0, order="random", kind="continuous", groups=1, codes=2, steps=1000, says="epsilon", places="random")


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--batch", type=int, default=2, help="latents at a time (default 2)")
    ask.add_argument("--repeats", type=int, default=3, help="repetitions (default 3)")
    ask.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    ask.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    ask.add_argument("--only", default="", help="numbers of the settings, e.g. 0,3,4 (default all; 0 is the one that the others are compared with, 6 takes minutes)")
    asked = ask.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    mar = MaskedAutoregressor(**PAPER).eval().requires_grad_(False).to(asked.device)
    told = torch.randn(asked.batch, len(PHENOTYPES), device=asked.device)
    chance = lambda: torch.Generator().manual_seed(0)
    slowly = lambda: decode_slowly(mar, mar.condition(told), 16, 3.0, scheduler=token_scheduler(1000, "epsilon", "leading"), generator=torch.Generator(asked.device).manual_seed(0))
    ours = lambda **how: lambda: decode(mar, told, guidance=3.0, generator=chance(), **how)
    settings = {"released structure (100 ancestral steps, float32)": slowly,
                "100 ancestral steps, float32": ours(solver="ancestral"), "25 ancestral steps, float32": ours(solver="ancestral", head_steps=25),
                "DPM-Solver++ 15, float32": ours(), "DPM-Solver++ 15, bf16": ours(bf16=True), "DPM-Solver++ 8, bf16": ours(bf16=True, head_steps=8),
                "raster: one token per round, DPM-Solver++ 15, bf16": ours(bf16=True, steps=mar.tokens)}
    if asked.device == "cuda":
        settings["DPM-Solver++ 15, bf16, compiled"] = ours(bf16=True, static=True, look=torch.compile(see_all))
    settings = {name: run for k, (name, run) in enumerate(settings.items()) if not asked.only or str(k) in asked.only.split(",")}
    times = {name: [] for name in settings}
    warm = int(asked.repeats > 1)                          # the first one warms up
    for _ in range(warm + asked.repeats):
        for name, run in settings.items():
            started = time.perf_counter()
            run()
            if asked.device == "cuda": torch.cuda.synchronize()
            times[name].append((time.perf_counter() - started) / asked.batch)
            print(f"{name}: {times[name][-1]:.3f} s", flush=True)
    first = statistics.median(next(iter(times.values()))[warm:])
    print(f"\nbatch {asked.batch}, {asked.device}, {asked.threads} threads, {asked.repeats} repetitions")
    for name, seconds in times.items():
        median = statistics.median(seconds[warm:])
        print(f"{name:52s} {median:8.3f} s per latent   {first / median:6.2f} x the first")


if __name__ == "__main__":
    main()
