"""A plan says what the run then takes: compared with the allocations of the real trainer."""

import functools
import json
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, call
from test_config import compose
from torch.utils.flop_counter import FlopCounterMode

from danet import memory
from danet.config.build import make, make_model
from danet.config.validate import check
from danet.engine.precision import place
from danet.engine.train_step import TrainStep
from danet.ops import cross_entropy
from danet.preflight import plan
from danet.preflight.memory_estimate import StepSimulator
from danet.types import Batch

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
RECOMPUTE = "model.backbone.recompute=[1,2,3,4]"
SIZE = (2, 96, 160)


def config(*overrides, gib=None):
    checked = check(compose(*overrides))
    checked.device_memory = gib
    return checked


@functools.cache
def simulated(*overrides, size=SIZE, precision=torch.float32):
    """What a step allocates above weights, optimizer and average."""
    simulator = StepSimulator(config(*overrides), precision=precision)
    standing = simulator.weights + simulator.optimizer + simulator.average
    return simulator.peak(*size) - standing


def real_step(plain, device="cpu"):
    """The training step of a config, after two small steps: states exist, caches are warm."""
    model = place(make_model(plain), plain.trainer, torch.device(device))
    parts = make(plain.loss, "loss").to(device), make(plain.optimizer, "optimizer")(model)
    step = TrainStep(
        model,
        *parts,
        make(plain.schedule, "schedule"),
        plain.trainer,
        num_classes=plain.data.num_classes,
    )
    step.ddp_model.train()
    for number in range(2):
        step(group(plain, 2, 32, 32), number)
    return step


def group(plain, batch_size, height, width):
    image = torch.randint(0, 256, (batch_size, 3, height, width), dtype=torch.uint8)
    mask = torch.randint(0, plain.data.num_classes, (batch_size, height, width), dtype=torch.uint8)
    return [Batch(image, mask, ("",) * batch_size)] * plain.trainer.accumulate


def allocated(function, path):
    """Peak of torch's own CPU allocations during a call, above the start, by its profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(
        activities=activities, profile_memory=True, acc_events=True
    ) as profile:
        function()
    profile.export_chrome_trace(str(path))
    events = [e for e in json.loads(path.read_text())["traceEvents"] if e["name"] == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak


LIKE_REALITY = [
    [],
    ["optimizer=sgd", "loss=ohem", "loss.main.min_kept=500", "trainer.channels_last=false"],
    ["trainer.accumulate=2", "trainer.ema_decay=0.9", "trainer.clip_norm=1.0"],
    [RECOMPUTE],
    ["loss=rmi", "loss.main.label_smoothing=0.1"],
    ["loss=focal"],
    ["model.backbone.freeze=2", "optimizer.layer_decay=0.75"],
    ["model.backbone.freeze=all", RECOMPUTE, "optimizer=sgd"],
]
AT_REAL_SIZES = [
    ([], (6, 64, 384), 0.25),
    (["model/backbone=resnet50", "optimizer=sgd"], (2, 256, 256), 0.25),
]


def test_a_step_of_usual_size_is_let_through_without_the_seconds_of_a_simulation(monkeypatch):
    monkeypatch.setattr(plan, "StepSimulator", lambda *_, **__: pytest.fail("simulated"))
    plan.refuse_the_impossible(config("data.size=[512,1024]", "data.batch_size=16"), CPU)
    with pytest.raises(pytest.fail.Exception, match="simulated"):
        plan.refuse_the_impossible(config("data.size=[20000,20000]", "data.batch_size=16"), CPU)


@pytest.mark.parametrize(
    ("overrides", "size", "tolerance"),
    [
        *(pytest.param([*TINY, *o], SIZE, 0.1, id=str(o)) for o in LIKE_REALITY),
        *AT_REAL_SIZES,
    ],
)
def test_the_predicted_peak_is_what_the_trainer_allocates(overrides, size, tolerance, tmp_path):
    typed = ("trainer.device=cpu", "trainer.precision=float32", *overrides)
    plain = config(*typed)
    real, batches = real_step(plain), group(plain, *size)
    measured = allocated(lambda: real(batches, 2), tmp_path / "trace.json")
    assert simulated(*typed, size=size) == pytest.approx(measured, rel=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_prediction_holds_on_cuda(precision):
    plain = config(
        *("model/backbone=resnet50", "optimizer=sgd"),
        *("trainer.device=cuda", f"trainer.precision={precision}"),
    )
    size = (4, 512, 512)
    simulator = StepSimulator(plain, precision=getattr(torch, precision), on_cuda=True)
    step = real_step(plain, "cuda")
    batches = group(plain, *size)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step(batches, 2)
    assert simulator.peak(*size) == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.25)


def test_the_chunks_of_the_loss_are_those_of_the_device(monkeypatch):
    plain = config(*TINY, "trainer.precision=float32")
    monkeypatch.setattr(cross_entropy, "ELEMENTS_PER_CHUNK", {"cpu": 1, "cuda": 2**26})
    peaks = [
        StepSimulator(plain, precision=torch.float32, on_cuda=on_cuda).peak(8, 256, 256)
        for on_cuda in (False, True)
    ]
    # Fine logits of all images instead of one, at least once.
    assert peaks[1] - peaks[0] > 4 * 7 * plain.data.num_classes * 256 * 256
    assert cross_entropy.ELEMENTS_PER_CHUNK["cpu"] == 1


def test_parts_of_the_plan_are_what_they_are_called():
    plain = config(*TINY, "optimizer=sgd", "trainer.ema_decay=0.9")
    step = StepSimulator(plain, precision=torch.float32)
    with torch.device("meta"):
        model = make_model(plain)
    weights = sum(p.numel() for p in model.parameters())
    state = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    assert step.optimizer == 4 * weights  # one momentum each
    assert state <= step.weights <= state + 1024  # and buffers of the loss
    assert step.average == step.weights
    adam = StepSimulator(config(*TINY, "optimizer=adamw"), precision=torch.float32)
    assert adam.optimizer == pytest.approx(2 * 4 * weights, rel=0.01)  # and step counters
    assert adam.average == 0


def test_gradients_of_convolutions_in_groups_take_twice_the_flops():
    pytest.importorskip("timm", reason="the optional extra danet[timm] is not installed")
    settings = ("model/backbone=timm", "model.backbone.name=test_convnext", "model/head=fcn")
    simulator = StepSimulator(config(*settings), precision=torch.float32)
    forward, step = simulator.flops(2, 64, 96)
    # The loss resizes its gradient by matrix products.
    assert step == pytest.approx(3 * forward, rel=0.05)


def test_flops_are_those_of_the_paper():
    """673 G multiply-adds: counted with the authors' code, ResNet-101 at 768 x 768, 19 classes."""
    plain = config("model/backbone=resnet101", "data=cityscapes", "data.root=.")
    forward, step = StepSimulator(plain, precision=torch.float32).flops(1, 768, 768)
    assert forward == pytest.approx(2 * 673e9, rel=0.005)
    assert 3 * forward <= step <= 3.3 * forward


