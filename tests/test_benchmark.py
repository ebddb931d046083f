"""The benchmark's parts run, its reference agrees with ours, and it measures what it says."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))

from bench import measure, reference, scaling, step
from bench.measure import Row

from danet.evaluation.inference import MultiScale

CPU = torch.device("cpu")


def test_the_plain_network_takes_every_weight_of_ours():
    with torch.device("meta"):
        for depth in (50, 101):
            ours = {k: v.shape for k, v in step.make_network(depth).state_dict().items()}
            plain = reference.PlainDANet(depth, step.NUM_CLASSES).state_dict()
            assert ours == {k: v.shape for k, v in plain.items()}


def test_windows_one_at_a_time_give_the_probabilities_of_ours():
    class Net(torch.nn.Module):
        """Sees its surroundings, so that windows and mirroring matter."""

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 4, 5, padding=2)

        def forward(self, image):
            from danet.types import SegmentationOutput

            return SegmentationOutput(self.conv(image.float() / 255), {})

    net = Net().eval()
    image = torch.randint(0, 256, (1, 3, 70, 90), dtype=torch.uint8)
    scales = (0.5, 1.0, 1.7)
    ours = MultiScale(scales=scales, flip=True, crop=[48, 48], stride=[32, 32])(net, image)
    plain = reference.multi_scale(net, image, scales=scales, crop=48, stride=32)
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


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
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "scripts",
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == pytest.approx(2**25, rel=0.05)


def test_functions_take_turns():
    calls = []
    times = measure.seconds(
        [lambda: calls.append("a"), lambda: calls.append("b")], CPU, repeats=2, warm_ups=1
    )
    assert calls == ["a", "b"] * 3
    assert len(times) == 2


def test_a_disagreement_stops_the_benchmark():
    assert measure.agree(1e-6, 1e-5, "x") == 1e-6
    for error in (1e-4, float("nan")):
        with pytest.raises(AssertionError, match="x: ours and the reference differ"):
            measure.agree(error, 1e-5, "x")


def test_the_table_shows_ratios_of_times_but_not_of_errors():
    rows = [Row("p", "c", "time", "s", 0.5, 1.0), Row("p", "c", "error", "", 1e-7, 1e-7)]
    lines = measure.table(rows).splitlines()
    assert lines[2] == "| p | c | time | 1.000 s | 0.500 s | 2.00 |  |"
    assert lines[3] == "| p | c | error | 1.0e-07 | 1.0e-07 |  |  |"


def test_the_cost_model_follows_its_formula():
    network, work, machine = scaling.count(50, 256), scaling.Work(), scaling.Machine()
    assert network.norms == 57
    alone = scaling.cost(network, work, machine, 1)
    assert alone.all_reduce == alone.exposed == alone.sync_norm == 0
    eight = scaling.cost(network, work, machine, 8)
    assert eight.all_reduce == 4 * network.parameters * 2 * 7 / 8 / machine.link_in_node
    assert eight.sync_norm == 2 * 57 * machine.latency_in_node
    starved = scaling.cost(network, work._replace(loader_rate=0.01), machine, 8)
    assert starved.step == starved.loader
    sizes = [scaling.cost(network, work, machine, n).step for n in scaling.WORLDS]
    assert sizes == sorted(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["attention", "step", "eval", "startup", "scaling"])
def test_every_part_runs_and_agrees_with_the_reference(part, tmp_path):
    command = [sys.executable, "-W", "error", str(ROOT / "scripts" / "benchmark.py"), part]
    settings = ["--quick", "--device", "cpu", "--json", str(tmp_path / "figures.jsonl")]
    done = subprocess.run([*command, *settings], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "figures.jsonl").read_text().splitlines()]
    assert rows
    for row in rows:
        assert row["part"] == part
        assert row["ours"] >= 0
        assert {"device", "torch", "threads", "commit", "command"} <= set(row)
    errors = [row["ours"] for row in rows if row["measure"] == "error"]
    assert all(error < 1e-4 for error in errors)
    assert bool(errors) == (part in ("attention", "step", "eval"))
