"""The ledger loses nothing, evidence is checked, verdicts follow their rules."""

import json
import multiprocessing
from dataclasses import asdict, replace

import numpy as np
import pytest

from medgen_nb.data import BadRecord
from medgen_nb.ledger import Claim, Run, append_run, judge, read_claims, read_runs, readme_blocks, record, refresh, verdicts
from medgen_nb.metrics import bootstrap, flatten

RUN = Run(room="ehr", name="base", scale="teach", seed=0, data="simulated", fingerprint="f", metrics={"cmd": 0.1}, minutes=1.0, commit="c" * 40, clean=True)


def test_twenty_processes_append_at_once_and_lose_none(tmp_path):
    context = multiprocessing.get_context("fork")
    path, gate = tmp_path / "ledger.jsonl", context.Barrier(20)

    def write(k):
        gate.wait()   # all at the same moment
        for row in range(10):
            append_run(replace(RUN, seed=100 * k + row, metrics={"cmd": 0.1, "long": list(range(500))}), path)

    writers = [context.Process(target=write, args=(k,)) for k in range(20)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted(run.seed for run in read_runs(path)) == sorted(100 * k + row for k in range(20) for row in range(10))


def test_cut_line_is_named_and_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "ledger.jsonl"
    append_run(RUN, path)
    with open(path, "a") as file:
        file.write('{"room": "eh')
    append_run(replace(RUN, seed=1), path)
    with pytest.raises(BadRecord, match="line 2"):
        read_runs(path)
    lines = path.read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[2])["seed"] == 1


@pytest.mark.parametrize("facts, reason", [({"scale": "demo"}, "no evidence"), ({"clean": False}, "changed code"), (None, "not finished")])
def test_only_evidence_is_recorded(tmp_path, facts, reason):
    if facts is not None:
        (tmp_path / "run.json").write_text(json.dumps(asdict(replace(RUN, **facts))))
    with pytest.raises(BadRecord, match=reason):
        record(tmp_path, tmp_path / "ledger.jsonl")
    assert not (tmp_path / "ledger.jsonl").exists()


def test_a_run_is_recorded_once(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(asdict(RUN)))
    assert record(tmp_path, tmp_path / "ledger.jsonl") == RUN
    with pytest.raises(BadRecord, match="already"):
        record(tmp_path, tmp_path / "ledger.jsonl")


def made(name, seed, mean, metric="m", floor=None):
    "A run whose metric is a mean over 300 shared patients."
    patients = np.random.default_rng(1).normal(0, 0.3, 300)
    e = {metric: bootstrap(lambda rows: mean + patients[rows].mean(), 300, 50)}
    if floor is not None:
        e["floor"] = bootstrap(lambda rows: floor + patients[rows].mean(), 300, 50)
    return Run(room="ehr", name=name, scale="teach", seed=seed, data="simulated", fingerprint="f", minutes=1.0, metrics=flatten(e),
               replicates={k: list(v.replicates) for k, v in e.items()})


def world(claim, means, seeds=3, **more):
    jitter = np.random.default_rng(0).normal(0, 0.003, 100)
    return judge(claim, [made(name, s, mean + jitter[s], **more) for name, mean in means.items() for s in range(seeds)]).word


BETTER = Claim("T", "ehr", "c", "p", "better", "m", "higher", "base", ("a", "b"), 0.05)


@pytest.mark.parametrize("means, word", [
    ({"base": 0.5, "a": 0.3, "b": 0.4}, "replicated"),
    ({"base": 0.5, "a": 0.3, "b": 0.48}, "partly"),
    ({"base": 0.5, "a": 0.3}, "partly"),                       # a rival was not run
    ({"base": 0.5, "a": 0.49, "b": 0.6}, "not replicated"),
    ({"base": 0.5}, "not run yet"),
    ({"a": 0.5}, "not run yet"),
])
def test_better(means, word):
    assert world(BETTER, means) == word


def test_two_seeds_are_never_enough():
    assert world(BETTER, {"base": 0.9, "a": 0.1, "b": 0.1}, seeds=2) == "inconclusive"


def test_lower_is_better_is_respected():
    claim = replace(BETTER, direction="lower", others=("a",))
    assert world(claim, {"base": 0.2, "a": 0.5}) == "replicated" and world(claim, {"base": 0.5, "a": 0.2}) == "not replicated"


def test_no_worse_allows_the_margin():
    claim = replace(BETTER, rule="no_worse", others=("a",))
    assert world(claim, {"base": 0.48, "a": 0.5}) == "replicated" and world(claim, {"base": 0.3, "a": 0.5}) == "not replicated"


def test_thresholds_and_floors():
    least = Claim("T", "ehr", "c", "p", "at_least", "m", threshold=0.4)
    assert world(least, {"base": 0.5}) == "replicated" and world(least, {"base": 0.3}) == "not replicated"
    floor = replace(least, threshold=None, against="floor", factor=0.95)
    assert world(floor, {"base": 0.5}, floor=0.5) == "replicated" and world(floor, {"base": 0.4}, floor=0.5) == "not replicated"
    most = replace(least, rule="at_most")
    assert world(most, {"base": 0.3}) == "replicated" and world(most, {"base": 0.5}) == "not replicated"


