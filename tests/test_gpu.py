"""What only a CUDA device can show: the numbers of the CPU, mixed precision, resume, no waiting."""

import json
import warnings

import pytest
import torch
from conftest import TINY, batch, tiny, tool
from conftest import make_trainer as make
from test_attention import assert_same_gradients, channel_formula, position_formula
from test_trainer import danet, state, train

from danet.engine.optimizer import SGD, AdamW
from danet.losses import OHEM, CrossEntropy
from danet.ops.attention import ChannelAttention, PositionAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]
ON_CUDA = [s for s in TINY if not s.startswith(("trainer.device", "trainer.precision"))]


@pytest.mark.parametrize(
    ("module", "formula"),
    [(PositionAttention(64), position_formula), (ChannelAttention(), channel_formula)],
    ids=["position", "channel"],
)
def test_attention_on_cuda_equals_the_formula(module, formula):
    module = module.double().cuda()
    torch.nn.init.constant_(module.gamma, 0.5)
    x = torch.randn(2, 64, 40, 60, dtype=torch.float64, device="cuda", requires_grad=True)
    fast, slow = module(x), formula(module, x)
    # The channel module computes its energy in float32 on purpose.
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4)
    assert_same_gradients(fast, slow, [x], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "float32"])
def test_a_run_on_cuda_trains_resumes_and_is_scored(tmp_path, precision):
    settings = [*ON_CUDA, "trainer.device=cuda", f"trainer.precision={precision}"]
    run = [*settings, "trainer.steps=8", "run.dir=r"]
    done = tool("train", *run, "trainer.stop_at=4", cwd=tmp_path)
    assert f"cuda:0, {precision}" in done.stdout
    tool("train", "resume=r/last.pt", cwd=tmp_path)
    last = json.loads((tmp_path / "r/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 8
    for device in ("cuda", "cpu"):
        scored = ["checkpoint=r/last.pt", f"device={device}", f"output={device}"]
        tool("eval", *scored, cwd=tmp_path)
        metrics = json.loads((tmp_path / device / "metrics.json").read_text())
        # Convolutions of another device round otherwise, and a few pixels tip over.
        assert metrics["miou"] == pytest.approx(last["miou"], abs=5e-3)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("loss", [CrossEntropy([1.0, 2.0, 0.5]), OHEM(min_kept=50)], ids=str)
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
