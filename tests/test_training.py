"""fit: exact resume after SIGKILL, the adversary, bad checkpoints; stages: kept once, keyed by everything that decides them."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from medgen_nb import data as data_module
from medgen_nb import training as training_module
from medgen_nb.data import loader
from medgen_nb.training import FitConfig, Stage, averaged, fit, fit_stage, learning_rate, list_stages, prune_stages, step_seed

POINTS = {"x": torch.randn(64, 3, generator=torch.Generator().manual_seed(0))}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.1), nn.Linear(8, 3))

    def loss(self, batch, adversary=None):
        x = batch["x"]
        out = self.layers(x + torch.randn_like(x))
        return (out - x).square().mean() + (0 if adversary is None else -0.1 * adversary(out).mean())


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 1)

    def forward(self, x):
        return self.layer(x)

    def loss(self, model, batch):
        return (1 - self(batch["x"])).relu().mean() + (1 + self(model.layers(batch["x"]))).relu().mean()


# One interpreter imports everything once and forks; each child trains until it kills itself or ends.
KILLED = """
    import os, signal, sys
    from pathlib import Path
    sys.path.insert(0, {tests!r})
    import torch
    torch.set_num_threads(1)
    from test_training import Critic, FitConfig, Net, POINTS, fit, loader
    import medgen_nb.training as training
    from safetensors.torch import save_file
    import json

    CONFIG = FitConfig(steps=60, batch_size=8, lr=1e-2, warmup=5, ema=0.9, schedule="noam", save_every=10, critic_steps=2)
    place = Path({place!r})

    def train(folder, kill_at=None, while_writing=False):
        model, critic = Net(), Critic()
        if while_writing:
            replace = os.replace
            def die(a, b): os.kill(os.getpid(), signal.SIGKILL)
            training.os.replace = die
        for state in fit(model, loader(POINTS, 8, seed=3), CONFIG, seed=3, folder=folder, adversary=critic, device="cpu"):
            torch.randn(state.step % 5)      # a notebook that draws numbers of its own
            if state.step == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        save_file({{k: v.clone() for m in (model, critic) for k, v in m.state_dict().items()}}, place / (folder.name + ".safetensors"))
        (place / (folder.name + ".json")).write_text(json.dumps(state.history))

    def child(*arguments, **options):
        pid = os.fork()
        if pid == 0:
            train(*arguments, **options)
            os._exit(0)
        return os.waitpid(pid, 0)[1]

    ends = [child(place / "unbroken"), child(place / "killed", kill_at=7), child(place / "killed", kill_at=34),
            child(place / "killed", while_writing=True), child(place / "killed")]
    print(ends, sorted(p.name for p in (place / "killed").iterdir()))
    assert ends == [0, signal.SIGKILL, signal.SIGKILL, signal.SIGKILL, 0], ends
