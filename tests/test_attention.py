"""The attention modules compute what the paper and the released code say, without the full map."""

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import LargestTensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.compiler import assume_constant_result
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

from danet.ops import arithmetic, channels, fused, tiles
from danet.ops.attention import ChannelAttention, PositionAttention
from danet.ops.channels import attend_to_channels
from danet.ops.fused import Kernel, attend_in_slices, candidates, choose_kernel, error_of
from danet.ops.tiles import attend_in_tiles

SIZES = [(6, 6), (5, 9), (1, 1), (2, 17)]


def position_formula(module, x):
    """Equations 1 and 2, one line each; builds the (B, N, N) map that the module avoids."""
    q, k, v = (conv(x).flatten(2) for conv in (module.query, module.key, module.value))
    weights = torch.einsum("bdi,bdj->bij", q, k).softmax(dim=-1)
    context = torch.einsum("bij,bcj->bci", weights, v)
    return module.gamma * context.view_as(x) + x


def variant_formula(module, x, similarity, scale):
    """The same with all that the paper does not have."""
    q, k, v = (conv(x).flatten(2).unbind() for conv in (module.query, module.key, module.value))
    contexts = []
    for query, key, value, image in zip(q, k, v, x, strict=True):  # (D, N), (D, N), (C, N)
        if similarity == "cosine":
            query, key = query / query.norm(dim=0), key / key.norm(dim=0)
        elif similarity == "whitened":
            query, key = query - query.mean(dim=1)[:, None], key - key.mean(dim=1)[:, None]
        values = value
        if module.register_keys is not None:
            key = torch.cat((key, module.register_keys.T), dim=1)
            values = torch.cat((value, module.register_values.T), dim=1)
        factor = {"none": 1, "sqrt": len(query) ** -0.5}.get(scale)
        energies = (module.log_scale.exp() if factor is None else factor) * (query.T @ key)
        context = values @ energies.softmax(dim=-1).T
        if module.unary is not None:
            context = context + (value @ module.unary(image).flatten().softmax(dim=0))[:, None]
        contexts.append(context)
    return module.gamma * torch.stack(contexts).view_as(x) + x


def channel_formula(module, x):
    """Equations 3 and 4; ``distance`` as the released code writes it: softmax(max - E)."""
    a = x.flatten(2)
    energy = torch.einsum("bin,bjn->bij", a, a)
    if module.energy == "distance":
        energy = energy.max(dim=-1, keepdim=True).values - energy
    context = torch.einsum("bij,bjn->bin", energy.softmax(dim=-1), a)
    return module.gamma * context.view_as(x) + x


def attention_formula(query, key, value):
    """softmax(query key^T) value in float64, with the whole map."""
    query, key, value = query.double(), key.double(), value.double()
    return (query @ key.transpose(1, 2)).softmax(dim=-1) @ value


def random_tokens(queries, keys, width, channels, *, batch=2, dtype=torch.float32, scale=1.0):
    """Draws queries, keys and values that want gradients."""
    shapes = (batch, queries, width), (batch, keys, width), (batch, keys, channels)
    return [(scale * torch.randn(shape)).to(dtype).requires_grad_() for shape in shapes]


