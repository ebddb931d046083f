"""What only a CUDA device can show: its kernels, mixed precision, resume, memory, no waiting."""

import json
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import TINY, batch, tiny, tool
from conftest import make_trainer as make
from test_attention import (
    attention_formula,
    channel_formula,
    error_of_tiles,
    position_formula,
    random_tokens,
)
from test_config import compose
from test_sync_batchnorm import uneven
from test_trainer import assert_equal, danet, state, train
from torch import nn

from danet.config.validate import check
from danet.distributed import collectives
from danet.distributed.sync_batchnorm import convert_sync_batchnorm
from danet.engine.optimizer import SGD, AdamW
from danet.evaluation.inference import Sliding
from danet.losses import OHEM, CrossEntropy, Focal, RegionMutualInformation
from danet.ops.attention import ChannelAttention, PositionAttention
from danet.ops.fused import BOUNDS, candidates, choose_kernel, error_of
from danet.ops.tiles import attend
from danet.preflight.advice import explain_shortage

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
ON_CUDA = [s for s in TINY if not s.startswith(("trainer.device", "trainer.precision"))]
CUDA = torch.device("cuda", 0)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def in_norm(got, expected):
    got, expected = got.detach(), expected.detach()
    return float((got.double() - expected.double()).norm() / expected.double().norm())


# Attention


