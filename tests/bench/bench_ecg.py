"""What the ECG models cost at paper size: ours, the released structure rebuilt naively, and the challenge winner's network.

Run by hand: python tests/bench/bench_ecg.py [--repeats 7] [--device cpu]. Medians of several repetitions and ratios within one run, the models in turns,
because machines are noisy: compare ratios, not seconds. `naive` does what the released code does, with our weights: tokens first, every layer works out every
token, both attention maps written out, float32.
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from medgen_nb.ecg.model import EcgConfig, EcgTransformer, Prna, PrnaConfig, positions

PAPER = dict(classes=27, samples=7500, width=288, heads=8, hidden=2048, layers=(4, 4, 4), conv="depthwise", conv_layers=6,
             attention="differential", cls="passed", gate="off", wide=22, dropout=0.1)            # the published configuration: gate off
PRNA = dict(classes=27, samples=7500, width=256, heads=8, hidden=2048, layers=8, wide=22, dropout=0.1)
TRAIN_BATCH = 8   # records of a training step; the paper's 24 per GPU would take minutes on a CPU


class Naive(nn.Module):
    "The released structure on the weights of ours (token 'passed', differential attention)."

    def __init__(self, ours: EcgTransformer):
        super().__init__()
        self.ours = ours
        self.config = ours.config

    def attend(self, attention: nn.Module, x: torch.Tensor) -> torch.Tensor:
        "x (tokens, batch, width); two maps per head, written out, softmax in float32."
        tokens, batch, width = x.shape
        heads, dim = attention.heads, width // attention.heads // 2
        wq, wk, wv = attention.qkv.weight.chunk(3)
        x = x.transpose(0, 1)                                                                # (batch, tokens, width)
        q, k = (F.linear(x, w).view(batch, tokens, 2 * heads, dim).transpose(1, 2) for w in (wq, wk))
        v = F.linear(x, wv).view(batch, tokens, heads, 2 * dim).transpose(1, 2)              # (batch, heads, tokens, 2 dim)
        maps = torch.matmul(q * dim**-0.5, k.transpose(-1, -2)).softmax(-1, dtype=torch.float32).type_as(q)
        maps = maps.view(batch, heads, 2, tokens, tokens)
        read = torch.matmul(maps[:, :, 0] - attention.subtracted() * maps[:, :, 1], v)       # (batch, heads, tokens, 2 dim)
        read = read * torch.rsqrt(read.pow(2).mean(-1, keepdim=True) + 1e-5) * attention.norm.weight * (1 - attention.start)
        return attention.out(read.transpose(1, 2).reshape(batch, tokens, width)).transpose(0, 1)

    def forward(self, signal: torch.Tensor, wide: torch.Tensor | None = None):
        token = self.ours.read.tokens[0, :, None].expand(-1, len(signal), -1)                # (1, batch, width)
        for layers, x in zip(self.ours.read.stages, self.ours.convolve(signal)):
            x = torch.cat([token, x.permute(1, 0, 2)])                                       # (tokens, batch, width)
            x = self.ours.read.drop(x + positions(len(x), x.shape[2], x.device)[:, None])
            for layer in layers:
                x = layer.norm1(x + layer.drop(self.attend(layer.attention, x)))
                x = layer.norm2(x + layer.drop(layer.down(layer.drop(F.relu(layer.up(x))))))
            token = x[:1]
        x = x.transpose(0, 1)
        return self.ours.decide(x, wide if self.config.wide else None)[0] if self.config.gate != "off" else self.ours.decide(x[:, 0], wide if self.config.wide else None)


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def medians(tasks: dict, repeats: int, device: str) -> dict[str, float]:
    "Median milliseconds of each task, the tasks in turns, after one call of each."
    times = {name: [] for name in tasks}
    for repeat in range(repeats + 1):
        for name, task in tasks.items():
            wait(device)
            started = time.perf_counter()
            task()
            wait(device)
            if repeat:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: statistics.median(found) for name, found in times.items()}


def show(title: str, found: dict[str, float]) -> None:
    print(f"{title:44}" + "   ".join(f"{name} {ms:8.1f} ms (naive / it: {found['naive'] / ms:4.2f})" for name, ms in found.items()))


def multiply_adds(model: nn.Module, signal: torch.Tensor, wide: torch.Tensor) -> float:
    "Of one record, in millions. FlopCounterMode counts two for a multiply and an add, and does not know fused kernels on a CPU: here they are taken apart."
    counter, fast = FlopCounterMode(display=False), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        model(signal, wide)
    torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() / 2 / len(signal) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    device, repeats = asked.device, asked.repeats
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False   # float32 means float32
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    print(f"{where}, torch {torch.__version__}, {repeats} repetitions")
    prna = Prna(PrnaConfig(**PRNA)).to(device)
    for gate in ("off", "released"):
        ours = EcgTransformer(EcgConfig(**PAPER | {"gate": gate})).to(device)
        models = {"naive": Naive(ours), "ours": ours, "prna": prna}
        print(f"\ngate {gate}")
        for name, model in models.items():
            model.eval()
            signal, wide = torch.randn(1, 12, PAPER["samples"], device=device), torch.randn(1, PAPER["wide"], device=device)
            print(f"  {name:6} {sum(p.numel() for p in model.parameters()) / 1e6:6.2f} M parameters   {multiply_adds(model, signal, wide):8.0f} M multiply-adds a record")
        for batch in (1, 8):
            signal, wide = torch.randn(batch, 12, PAPER["samples"], device=device), torch.randn(batch, PAPER["wide"], device=device)
            with torch.inference_mode():
                gap = (models["naive"](signal, wide) - ours(signal, wide).logits).abs().max().item()
                assert gap < 1e-5, f"ours and naive differ by {gap}"
                show(f"  forward, batch {batch} (equal to {gap:.0e})", medians({name: lambda m=model: m(signal, wide) for name, model in models.items()}, repeats, device))
                with torch.autocast(device.partition(":")[0], torch.bfloat16):
                    half = medians({"ours": lambda: ours(signal, wide)}, repeats, device)["ours"]
                    logits = ours(signal, wide).logits.float()
            error = (logits.sigmoid() - ours(signal, wide).logits.sigmoid()).abs().max().item()
            print(f"  forward, batch {batch}, ours in bf16   {half:8.1f} ms; largest error of a probability {error:.1e}")
        batch = {"signal": torch.randn(TRAIN_BATCH, 12, PAPER["samples"], device=device), "wide": torch.randn(TRAIN_BATCH, PAPER["wide"], device=device),
                 "labels": torch.randint(2, (TRAIN_BATCH, PAPER["classes"]), device=device).float()}

        def step(model: nn.Module) -> None:
            answer = model(batch["signal"], batch["wide"])
            F.binary_cross_entropy_with_logits(getattr(answer, "logits", answer), batch["labels"]).backward()
            model.zero_grad()
        for model in models.values():
            model.train()
        show(f"  training step, batch {TRAIN_BATCH}", medians({name: lambda m=model: step(m) for name, model in models.items()}, repeats, device))


if __name__ == "__main__":
    main()