def relative_error(got, expected):
    return ((got.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def assert_same_gradients(got, expected, inputs, *, rtol, atol):
    upstream = torch.randn_like(expected)
    for fast, slow in zip(
        torch.autograd.grad(got, inputs, upstream.to(got.dtype)),
        torch.autograd.grad(expected, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(fast, slow, rtol=rtol, atol=atol)


def errors(got, tokens):
    """Returns the relative errors of attention to these tokens and of its gradients."""
    expected, upstream = attention_formula(*tokens), torch.randn(got.shape).to(got.dtype)
    found = torch.autograd.grad(got, tokens, upstream)
    wanted = torch.autograd.grad(expected, tokens, upstream.double())
    assert {x.dtype for x in (got, *found)} == {tokens[0].dtype}
    return relative_error(got, expected), max(map(relative_error, found, wanted))


def error_of_tiles(tokens):
    """Returns the largest error of tiles and their gradients, in the norm, against float64."""
    exact = [t.detach().double().requires_grad_() for t in tokens]
    out, slow = attend_in_tiles(*tokens)[0], attention_formula(*exact)
    upstream = torch.randn_like(slow)
    found = [out, *torch.autograd.grad(out, tokens, upstream.to(out.dtype))]
    wanted = [slow, *torch.autograd.grad(slow, exact, upstream)]
    pairs = [(a.detach(), b.detach()) for a, b in zip(found, wanted, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


@pytest.fixture(params=["one tile", "tiles"])
def small_tiles(request, monkeypatch):
    """Runs a test with one tile for all, and with tiles of 35 energies, or of 5 rows."""
    if request.param == "tiles":
        monkeypatch.setattr(tiles, "ELEMENTS_PER_TILE", 35)
        monkeypatch.setattr(tiles, "SHORTEST_TILE", 5)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_position_attention_equals_the_formula_in_values_and_gradients(size):
    module = PositionAttention(16, reduction=4).double()
    torch.nn.init.constant_(module.gamma, 0.7)
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    fast, slow = module(x), position_formula(module, x)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    assert_same_gradients(fast, slow, [x, *module.parameters()], rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("unary", [False, True])
@pytest.mark.parametrize("scale", ["none", "sqrt", "learned"])
@pytest.mark.parametrize("similarity", ["dot", "cosine", "whitened"])
def test_variants_equal_their_formula_in_values_and_gradients(similarity, scale, unary, registers):
    module = PositionAttention(
        16, 4, similarity=similarity, scale=scale, unary=unary, registers=registers, gamma=0.7
    ).double()
    if registers:
        torch.nn.init.normal_(module.register_values)
    x = torch.randn(2, 16, 5, 9, dtype=torch.float64, requires_grad=True)
    fast, slow = module(x), variant_formula(module, x, similarity, scale)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    assert_same_gradients(fast, slow, [x, *module.parameters()], rtol=1e-9, atol=1e-9)


def test_the_defaults_are_the_paper_and_have_the_parameters_of_the_released_weights():
    convs = [f"{conv}.{part}" for conv in ("query", "key", "value") for part in ("weight", "bias")]
    module = PositionAttention(16)
    assert sorted(module.state_dict()) == sorted(["gamma", *convs])
    assert module.gamma.item() == ChannelAttention().gamma.item() == 0
    more = PositionAttention(16, 4, scale="learned", unary=True, registers=2).state_dict()
    assert more.keys() - module.state_dict().keys() == {
        *("log_scale", "unary.weight", "unary.bias", "register_keys", "register_values")
    }


def test_parameters_of_variants_start_where_the_docstring_says():
    module = PositionAttention(64, 4, scale="learned", registers=2, gamma=0.25)
    assert module.gamma.item() == ChannelAttention(gamma=0.25).gamma.item() == 0.25
    assert module.gamma.shape == (1,)
    assert module.log_scale.exp().item() == pytest.approx(1 / 4)  # of 16 channels
    assert not module.register_values.any()
    assert module.register_keys.any()
    cosine = PositionAttention(64, 4, similarity="cosine", scale="learned")
    assert cosine.log_scale.exp().item() == pytest.approx(10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("similarity", ["dot", "cosine", "whitened"])
def test_variants_in_half_precision_are_close_to_float32(similarity, dtype):
    module = PositionAttention(
        32, 2, similarity=similarity, scale="learned", unary=True, registers=2, gamma=1.0
    )
    x = 3 * torch.randn(2, 32, 9, 11) + 5  # a mean that whitening has to take away
    wanted = module.context(x)
    with torch.autocast("cpu", dtype=dtype):
        got = module.context(x)
    assert got.dtype == dtype
    assert relative_error(got, wanted) < 4 * torch.finfo(dtype).eps
    got.float().square().mean().backward()
    parts = [part for name, part in module.named_parameters() if name != "gamma"]
    assert all(torch.isfinite(part.grad).all() for part in parts)


@pytest.mark.parametrize("energy", ["distance", "similarity"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_channel_attention_equals_the_formula_in_values_and_gradients(energy, size):
    module = ChannelAttention(energy)
    torch.nn.init.constant_(module.gamma, -0.4)
    x = torch.randn(2, 8, *size, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    fast, slow = module(x), channel_formula(module, exact)
    # float32 rounds energies of up to 70 by up to 4e-6, and weights by that part of themselves.
    assert relative_error(fast, slow) < 2e-5
    (got,) = torch.autograd.grad(fast.sin().sum(), x)
    (expected,) = torch.autograd.grad(slow.sin().sum(), exact)
    assert relative_error(got, expected) < 2e-5


@pytest.mark.parametrize("module", [PositionAttention(16), ChannelAttention()], ids=type)
def test_a_fresh_module_is_the_identity_and_keeps_channels_last(module):
    x = torch.randn(2, 16, 5, 6).to(memory_format=torch.channels_last)
    assert torch.equal(module(x), x)
    torch.nn.init.ones_(module.gamma)
    assert module(x).is_contiguous(memory_format=torch.channels_last)
    assert relative_error(module(x), module(x.contiguous())) < 2e-5  # other kernels round otherwise
    torch.nn.init.zeros_(module.gamma)


def test_saturated_features_stay_finite_under_half_precision():
    # At 64 x 128 positions of features around 4, energies pass 65504, the end of float16.
    x = 4 * torch.rand(1, 16, 64, 128, dtype=torch.float16)
    module = ChannelAttention()
    torch.nn.init.ones_(module.gamma)
    with torch.autocast("cpu", dtype=torch.float16):
        assert torch.isfinite(module(x)).all()


@pytest.mark.parametrize("is_native", [False, True])
def test_gradients_of_energies_beyond_the_end_of_half_precision_stay_finite(monkeypatch, is_native):
    dtype = torch.float16 if is_native else torch.float32
    monkeypatch.setattr(channels, "product_dtype", lambda x: dtype if x.dtype != dtype else x.dtype)
    features = (0.02 * torch.randn(1, 4000, 8)).half().requires_grad_()
    upstream = (3e5 * features.detach().float()).half()  # the gradient of an energy is 1e5
    (got,) = torch.autograd.grad(attend_to_channels(features, 1.0), features, upstream)
    exact = features.detach().double().requires_grad_()
    weights = (exact.transpose(1, 2) @ exact).softmax(dim=-1)
    (wanted,) = torch.autograd.grad(exact @ weights.transpose(1, 2), exact, upstream.double())
    assert wanted.abs().max() < 65504
    assert relative_error(got, wanted) < 4e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_products_of_cuda_have_the_right_shapes_and_dtypes(dtype):
    """On tensors without storage, which need no CUDA; the numbers are in test_gpu.py."""
    with FakeTensorMode(), torch.no_grad():
        features = torch.empty(2, 144, 64, device="cuda", dtype=dtype)
        context, weights = channels._forward(features, -1.0)
        saved = SimpleNamespace(saved_tensors=(features, weights), sign=-1.0)
        gradient, _ = channels._AttendToChannels.backward(saved, context)
    assert (weights.shape, weights.dtype) == ((2, 64, 64), torch.float32)
    for tensor in (context, gradient):
        assert (tensor.shape, tensor.dtype) == (features.shape, dtype)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("queries", "keys"), [(12, 12), (3, 31), (29, 4), (1, 1)])
def test_tiles_differentiate_any_number_of_queries_and_keys(queries, keys):
    tokens = random_tokens(queries, keys, 3, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: attend_in_tiles(*t)[0], tokens)
    torch.testing.assert_close(attend_in_tiles(*tokens)[0], attention_formula(*tokens))


@pytest.mark.parametrize(
    "how",
    [
        lambda *t: attend_in_tiles(*t)[0],
        # The kernel of every device; those of CUDA are in test_gpu.py.
        lambda *t: attend_in_slices(*t, Kernel(SDPBackend.MATH, 16)),
        lambda *t: attend_in_slices(*t, Kernel(SDPBackend.MATH, 32, shares=False)),
    ],
)
def test_float32_is_exact_to_a_hundred_thousandth(how, monkeypatch):
    monkeypatch.setattr(tiles, "ELEMENTS_PER_TILE", 500 * 1300)  # three tiles, one of them short
    tokens = random_tokens(1300, 1300, 16, 64)
    assert max(errors(how(*tokens), tokens)) < 1e-5


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_adds_up_in_float32(dtype, autocast, is_native, monkeypatch):
    monkeypatch.setattr(arithmetic, "has_bfloat16", lambda device: is_native)
    monkeypatch.setattr(tiles, "ELEMENTS_PER_TILE", 400 * 600)  # two tiles
    tokens = random_tokens(600, 600, 16, 32, dtype=dtype)
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        value, gradient = errors(attend_in_tiles(*tokens)[0], tokens)
    # One rounding of the result, not one per term or per tile.
    assert value < torch.finfo(dtype).eps
    assert gradient < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.parametrize("scale", [0.6, 1.5], ids=["flat", "sharp"])
@pytest.mark.parametrize(
    ("width", "channels", "queries", "keys"),
    [(64, 512, 300, 300), (24, 48, 333, 333), (32, 128, 100, 777)],
)
@pytest.mark.parametrize("dtype", list(fused.BOUNDS), ids=str)
def test_tiles_keep_the_bounds_of_the_kernels(
    dtype, width, channels, queries, keys, scale, is_native, monkeypatch
):
    monkeypatch.setattr(arithmetic, "has_bfloat16", lambda device: is_native)
    monkeypatch.setattr(tiles, "ELEMENTS_PER_TILE", 40_000)
    tokens = random_tokens(queries, keys, width, channels, dtype=dtype, scale=scale)
    assert error_of_tiles(tokens) < fused.BOUNDS[dtype]


def test_energies_beyond_the_end_of_half_precision_stay_finite():
    tokens = random_tokens(40, 40, 64, 8, dtype=torch.float16, scale=100.0)  # energies near 1e6
    context = attend_in_tiles(*tokens)[0]
    assert torch.isfinite(context).all()
    assert relative_error(context, attention_formula(*tokens)) < 2e-3


def test_no_tensor_grows_with_the_square_of_the_positions_and_autograd_keeps_no_map():
    tokens = [t.detach() for t in random_tokens(4096, 4096, 4, 8, batch=1, scale=0.3)]
    with LargestTensor() as largest:
        context, log_sum = tiles._forward(*tokens)
        tiles._backward(torch.ones_like(context), *tokens, context, log_sum)
    assert largest.numel == tiles.ELEMENTS_PER_TILE == 4096 * 256
    x, kept = torch.randn(1, 8, 48, 48, requires_grad=True), []  # N = 2304
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel()) or t, lambda t: t
    ):
        PositionAttention(8, reduction=4)(x)
    assert max(kept) == 8 * 2304


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "make",
    [
        lambda: PositionAttention(16, 4),
        lambda: PositionAttention(16, 4, similarity="cosine", scale="learned", registers=2),
        lambda: PositionAttention(16, 4, similarity="whitened", unary=True),
        ChannelAttention,
    ],
)
def test_compiled_modules_compute_the_same_without_a_break_in_the_graph(make, backend):
    torch._dynamo.reset()  # what other tests compiled counts for the limit of recompilations
    module = make()
    torch.nn.init.constant_(module.gamma, 0.5)
    x = torch.randn(2, 16, 5, 6, requires_grad=True)
    compiled = torch.compile(module, backend=backend, fullgraph=True)
    # Other kernels than in eager mode: not bits, but what float32 allows; see above.
    assert relative_error(compiled(x), module(x)) < 2e-5
    with torch.autocast("cpu", torch.bfloat16):
        half = x.detach().bfloat16().requires_grad_()
        assert relative_error(compiled(half), module(half)) < 2e-2
    inputs = [x, *module.parameters()]
    assert_same_gradients(compiled(x), module(x), inputs, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck's own
def test_the_operators_keep_the_rules_of_torch_and_count_their_work():
    torch.library.opcheck(torch.ops.danet.attend_in_tiles.default, random_tokens(6, 9, 3, 4))
    tokens = [t.detach().to("meta").requires_grad_() for t in random_tokens(6, 9, 3, 4)]
    context = attend_in_tiles(*tokens)[0]
    assert context.shape == (2, 6, 4)
    gradients = torch.autograd.grad(context.sum(), tokens)
    assert [g.shape for g in gradients] == [t.shape for t in tokens]
    with FlopCounterMode(display=False) as counter:
        attend_in_tiles(*random_tokens(10, 20, 4, 8, batch=1))[0].sum().backward()
    forward, backward = 2 * 10 * 20 * (4 + 8), 2 * 10 * 20 * (3 * 4 + 2 * 8)
    assert counter.get_total_flops() == forward + backward


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ChannelAttention("dot"), "energy='dot' is not one of distance, similarity"),
        (
            lambda: PositionAttention(16, similarity="l2"),
            "similarity='l2' is not one of dot, cosine, whitened",
        ),
        (lambda: PositionAttention(16, scale="log"), "scale='log' is not one of none, sqrt, lear"),
        (lambda: PositionAttention(16, registers=-1), "registers=-1 is not at least 0"),
        (lambda: PositionAttention(20), "channels=20 is not divisible by reduction=8"),
    ],
)
def test_a_bad_value_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# The choice of a fused kernel


CUDNN, FLASH, EFFICIENT = (
    getattr(SDPBackend, f"{name}_ATTENTION") for name in ("CUDNN", "FLASH", "EFFICIENT")
)
CUDA = torch.device("cuda", 0)


@pytest.fixture
def on_cuda(monkeypatch):
    """Pretends that there is a CUDA device; returns what is said of each kernel and asked."""
    answers, asked = {}, []

    def error_of(kernel, *case):
        asked.append(kernel)
        answer = answers.get(kernel.backend, 0.0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(fused, "error_of", error_of)
    monkeypatch.setattr(fused, "has_bfloat16", lambda device: True)
    fused._first_that_works.cache_clear()
    yield answers, asked
    fused._first_that_works.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "width", "channels", "kernels"),
    [
        (
            torch.bfloat16,
            64,
            512,
            [(CUDNN, 128), (CUDNN, 128), (FLASH, 64), (EFFICIENT, 128), (EFFICIENT, 64)],
        ),
        (torch.float32, 64, 512, [(EFFICIENT, 128), (EFFICIENT, 64)]),
        (
            torch.float16,
            24,
            48,
            [(CUDNN, 48), (CUDNN, 48), (FLASH, 24), (EFFICIENT, 48), (EFFICIENT, 24)],
        ),
        (torch.float32, 8, 8 * 31, [(EFFICIENT, 8), (EFFICIENT, 8)]),
        (torch.bfloat16, 20, 160, []),  # kernels need multiples of 8
        (torch.float64, 64, 512, []),
    ],
)
def test_wide_slices_come_first(dtype, width, channels, kernels):
    assert [kernel[:2] for kernel in candidates(dtype, width, channels)] == kernels


def test_a_kernel_is_tried_once_and_chosen_if_it_is_right(on_cuda, caplog):
    answers, asked = on_cuda
    answers[CUDNN] = RuntimeError("No available kernel")
    answers[FLASH] = 0.3
    caplog.set_level("INFO")
    for _ in range(2):
        assert choose_kernel(CUDA, torch.bfloat16, 64, 512) == (EFFICIENT, 128, True)
    assert [kernel.backend for kernel in asked] == [CUDNN, CUDNN, FLASH, EFFICIENT]
    assert "not flash_attention in slices of 64, whose error is 3.0e-01" in caplog.text
    assert "values of 512: efficient_attention in slices of 128" in caplog.text
    module = PositionAttention(512)
    assert module.kernel(CUDA, torch.bfloat16) == "efficient_attention in slices of 128"
    assert module.kernel(torch.device("cpu"), torch.bfloat16) == "tiles"
    answers[EFFICIENT] = float("nan")
    assert choose_kernel(CUDA, torch.float32, 64, 512) is None
    answers[EFFICIENT] = torch.OutOfMemoryError("no memory")  # says nothing about the kernel
    with pytest.raises(torch.OutOfMemoryError):
        choose_kernel(CUDA, torch.float32, 64, 256)


def test_deterministic_runs_have_a_choice_of_their_own(on_cuda):
    _, asked = on_cuda
    choose_kernel(CUDA, torch.bfloat16, 64, 512)
    torch.use_deterministic_algorithms(True)
    try:
        choose_kernel(CUDA, torch.bfloat16, 64, 512)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(asked) == 2


@pytest.mark.parametrize("backend", [SDPBackend.MATH, CUDNN])
def test_the_trial_measures_the_error_of_a_kernel(backend):
    trial = partial(error_of, Kernel(backend, 16), torch.device("cpu"), torch.float32, 16, 64)
    before = torch.random.get_rng_state()
    refused = nullcontext() if backend == SDPBackend.MATH else pytest.raises(RuntimeError)
    with refused, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert 0 < trial() < 1e-6
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_chosen_kernel_is_used_and_compiles_without_a_break(monkeypatch):
    kernel = Kernel(SDPBackend.MATH, 8)
    monkeypatch.setattr(fused, "choose_kernel", assume_constant_result(lambda *case: kernel))
    monkeypatch.setattr(tiles, "attend_in_tiles", None)
    torch._dynamo.reset()  # what other tests compiled counts for the limit of recompilations
    module = PositionAttention(16, 4)
    torch.nn.init.constant_(module.gamma, 0.5)
    x = torch.randn(2, 16, 5, 6)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(x), position_formula(module, x)) < 2e-5