@pytest.mark.parametrize("scale", [0.6, 1.5], ids=["flat", "sharp"])
@pytest.mark.parametrize(
    ("width", "channels", "queries", "keys"),
    [(64, 512, 1300, 1300), (24, 48, 333, 333), (32, 128, 100, 777), (64, 512, 9, 2049)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_attention_of_training_is_right(dtype, width, channels, queries, keys, scale):
    kernel = choose_kernel(CUDA, dtype, width, channels)
    assert kernel is not None, "training would compute in tiles"
    tokens = random_tokens(queries, keys, width, channels, scale=scale)
    tokens = [t.detach().to(CUDA, dtype).requires_grad_() for t in tokens]
    exact = [t.detach().double().requires_grad_() for t in tokens]
    upstream = torch.randn(2, queries, channels, device=CUDA, dtype=dtype)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = attend(*tokens)
        found = torch.autograd.grad(out, tokens, upstream)
    wanted = torch.autograd.grad(attention_formula(*exact), exact, upstream.double())
    backend = kernel.backend.name.removesuffix("_ATTENTION").lower()
    ran = [event.key for event in profile.key_averages()]
    assert any(backend in key and "backward" in key for key in ran), ran
    assert in_norm(out, attention_formula(*exact)) < BOUNDS[dtype]
    for got, expected in zip(found, wanted, strict=True):
        assert got.dtype == dtype
        assert in_norm(got, expected) < BOUNDS[dtype]


@pytest.mark.parametrize(("width", "channels"), [(64, 512), (24, 48), (32, 128)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_is_right_or_refuses(dtype, width, channels):
    accepted = 0
    for kernel in candidates(dtype, width, channels):
        try:
            error = error_of(kernel, CUDA, dtype, width, channels)
        except RuntimeError:
            continue
        assert error < BOUNDS[dtype], kernel
        accepted += 1
    assert accepted


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_tiles_are_right_on_cuda(dtype):
    tokens = [t.detach().to(CUDA, dtype).requires_grad_() for t in random_tokens(700, 900, 16, 64)]
    assert error_of_tiles(tokens) < BOUNDS.get(dtype, 1e-10)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("module", "formula"),
    [(PositionAttention(64), position_formula), (ChannelAttention(), channel_formula)],
    ids=["position", "channel"],
)
def test_attention_modules_on_cuda_equal_the_formula(module, formula, dtype):
    """The channel attention sums 2,400 products in float32, whatever their dtype."""
    module = module.to(CUDA, torch.float64)
    nn.init.constant_(module.gamma, 0.5)
    x = (0.1 * torch.randn(2, 64, 40, 60)).to(CUDA, dtype)
    x = x.to(memory_format=torch.channels_last).requires_grad_()
    exact = x.detach().double().requires_grad_()
    slow = formula(module, exact)
    upstream = torch.randn_like(slow)
    wanted = torch.autograd.grad(slow, exact, upstream)
    fast = module.to(dtype)(x)
    found = torch.autograd.grad(fast, x, upstream.to(dtype))
    assert fast.is_contiguous(memory_format=torch.channels_last)
    for got, expected in zip([fast, *found], [slow, *wanted], strict=True):
        assert in_norm(got, expected) < BOUNDS.get(dtype, 1e-10)


# Training, evaluation, prediction


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32", "tf32"])
def test_a_run_on_cuda_trains_resumes_and_is_scored(tmp_path, precision):
    settings = [*ON_CUDA, "trainer.device=cuda", f"trainer.precision={precision}"]
    run = [*settings, "trainer.steps=8", "run.dir=r"]
    done = tool("train", *run, "trainer.stop_at=4", cwd=tmp_path)
    assert f"cuda:0, {precision}" in done.stdout
    tool("train", "resume=r/last.pt", cwd=tmp_path)
    last = json.loads((tmp_path / "r/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8
    scored = ["checkpoint=r/last.pt", "device=cuda", "output=score"]
    tool("eval", *scored, cwd=tmp_path)
    metrics = json.loads((tmp_path / "score/metrics.json").read_text())
    assert metrics["miou"] == last["miou"], "this tool reproduces the score of the training"


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16"])
def test_windows_on_cuda_give_the_probabilities_of_the_cpu(precision):
    model, image = danet().eval(), batch(0, (150, 170)).image
    settings = {"crop": [64, 64], "stride": [40, 40], "flip": True}
    expected = Sliding(**settings)(model, image)
    found = Sliding(**settings, precision=precision)(model.to(CUDA), image.to(CUDA)).cpu()
    assert in_norm(found, expected) < (1e-4 if precision == "float32" else 2e-2)


def test_logits_on_cuda_are_those_of_the_cpu():
    model, image = danet().eval(), batch(0, (96, 128)).image
    mode = Sliding(crop=[96, 96], stride=[64, 64])
    expected = mode.logits(model, image)
    assert in_norm(mode.logits(model.to(CUDA), image.to(CUDA)).cpu(), expected) < 1e-4


def test_pictures_are_predicted_on_cuda(tmp_path, network):
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), picture)
    for device in ("cuda", "cpu"):
        images = [f"checkpoint={network}", "images=a.png", f"device={device}", f"output={device}"]
        tool("predict", *images, cwd=tmp_path)
    names = sorted(path.relative_to(tmp_path / "cpu") for path in (tmp_path / "cpu").rglob("*.png"))
    assert names
    assert all((tmp_path / "cuda" / name).is_file() for name in names)


def test_a_lack_of_memory_on_cuda_is_explained():
    with pytest.raises(torch.OutOfMemoryError) as caught:
        torch.empty(2**50, device=CUDA)
    config = check(compose(*ON_CUDA, "trainer.device=cuda"))
    explained = explain_shortage(caught.value, config, CUDA, training=True)
    assert "out of memory on cuda:0 in a step of data.batch_size" in str(explained)


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_deterministic_steps_on_cuda_are_equal_to_the_last_bit(tmp_path, precision, request):
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    ended = []
    for attempt in ("one", "two"):
        settings = {"precision": precision, "deterministic": True, "device": "cuda"}
        run = make(tmp_path / attempt, danet(), **settings)
        train(run, 3)
        ended.append(state(run))
    assert_equal(*ended)


# Two processes on one device


def work(rank, folder):
    """Is one of two processes that share the device and exchange by gloo."""
    torch.cuda.set_device(CUDA)
    store = f"file://{folder}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for order in (torch.contiguous_format, torch.channels_last):
            for convert in (convert_sync_batchnorm, nn.SyncBatchNorm.convert_sync_batchnorm):
                torch.manual_seed(rank)
                norm = convert(uneven(nn.BatchNorm2d(32))).cuda()
                x = 5 + torch.randn(3, 32, 9, 7, device=CUDA)
                x = x.to(dtype, memory_format=order).requires_grad_()
                out = norm(x)
                out.backward(torch.randn_like(out))
                tensors = [out, x.grad, norm.weight.grad, norm.bias.grad, norm.running_var]
                found.setdefault(f"{dtype} {order}", []).append([t.detach().cpu() for t in tensors])
    for precision in ("float16", "float32"):
        settings = {"precision": precision, "ema_decay": 0.9, "device": "cuda"}
        run = make(Path(folder) / precision, tiny(dropout=0.0), **settings)
        run.train_step.ddp_model.train()
        for step in range(3):
            run.train_step([batch(2 * step + rank)], step)
        run.log.close()
        collectives.broadcast_buffers(run.train_step.model)
        found[precision] = {k: v.cpu() for k, v in state(run).items()}
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_on_one_device(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    for precision in ("float16", "float32"):
        assert_equal(first.pop(precision), second.pop(precision))
    for case, (ours, torchs) in [*first.items(), *second.items()]:
        for got, expected in zip(ours, torchs, strict=True):
            assert in_norm(got, expected) < (1e-2 if "bfloat16" in case else 1e-5), case


def test_torchrun_shares_the_device_where_a_test_asks_for_it(tmp_path):
    settings = [*ON_CUDA, "trainer.device=cuda", "trainer.precision=float16", "run.dir=r"]
    launcher = [*("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")]
    env = {"DANET_SHARE_DEVICE": "1"}
    done = tool("train", *settings, "trainer.steps=4", cwd=tmp_path, launcher=launcher, env=env)
    assert "cuda:0, float16" in done.stdout


# Losses and waiting


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy([1.0, 2.0, 0.5]),
        CrossEntropy(label_smoothing=0.1),
        OHEM(min_kept=50),
        Focal(),
        RegionMutualInformation(epsilon=1e-3),
        RegionMutualInformation(epsilon=1e-3, pooling="max"),
    ],
    ids=str,
)
def test_a_loss_on_cuda_is_that_on_the_cpu(loss, deterministic):
    logits, mask = torch.randn(3, 3, 5, 7), batch(0, (33, 49)).mask[[0, 1, 0]]
    results = []
    torch.use_deterministic_algorithms(deterministic)
    try:
        for device in ("cpu", "cuda"):
            x = logits.to(device).requires_grad_()
            value = loss.to(device)(x, mask.to(device))
            results.append((value.cpu(), torch.autograd.grad(value, x)[0].cpu()))
    finally:
        torch.use_deterministic_algorithms(False)
        loss.cpu()
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("recipe", [SGD(0.01), AdamW(0.01)], ids=lambda r: type(r).__name__)
def test_a_step_on_cuda_never_waits(tmp_path, recipe, precision):
    settings = {"precision": precision, "ema_decay": 0.9, "device": "cuda"}
    run = make(tmp_path, danet(recompute=[2]), optimizer=recipe, **settings)
    pinned = [
        b._replace(image=b.image.pin_memory(), mask=b.mask.pin_memory()) for b in map(batch, (0, 1))
    ]
    for step in range(4):
        torch.cuda.synchronize()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that it does not find everything
            # The first steps load kernels and make the optimizer's state.
            torch.cuda.set_sync_debug_mode("error" if step >= 2 else "default")
        try:
            run.train_step(pinned, run.step)
        finally:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.cuda.set_sync_debug_mode("default")
        run.step += 1


@pytest.mark.slow
def test_a_compiled_step_on_cuda_is_the_eager_one(tmp_path):
    torch._dynamo.reset()
    ended = []
    for compile_it in (False, True):
        run = make(tmp_path, tiny(dropout=0.0), compile=compile_it, device="cuda")
        train(run, 2)
        ended.append(state(run))
    torch.testing.assert_close(*ended, rtol=1e-3, atol=1e-3)