"""


def test_three_kills_change_nothing(tmp_path):
    program = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent), place=str(tmp_path))
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    one, other = load_file(tmp_path / "unbroken.safetensors"), load_file(tmp_path / "killed.safetensors")
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    history = json.loads((tmp_path / "unbroken.json").read_text())
    assert history == json.loads((tmp_path / "killed.json").read_text()) and len(history) == 6


def test_training_with_an_adversary_moves_both():
    model, critic = Net(), Critic()
    before = [p.clone() for m in (model, critic) for p in m.parameters()]
    steps = [s.step for s in fit(model, loader(POINTS, 8), FitConfig(steps=10, warmup=1, critic_steps=3), adversary=critic, device="cpu")]
    assert steps == list(range(1, 11))
    assert all(not torch.equal(a, b) for a, b in zip(before, [p for m in (model, critic) for p in m.parameters()]))
    assert all(p.grad is None for p in critic.parameters())


def test_averaged_lends_and_gives_back():
    for state in fit(Net(), loader(POINTS, 8), FitConfig(steps=10, ema=0.5), device="cpu"):
        raw = [p.clone() for p in state.model.parameters()]
        with averaged(state) as model:
            lent = [p.clone() for p in model.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(raw, state.model.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(lent, state.model.parameters())), "the model ends with its averaged weights"


@pytest.mark.parametrize("schedule", ["constant", "cosine", "noam"])
def test_schedules_peak_at_lr(schedule):
    config = FitConfig(schedule=schedule, warmup=20, steps=100, lr=0.5)
    rates = [learning_rate(s, config) for s in range(100)]
    assert max(rates) == pytest.approx(0.5, rel=0.03) and rates[0] == pytest.approx(0.025) and min(rates) >= 0


@pytest.mark.parametrize("wrong, word", [({"schedule": "square"}, "schedule"), ({"precision": "fp16"}, "precision")])
def test_unknown_settings_are_named(wrong, word):
    with pytest.raises(ValueError, match=word):
        list(fit(Net(), loader(POINTS, 8), FitConfig(steps=10, warmup=0, **wrong), device="cpu"))


def test_precision_is_measured_once_and_kept(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(training_module, "faster_precision", lambda *a: asked.append(1) or "bf16")
    config, model = FitConfig(steps=20, save_every=10), Net()
    for state in fit(model, loader(POINTS, 8), config, folder=tmp_path, device="cpu"):
        if state.step == 15:
            break
    assert state.precision == "bf16" and asked == [1]
    *_, last = fit(Net(), loader(POINTS, 8), config, folder=tmp_path, device="cpu")
    assert last.precision == "bf16" and asked == [1], "a resumed training keeps its choice"


def test_measuring_leaves_the_model_alone():
    model = Net().train()
    before = [p.clone() for p in model.parameters()]
    assert training_module.faster_precision(model, POINTS, None) in ("fp32", "bf16")
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and all(p.grad is None for p in model.parameters())


def test_a_cpu_that_crawls_in_bf16_is_not_asked_for_a_pass(monkeypatch):
    monkeypatch.setattr(training_module, "bf16_crawls", lambda: True)
    assert training_module.faster_precision(None, POINTS, None) == "fp32"


def test_save_every_must_fit_the_history():
    with pytest.raises(ValueError, match="multiple of 10"):
        FitConfig(save_every=15)


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for an absent GPU")
def test_absent_gpu_is_told():
    with pytest.raises(ValueError, match="no GPU"):
        next(fit(Net(), loader(POINTS, 8), FitConfig(), device="cuda"))


def test_step_seeds_differ():
    assert len({step_seed(seed, step) for seed in range(30) for step in range(100)}) == 3000


def test_stage_is_trained_once_and_keyed_by_all_that_decides_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGEN_STAGES", str(tmp_path / "stages"))
    config = FitConfig(steps=10, warmup=1)

    def train(**changes):
        facts = dict(config={"a": 1}, data="d", seed=0, code=[data_module], work=tmp_path / "work") | changes
        stage, model = Stage("net", **facts), Net()
        return sum(1 for _ in fit_stage(stage, model, loader(POINTS, 8), config, device="cpu")), model

    first, model = train()
    again, same = train(work=tmp_path / "elsewhere")
    assert (first, again) == (10, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), same.state_dict().values()))
    for changes in ({"config": {"a": 2}}, {"data": "e"}, {"seed": 1}, {"code": []}, {"after": [Stage("x", {}, "d", 0, [], tmp_path)]}):
        assert train(**changes)[0] == 10, changes
    assert len(list_stages()) == 6 and len(prune_stages(0)) == 6 and list_stages() == []


def test_half_trained_stage_is_not_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGEN_STAGES", str(tmp_path / "stages"))
    stage = Stage("net", {}, "d", 0, [data_module], tmp_path / "work")
    for state in fit_stage(stage, Net(), loader(POINTS, 8), FitConfig(steps=40, save_every=10), device="cpu"):
        if state.step == 25:
            break
    del state
    assert not stage.done
    taken = sum(1 for _ in fit_stage(stage, Net(), loader(POINTS, 8), FitConfig(steps=40, save_every=10), device="cpu"))
    assert stage.done and taken == 20, "it goes on from step 20"


def test_killed_between_last_checkpoint_and_keeping(tmp_path, monkeypatch):
    monkeypatch.setenv("MEDGEN_STAGES", str(tmp_path / "stages"))
    stage, config = Stage("net", {}, "d", 0, [data_module], tmp_path / "work"), FitConfig(steps=20, save_every=10)
    done = Net()
    list(fit(done, loader(POINTS, 8), config, 0, stage.work, device="cpu"))
    model = Net()
    assert list(fit_stage(stage, model, loader(POINTS, 8), config, device="cpu")) == [] and stage.done
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), done.state_dict().values()))
    assert len(stage.memory["history"]) == 2