def test_trend_must_be_steady():
    claim = Claim("T", "ehr", "c", "p", "trend", "m", "higher", others=("one", "two", "three", "four"), smallest_effect=0.1)
    assert world(claim, {"one": 0.1, "two": 0.2, "three": 0.3, "four": 0.4}) == "replicated"
    assert world(claim, {"one": 0.3, "two": 0.05, "three": 0.2, "four": 0.45}) == "inconclusive"
    assert world(claim, {"one": 0.4, "two": 0.3, "three": 0.2, "four": 0.1}) == "not replicated"


def test_trend_with_a_missing_middle_is_not_steady():
    claim = Claim("T", "ehr", "c", "p", "trend", "m", "higher", others=("one", "two", "three"), smallest_effect=0.1)
    assert world(claim, {"one": 0.1, "three": 0.4}) == "inconclusive"


def test_rows_that_cannot_be_paired_are_inconclusive():
    runs = [made("base", s, 0.5) for s in range(3)] + [replace(made("a", s, 0.3), replicates={"m": [0.3] * 7}) for s in range(3)]
    assert judge(replace(BETTER, others=("a",)), runs).word == "inconclusive"


def test_open_and_untestable():
    assert world(replace(BETTER, rule="open"), {"base": 0.1, "a": 0.2}, seeds=1) == "shown"
    assert world(replace(BETTER, rule="open"), {"base": 0.1}) == "not run yet", "none of the others was run"
    assert world(replace(BETTER, rule="not_testable", note="why"), {}) == "not testable here"


def test_overridden_small_and_other_data_do_not_count():
    runs = [made("base", s, 0.5) for s in range(3)] + [made("a", s, 0.3) for s in range(3)]
    claim = replace(BETTER, others=("a",))
    assert str(verdicts([claim], runs)["T"][0]) == "replicated (simulated)"
    for change in ({"overrides": {"fit.lr": 1}}, {"scale": "smoke"}, {"room": "pcg"}):
        assert verdicts([claim], [replace(run, **change) for run in runs])["T"][0].word == "not run yet"
    moved = [replace(run, fingerprint="other") for run in runs[:1]]
    assert verdicts([claim], runs[:3] + runs[3:] + moved)["T"][0].word == "not run yet", "rows of other patients cannot be paired"
    other = replace(runs[3], name="codes-256", fingerprint="other")
    assert str(verdicts([claim], [*runs, other])["T"][0]) == "replicated (simulated)", "a run on other data takes nothing away"
    faults = [replace(run, name="fault-data", fingerprint="other") for run in runs[3:]]
    assert str(verdicts([replace(claim, others=("fault-data",))], runs[:3] + faults)["T"][0]) == "replicated (simulated)", "a fault may lie in the data"


@pytest.mark.parametrize("text, reason", [('[A]\nroom="e"\nclaim="c"\npaper=""\nrule="best"', "unknown rule"), ('[A]\nroom="e"\nclaim="c"\npaper=""\nrule="better"', "needs others"),
                                          ('[A]\nroom="e"\nclaim="c"\npaper=""\nrule="at_least"', "threshold"), ('[A]\nroom="e"\ncolour="red"', "unknown field"), ('[A]\nroom="e"', "missing")])
def test_bad_claims_are_named(tmp_path, text, reason):
    (tmp_path / "claims.toml").write_text(text)
    with pytest.raises(BadRecord, match=reason):
        read_claims(tmp_path / "claims.toml")


def test_refresh_wants_its_block():
    with pytest.raises(ValueError, match="expected one block"):
        refresh("no block", {"results": "x"})


def test_readme_opens_with_a_line_per_room():
    runs = [made("base", seed, 0.5) for seed in range(3)] + [made("a", seed, 0.3) for seed in range(3)]
    claims = [replace(BETTER, others=("a",)), replace(BETTER, id="U", ours="nobody", others=("a",)), replace(BETTER, id="V", room="pcg", others=("a",))]
    blocks = readme_blocks(runs, claims)
    head, first, second = (line.strip("| ").split(" | ") for line in blocks["results"].splitlines()[0:4] if "---" not in line)
    counts = [dict(zip(head, line)) for line in (first, second)]
    assert counts[0]["room"] == "ehr" and counts[0]["recorded runs"] == "6" and counts[0]["replicated"] == "1" and counts[0]["not run yet"] == "1"
    assert counts[1]["room"] == "pcg" and counts[1]["recorded runs"] == "0" and counts[1]["not run yet"] == "1"
    assert blocks["claims"].count("<details>") == blocks["claims"].count("</details>") == 1 and "replicated (simulated)" in blocks["claims"]