def test_bfloat16_and_recomputation_take_less():
    size = (6, 64, 384)
    full = simulated(size=size)
    assert simulated(size=size, precision=torch.bfloat16) < 0.75 * full
    assert simulated(RECOMPUTE, size=size) < 0.75 * full


def test_frozen_stages_cost_their_forward_pass_alone():
    size, wide = (6, 64, 384), ["model/backbone=resnet50", "optimizer=sgd"]
    flops, activations = {}, {}
    for freeze in ("none", "stem", 2, "all"):
        typed = (*wide, f"model.backbone.freeze={freeze}")
        step = StepSimulator(config(*typed), precision=torch.float32)
        flops[freeze] = step.flops(*size)
        activations[freeze] = simulated(*typed, size=size)
        trained = sum(p.numel() for p in step.model.parameters() if p.requires_grad)
        assert step.optimizer == 4 * trained
    backbone = step.model.get_submodule("backbone")
    with step._fake, FlopCounterMode(display=False) as counted:
        backbone(torch.empty(6, 3, 64, 384))
    assert len({forward for forward, _ in flops.values()}) == 1
    saved = flops["none"][1] - flops["all"][1]
    # The gradients of inputs and weights of each layer, but those of the image, which nobody needs;
    # and the gradients of the inputs of both branches' 3x3 reductions.
    stem = 2 * 49 * 3 * 64 * 6 * 32 * 192
    branches = 2 * (2 * 9 * 2048 * 512 * 6 * 8 * 48)
    assert saved == 2 * counted.get_total_flops() - stem + branches
    assert flops["none"][1] > flops["stem"][1] > flops[2][1] > flops["all"][1]
    assert activations["none"] > activations[2] > 2 * activations["all"]


@pytest.fixture
def few_sides(monkeypatch):
    """Lets the search for the largest crop begin at small ones: 2048 x 2048 takes seconds."""
    monkeypatch.setattr(plan, "SIDES", range(64, 321, 32))


def test_the_largest_crop_fits_and_a_larger_one_does_not(few_sides):
    simulator = StepSimulator(config(*TINY), precision=torch.float32)
    limit = int(0.3 * simulator.peak(4, 256, 256))
    height, side = map(int, re.findall(r"\d+", plan.largest_crop(simulator, 4, limit)))
    assert height == side
    assert simulator.peak(4, side, side) <= limit < simulator.peak(4, side + 32, side + 32)
    assert plan.largest_crop(simulator, 4, 1000) == "none"


def test_the_memory_of_this_machine_is_a_number(monkeypatch):
    typed = config(*TINY)
    for _ in range(2):
        memory, source = plan.memory_of(typed, CPU)
        assert 2**28 < memory < 2**50
        assert source == "free on cpu"
        monkeypatch.setattr(plan, "available_memory", lambda: None)  # not Linux


@pytest.mark.parametrize(
    ("available_kib", "limit", "least"),
    [(200, "max\n", 200 * 1024), (10**6, "250000\n", 243_000)],
)
def test_available_is_what_machine_and_container_leave(monkeypatch, available_kib, limit, least):
    texts = {
        "/proc/meminfo": f"MemFree: 1 kB\nMemAvailable:  {available_kib} kB\n",
        "/sys/fs/cgroup/memory.max": limit,
        "/sys/fs/cgroup/memory.current": "7000\n",
    }
    monkeypatch.setattr(memory, "Path", lambda name: SimpleNamespace(read_text=lambda: texts[name]))
    assert memory.available_memory() == least


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path, monkeypatch, capsys, few_sides):
    monkeypatch.chdir(tmp_path)
    call("train", *TINY, "dry_run=true", "device_memory=2")
    printed = capsys.readouterr().out
    for word in ("parameters", "FLOPs step", "optimizer", "peak", "largest crop", "fits"):
        assert word in printed
    assert "2 x 48 x 96" in printed
    assert "frozen" not in printed
    call("train", *TINY, "dry_run=true", "device_memory=2", "model.backbone.freeze=all")
    assert re.search(r"backbone (\S+), heads \S+; \1 frozen\)", capsys.readouterr().out)
    assert list(tmp_path.iterdir()) == []
