"""What only a CUDA device can show: the same numbers as the CPU, mixed precision, resume."""

import json

import pytest
import torch
from conftest import TINY, tool
from test_attention import channel_formula, position_formula

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
    upstream = torch.randn_like(fast)
    torch.testing.assert_close(
        torch.autograd.grad(fast, x, upstream),
        torch.autograd.grad(slow, x, upstream),
        rtol=1e-3,
        atol=1e-3,
    )


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
