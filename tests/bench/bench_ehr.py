"""What the records room costs: training step by precision and attention, sampling. Run by hand: python tests/bench/bench_ehr.py

Medians of several repetitions and ratios within one run; machines are noisy, so compare ratios, not seconds.
"""

import statistics
import time

import torch

from medgen_nb.ehr.data import simulate_records
from medgen_nb.ehr.denoiser import EhrDenoiser
from medgen_nb.ehr.diffusion import MultinomialScheduler
from medgen_nb.ehr.room import Config, EHRD3PMPipeline

REPEATS = 7
STEPS = 20   # sampling steps


def median_ms(task) -> float:
    task()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        task()
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def main() -> None:
    config = Config.at("teach")
    codes = simulate_records(config.fit.batch_size, config.data.codes, 0).batch()
    build = lambda attention: EhrDenoiser(codes=config.data.codes, classes=2, **{**vars(config.denoiser), **vars(config.diffusion), "attention": attention})
    print(f"{torch.get_num_threads()} threads, CPU capability {torch.backends.cpu.get_cpu_capability()}, batch {config.fit.batch_size}, {config.data.codes} codes")
    base = None
    for attention in ("linear", "full"):
        model = build(attention)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for precision in ("fp32", "bf16"):
            def step():
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    loss = model.loss(codes)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            ms = median_ms(step)
            base = base or ms
            print(f"training step  {attention:6} {precision}  {ms:8.0f} ms   x{ms / base:.2f}")
    scheduler = MultinomialScheduler(config.diffusion.steps, 2, config.diffusion.schedule, config.sample.last, config.sample.density)
    pipeline = EHRD3PMPipeline(build("linear"), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    ms = median_ms(lambda: pipeline(n=500, num_inference_steps=STEPS))
    print(f"sampling       500 records, {STEPS} steps  {ms / 1e3:.2f} s   {500 / ms * 1e3:.0f} records per second")
    wide = EhrDenoiser(codes=256, classes=2, **vars(config.denoiser), **vars(config.diffusion))
    pipeline = EHRD3PMPipeline(wide, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    pipeline(n=10_000, num_inference_steps=STEPS)   # the weights do not change the time; quality at so many steps: the run's figure 5
    print(f"sampling       10,000 records of 256 codes, {STEPS} steps  {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
