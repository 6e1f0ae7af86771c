"""How many seconds of heart sound the pretrained pipeline draws in a second: words to WAV, Griffin-Lim included.

Run by hand: python tests/bench/bench_pcg.py [--repeats 5] [--threads 2]. Medians of several repetitions, and ratios within one run; the settings take turns, because machines are noisy.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from medgen_nb.pcg.data import FS
from medgen_nb.pcg.pipeline import SAMPLERS, HLDMPipeline, make_scheduler

HERE = Path(__file__).parents[2] / "data" / "pretrained" / "pcg"
PROMPT = "62-year-old woman, heart rate 70 beats per minute, grade IV holosystolic murmur at the apex, mitral regurgitation"
SETTINGS = {"ddim 25 steps": ("ddim", 25, 3.0), "ddim 25 steps, no guidance": ("ddim", 25, 1.0), "dpm-solver++ 12 steps": ("dpm-solver++", 12, 3.0)}


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ask.add_argument("--repeats", type=int, default=5, help="repetitions (default 5)")
    ask.add_argument("--threads", type=int, default=2, help="torch threads (default 2)")
    ask.add_argument("--batch", type=int, default=16, help="recordings at a time (default 16)")
    asked = ask.parse_args()
    torch.set_num_threads(asked.threads)
    pipeline, times = HLDMPipeline.from_pretrained(HERE), {name: [] for name in SETTINGS}
    pipeline.set_progress_bar_config(disable=True)
    for _ in range(1 + asked.repeats):                     # the first one warms up
        for name, (sampler, steps, guidance) in SETTINGS.items():
            pipeline.scheduler = make_scheduler(pipeline.denoiser, sampler)
            started = time.perf_counter()
            made = pipeline(PROMPT, n=asked.batch, num_inference_steps=steps, guidance_scale=guidance, seed=0)
            times[name].append(time.perf_counter() - started)
    sound = made.waves.size / FS
    base = statistics.median(times["ddim 25 steps"][1:])
    print(f"{asked.batch} recordings of 5 s, {asked.threads} threads, {asked.repeats} repetitions; {len(SAMPLERS)} samplers")
    for name, seconds in times.items():
        median = statistics.median(seconds[1:])
        print(f"{name:28s} {median:6.2f} s   {sound / median:6.1f} x real time   {base / median:5.2f} x the first")


if __name__ == "__main__":
    main()
