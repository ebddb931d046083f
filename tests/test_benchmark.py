"""The benchmark's parts run, its reference agrees with ours, and it measures what it says."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

import benchmark
from bench import deployment, measure, reference, step


def test_the_plain_network_takes_every_weight_of_ours():
    with torch.device("meta"):
        for depth in (50, 101):
            ours = {k: v.shape for k, v in step.make_network(depth).state_dict().items()}
            plain = reference.PlainDANet(depth, step.NUM_CLASSES).state_dict()
            assert ours == {k: v.shape for k, v in plain.items()}


def test_peak_memory_is_that_of_the_allocations():
    """In a process of its own, since the heap of this one is full of holes."""
    code = """
import torch
from bench import measure
def take():
    first = torch.ones(2**22)  # 16 MiB
    del first
    return torch.ones(2**23)  # 32 MiB
measure.return_freed_memory()
take()
print(measure.peak_memory(take, torch.device("cpu")))
"""
    command = [sys.executable, "-c", code]
    found = subprocess.check_output(command, cwd=ROOT / "scripts", text=True)
    assert int(found) == pytest.approx(2**25, rel=0.05)


def test_functions_take_turns():
    calls = []
    functions = [lambda: calls.append("a"), lambda: calls.append("b")]
    assert len(measure.seconds(functions, torch.device("cpu"), repeats=2, warm_ups=1)) == 2
    assert calls == ["a", "b"] * 3


@pytest.mark.parametrize("error", [1e-4, float("nan")])
def test_a_disagreement_is_a_row_and_an_exit_code_after_all_figures(
    error, tmp_path, monkeypatch, capsys
):
    rows = [
        measure.Row("step", "case", "error", "", error, note="loss", bound=1e-5),
        measure.Row("step", "case", "time", "s", 1.0, 2.0, against="plain float32"),
    ]
    file = tmp_path / "figures.jsonl"
    monkeypatch.setattr(step, "run", lambda options: rows)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "step", "--device=cpu", f"--json={file}"])
    with pytest.raises(SystemExit, match="FAILED: case, loss"):
        benchmark.main()
    shown, (first, second) = capsys.readouterr().out, map(json.loads, file.read_text().splitlines())
    assert "FAILED, bound 1e-05; loss" in shown
    assert "plain float32" in shown
    assert (first["failed"], second["failed"], second["ratio"]) == (True, False, 2)


def test_a_part_that_fails_does_not_end_the_others(monkeypatch):
    started = []

    def run(command, check):
        started.append(command[2])
        return subprocess.CompletedProcess(command, returncode=command[2] == "attention")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "attention", "step", "--quick"])
    with pytest.raises(SystemExit, match=r"FAILED: attention$"):
        benchmark.main()
    assert started == ["attention", "step"]


def test_ours_is_compared_with_the_plain_step_of_equal_precision_first():
    names = ["plain float32 NCHW", "plain float32 channels_last", "plain bfloat16 channels_last"]
    steps = step.Steps({}, dict.fromkeys([*names, "mmsegmentation float32, auxiliary head"]))
    assert steps.against("bfloat16") == [names[2], names[0]]
    assert steps.against("float32") == names[:2]
    assert steps.against("float32 auxiliary head") == ["mmsegmentation float32, auxiliary head"]


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attention", "step", "eval", "startup", "scaling"])
def test_every_part_runs_and_agrees_with_the_reference(part, tmp_path, monkeypatch):
    settings = ["--quick", "--device", "cpu", "--json", str(tmp_path / "figures.jsonl")]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", part, *settings])
    benchmark.main()
    rows = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert {row["part"] for row in rows} == {part}
    for row in rows:
        assert row["ours"] >= 0
        assert {"device", "torch", "threads", "commit", "command"} <= set(row)
    errors = [row["ours"] for row in rows if row["measure"] == "error"]
    assert all(error < 1e-4 for error in errors)
    assert bool(errors) == (part in ("attention", "step", "eval"))


@pytest.mark.slow
def test_a_runtime_that_fails_is_a_row_and_the_others_are_not_measured_twice(
    tiny_checkpoint, tmp_path, monkeypatch, capsys
):
    pytest.importorskip("onnxruntime")
    argv = ["deployment.py", str(tiny_checkpoint), "48", "96", f"--work={tmp_path}"]
    monkeypatch.setattr(
        sys, "argv", [*argv, "--miou", "--repeats=1", "--threads=1", "--rows=pytorch,ort"]
    )
    (tmp_path / "model.onnx").write_bytes(b"no program")
    deployment.main()
    shown = capsys.readouterr().out
    assert "| ONNX Runtime, any size | does not run: " in shown
    rows = json.loads((tmp_path / "48x96/rows.json").read_text())
    assert rows["pytorch"]["same"] == 1
    assert rows["pytorch"]["difference"] < 1e-4
    assert 0 < rows["pytorch"]["miou"] < 1
    monkeypatch.setattr(deployment, "run_row", None)
    deployment.main()
    assert capsys.readouterr().out == shown
