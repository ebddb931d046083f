"""The losses equal their formulas, pixel by pixel and in pieces, and IGNORE never counts."""

import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, LargestTensor
from test_config import compose

from danet.config.build import make
from danet.config.validate import check
from danet.losses import (
    OHEM,
    CrossEntropy,
    CrossEntropyPlus,
    DeepSupervision,
    Dice,
    Focal,
    LovaszSoftmax,
    RegionMutualInformation,
    WeightedSum,
    mean_of,
)
from danet.ops import cross_entropy
from danet.ops.cross_entropy import cross_entropy_sum
from danet.ops.resize import resize, resize_backward
from danet.types import IGNORE, SegmentationOutput

K = 4
NEAR = {"rel": 1e-5, "abs": 1e-7}
"""Of a loss in float32 beside its formula in float64: by ten times what kernels may round."""
WEIGHTS = (0.5, 2.0, 0.0, 1.5)
LOSSES = {
    "cross entropy": CrossEntropy(),
    "weighted cross entropy": CrossEntropy(WEIGHTS),
    "smoothed cross entropy": CrossEntropy(WEIGHTS, label_smoothing=0.2),
    "focal": Focal(),
    "weighted focal": Focal(0.5, class_weights=WEIGHTS),
    "ohem": OHEM(0.6, min_kept=20),
    "ohem over labelled": OHEM(0.6, min_kept=20, normalise="labelled", class_weights=WEIGHTS),
    "smoothed ohem": OHEM(0.6, min_kept=20, class_weights=WEIGHTS, label_smoothing=0.2),
    "dice": Dice(),
    "dice, not smooth": Dice(smooth=0),
    "lovasz": LovaszSoftmax(),
    # In float32, logits that are upsampled twice differ by more than the default epsilon bears.
    "region mutual information": RegionMutualInformation(stride=2, epsilon=1e-2),
    "the same of maxima": RegionMutualInformation(2, 1, pooling="max", epsilon=1e-2),
    "sum": WeightedSum([CrossEntropy(), Dice(), LovaszSoftmax()], [1.0, 0.5, 2.0]),
    "cross entropy and Dice": CrossEntropyPlus(Dice(), WEIGHTS, label_smoothing=0.2),
}


@pytest.fixture(params=LOSSES, ids=str)
def loss(request):
    return LOSSES[request.param]


@pytest.fixture
def logits():
    return (2 * torch.randn(2, K, 5, 7)).requires_grad_()


@pytest.fixture
def mask():
    """Classes 0..2 (3 never occurs) and about a fifth IGNORE, all in the second half too."""
    mask = torch.randint(0, K - 1, (2, 5, 7), dtype=torch.uint8)
    mask[torch.rand(2, 5, 7) < 0.2] = IGNORE
    assert 0 < (mask == IGNORE).sum() < mask.numel() / 2
    return mask


def pixels(logits, mask):
    """Yields (place, probabilities of the classes, true class) of every labelled pixel."""
    for b, y, x in (mask != IGNORE).nonzero().tolist():
        powers = [math.exp(v) for v in logits[b, :, y, x].tolist()]
        yield (b, y, x), [p / sum(powers) for p in powers], int(mask[b, y, x])


def slow_cross_entropy(logits, mask, weights=(1.0,) * K):
    terms = [(weights[truth], -math.log(p[truth])) for _, p, truth in pixels(logits, mask)]
    return sum(w * term for w, term in terms) / sum(w for w, _ in terms)


def slow_ohem(logits, mask, *, threshold, min_kept, normalise, weights):
    easy = {place: p[truth] for place, p, truth in pixels(logits, mask)}
    kth = sorted(easy.values())[min(min_kept, len(easy)) - 1]
    kept = {place for place, p in easy.items() if p <= max(threshold, kth)}
    above = below = 0.0
    for place, p, truth in pixels(logits, mask):
        if place in kept:
            above -= weights[truth] * math.log(p[truth])
        if place in kept or normalise == "labelled":
            below += weights[truth]
    return above / below if below else 0.0  # a lone kept pixel may be of the class of weight 0


def slow_focal(logits, mask, gamma, weights=(1.0,) * K):
    terms = [
        (weights[truth], -((1 - p[truth]) ** gamma) * math.log(p[truth]))
        for _, p, truth in pixels(logits, mask)
    ]
    return sum(w * term for w, term in terms) / sum(w for w, _ in terms)


def slow_smoothed(logits, mask, share, weights=(1.0,) * K):
    above = below = 0.0
    for _, p, truth in pixels(logits, mask):
        for c in range(K):
            q = share / K + (1 - share) * (c == truth)
            above -= weights[c] * q * math.log(p[c])
        below += weights[truth]
    return above / below


def slow_dice(logits, mask, smooth):
    found = list(pixels(logits, mask))
    dice = []
    for c in {truth for *_, truth in found}:
        overlap = sum(p[c] for _, p, truth in found if truth == c)
        total = sum(p[c] for _, p, _ in found) + sum(truth == c for *_, truth in found)
        dice.append((2 * overlap + smooth) / (total + smooth))
    return 1 - sum(dice) / len(dice)


def jaccard_loss(truth, wrong):
    """Returns 1 - IoU of a class when the pixels in ``wrong`` are predicted wrongly."""
    predicted = {i for i, is_class in enumerate(truth) if is_class != (i in wrong)}
    actual = {i for i, is_class in enumerate(truth) if is_class}
    return 1 - len(predicted & actual) / len(predicted | actual)


def slow_lovasz(logits, mask):
    """The definition: errors in falling order, each times what its pixel adds to 1 - IoU."""
    found = list(pixels(logits, mask))
    losses = []
    for c in {truth for *_, truth in found}:
        truth = [t == c for *_, t in found]
        errors = [1 - p[c] if t == c else p[c] for _, p, t in found]
        order = sorted(range(len(errors)), key=lambda i: -errors[i])
        total = 0.0
        for rank, i in enumerate(order):
            before, after = set(order[:rank]), set(order[: rank + 1])
            total += errors[i] * (jaccard_loss(truth, after) - jaccard_loss(truth, before))
        losses.append(total)
    return sum(losses) / len(losses)


def slow_rmi(logits, mask, *, region=3, stride=4, pooling="average", epsilon=1e-6):
    """The paper's steps for one image and class at a time, in float64; differentiable."""
    probabilities, total, images = logits.double().softmax(dim=1), 0.0, 0
    height, width = mask.shape[1:]
    for b in range(len(mask)):
        images += bool((mask[b] != IGNORE).any())
        rows, columns = (max(region, math.ceil(side / stride)) for side in (height, width))
        for c in range(logits.shape[1]):
            cells = {}  # place -> probability and truth; those without a labelled pixel are absent
            for y, x in product(range(height), range(width)):
                if mask[b, y, x] != IGNORE:
                    truth = torch.tensor(float(mask[b, y, x] == c), dtype=torch.float64)
                    pair = torch.stack([probabilities[b, c, y, x], truth])
                    cells.setdefault((y // stride, x // stride), []).append(pair)
            for place, found in cells.items():
                pairs = torch.stack(found)
                cells[place] = pairs.mean(dim=0) if pooling == "average" else pairs.amax(dim=0)
            corners = product(range(rows - region + 1), range(columns - region + 1))
            places = list(product(range(region), range(region)))
            windows = [[cells.get((y + i, x + j)) for i, j in places] for y, x in corners]
            windows = [window for window in windows if any(v is not None for v in window)]
            total = total + one_class(windows, epsilon) / (2 * region**2)
    return total / max(1, images)


def one_class(windows, epsilon):
    """log det(I + M / epsilon) of windows: lists of (probability, truth), or None if ignored."""
    if not windows:
        return torch.zeros((), dtype=torch.float64)
    columns = []
    for values in zip(*windows, strict=True):
        known = [v for v in values if v is not None]
        mean = sum(known) / len(known) if known else 0.0
        columns.append(
            torch.stack([torch.zeros(2).double() if v is None else v - mean for v in values])
        )
    p, y = torch.stack(columns, dim=1).unbind(dim=-1)  # (N, d) each, in float64
    n, one = len(windows), torch.eye(p.shape[1], dtype=torch.float64)
    inverse = torch.linalg.inv(p.T @ p / n + epsilon * one)
    conditional = y.T @ y / n - (y.T @ p / n) @ inverse @ (p.T @ y / n)
    return torch.linalg.slogdet(one + conditional / epsilon).logabsdet


# Equal to the formula

ONES = (1.0,) * K
RULES = [(0.3, 1), (0.3, 45), (0.9, 1), (0.001, 1), (0.001, 7), (0.01, 10**6), (1.0, 1)]
FORMULAS = [
    (CrossEntropy(), slow_cross_entropy),
    (CrossEntropy(WEIGHTS), partial(slow_cross_entropy, weights=WEIGHTS)),
    *((Dice(s), partial(slow_dice, smooth=s)) for s in (0, 1.0, 10.0)),
    (LovaszSoftmax(), slow_lovasz),
    *((Focal(g), partial(slow_focal, gamma=g)) for g in (0.0, 0.5, 1.0, 2.0, 5.0)),
    (Focal(1.5, class_weights=WEIGHTS), partial(slow_focal, gamma=1.5, weights=WEIGHTS)),
    (CrossEntropy(label_smoothing=0.1), partial(slow_smoothed, share=0.1)),
    (
        CrossEntropy(WEIGHTS, label_smoothing=0.3),
        partial(slow_smoothed, share=0.3, weights=WEIGHTS),
    ),
]
for (threshold, min_kept), normalise, weights in product(
    RULES, ("kept", "labelled"), (ONES, WEIGHTS)
):
    rule = {"threshold": threshold, "min_kept": min_kept, "normalise": normalise}
    ours = OHEM(**rule, class_weights=None if weights is ONES else weights)
    FORMULAS.append((ours, partial(slow_ohem, **rule, weights=weights)))


@pytest.mark.parametrize(("loss", "formula"), FORMULAS)
def test_a_loss_equals_its_formula_pixel_by_pixel(logits, mask, loss, formula):
    assert loss(logits, mask).item() == pytest.approx(formula(logits, mask), **NEAR)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_label_smoothing_is_that_of_torch_with_its_gradient(logits, mask, weights, share):
    found = CrossEntropy(weights, label_smoothing=share)(logits, mask)
    factors = None if weights is None else torch.tensor(weights)
    options = {"weight": factors, "ignore_index": IGNORE, "label_smoothing": share}
    wanted = F.cross_entropy(logits, mask.long(), **options)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(*(torch.autograd.grad(x, logits)[0] for x in (found, wanted)))


RMI_CASES = [
    {},
    {"stride": 1},
    {"stride": 2},
    {"stride": 2, "pooling": "max"},
    {"stride": 1, "region": 2},
    {"stride": 3, "region": 1},
    {"stride": 1, "region": 4},
]
# With few windows the inverse in the formula loses the digits that a small epsilon would need.
RMI_CASES = [
    *product([{"epsilon": 1e-3, **case} for case in RMI_CASES], [(9, 14), (3, 3), (2, 11)]),
    ({}, (30, 41)),
]


@pytest.mark.parametrize("labels", ["all", "some", "one class", "one image", "none"])
@pytest.mark.parametrize(("case", "size"), RMI_CASES, ids=str)
def test_region_mutual_information_and_its_gradient_are_those_of_the_paper(case, size, labels):
    logits = (2 * torch.randn(2, K, *size, dtype=torch.float64)).requires_grad_()
    mask = torch.randint(0, K - 1, (2, *size), dtype=torch.uint8)
    mask[torch.rand(2, *size) < {"all": 0, "some": 0.3, "none": 1}.get(labels, 0.1)] = IGNORE
    if labels == "one class":
        mask[mask != IGNORE] = 2
    elif labels == "one image":
        mask[1] = IGNORE
    found, wanted = RegionMutualInformation(**case)(logits, mask), slow_rmi(logits, mask, **case)
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)
    gradient = torch.autograd.grad(found, logits)[0]
    if labels == "none":
        assert found == 0
        assert not gradient.any()
    else:
        expected = torch.autograd.grad(wanted, logits)[0]
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("align_corners", [True, False])
def test_deep_supervision_weighs_and_upsamples_each_output(mask, align_corners):
    main, position, channel = (torch.randn(2, K, *size) for size in ((5, 7), (2, 3), (3, 2)))
    output = SegmentationOutput(main, {"position": position, "channel": channel})
    weights = {"position": 0.5, "channel": 0.25, "not given": 7.0}
    for other in (CrossEntropy(), Dice(), None):
        criterion = DeepSupervision(OHEM(min_kept=5), other, weights, align_corners=align_corners)
        terms, fine = criterion(output, mask), other or OHEM(min_kept=5)
        assert list(terms) == ["main", "position", "channel"]
        torch.testing.assert_close(terms["main"], OHEM(min_kept=5)(main, mask))
        for name, logits in output.auxiliary.items():
            upsampled = resize(logits, (5, 7), align_corners=align_corners)
            torch.testing.assert_close(terms[name], weights[name] * fine(upsampled, mask))


@pytest.fixture(params=[1, 2 * K * 5 * 7, 2**24], ids=["one image", "two images", "all"])
def _chunks(request, monkeypatch):
    monkeypatch.setitem(cross_entropy.ELEMENTS_PER_CHUNK, "cpu", request.param)


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("align_corners", [True, False])
def test_coarse_logits_cost_what_they_cost_upsampled(loss, mask, align_corners):
    coarse, mask = torch.randn(3, K, 3, 2, requires_grad=True), mask[[0, 0, 1]]
    mask[1] = IGNORE  # between images with labels
    found = loss(coarse, mask, align_corners=align_corners)
    fine = resize(coarse, (5, 7), align_corners=align_corners)
    wanted = loss(fine, mask, align_corners=not align_corners)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(found, coarse), torch.autograd.grad(wanted, coarse)
    )
    with torch.no_grad():
        torch.testing.assert_close(loss(coarse, mask, align_corners=align_corners), found.detach())


@pytest.mark.usefixtures("_chunks")
@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("smoothing", [None, (0.3, 0.0, 0.1, 0.2)])
def test_the_gradient_is_that_of_finite_differences(mask, align_corners, gamma, smoothing):
    logits = torch.randn(2, K, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, 7, dtype=torch.float64) * (mask != IGNORE)
    smoothing = smoothing if smoothing is None else torch.tensor(smoothing)

    def loss(x):
        options = {"gamma": gamma, "smoothing": smoothing, "align_corners": align_corners}
        return cross_entropy_sum(x, mask.long(), weights, **options)

    assert torch.autograd.gradcheck(loss, logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_logits_get_the_float32_gradient_rounded_once(logits, dtype):
    half, target = logits.detach().to(dtype).requires_grad_(), torch.randint(0, K, (2, 33, 49))
    wide = half.detach().float().contiguous(memory_format=torch.channels_last).requires_grad_()
    wanted = CrossEntropy()(wide, target)  # in any memory order
    with torch.autocast("cpu", dtype=dtype):
        found = CrossEntropy()(half, target)
    assert torch.equal(found, wanted)
    (gradient,), (expected,) = torch.autograd.grad(found, half), torch.autograd.grad(wanted, wide)
    assert torch.equal(gradient, expected.to(dtype))


@pytest.mark.parametrize(
    "loss",
    [CrossEntropy((1.0,) * 19), CrossEntropy(label_smoothing=0.1), Focal(), OHEM()],
    ids=["weighted", "smoothed", "focal", "ohem"],
)
def test_fine_logits_of_a_batch_never_exist(loss, monkeypatch):
    monkeypatch.setitem(cross_entropy.ELEMENTS_PER_CHUNK, "cpu", 2 * 19 * 128 * 96)
    logits = torch.randn(4, 19, 16, 12, requires_grad=True)
    mask = torch.randint(0, 19, (4, 128, 96), dtype=torch.uint8)
    kept = []
    keep = torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    )
    with LargestTensor() as largest, keep:
        loss(logits, mask).backward()
    assert largest.numel == 2 * 19 * 128 * 96, "two of four images, as the bound says"
    assert max(kept) == logits.numel(), "only the coarse gradient waits for backward"


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize(
    ("coarse", "fine"),
    [((5, 9), (33, 65)), ((4, 4), (4, 9)), ((1, 3), (8, 20)), ((9, 8), (5, 3)), ((7, 7), (7, 7))],
    ids=["up", "along one axis", "of a row", "down", "nothing"],
)
def test_the_gradient_of_resizing_is_that_of_torch(coarse, fine, align_corners):
    x = torch.randn(2, 3, *coarse, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, *fine, dtype=torch.float64)
    (wanted,) = torch.autograd.grad(resize(x, fine, align_corners=align_corners), x, upstream)
    found = resize_backward(upstream, coarse, align_corners=align_corners)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("choice", ["cross_entropy", "ohem", "focal", "dice", "lovasz", "rmi"])
def test_a_configured_loss_upsamples_as_the_network_does(choice):
    for align_corners in (True, False):
        config = check(compose(f"loss={choice}", f"model.align_corners={align_corners}"))
        assert make(config.loss, "loss").align_corners is align_corners


# Hard cases


@pytest.mark.parametrize("confidence", [0.0, 30.0, 200.0, 20_000.0])
def test_ohem_keeps_enough_where_probabilities_are_tied_or_saturated(confidence):
    mask = torch.randint(0, K, (2, 6, 6))
    logits = confidence * F.one_hot(mask, K).movedim(-1, 1).float()
    mask[0, 0] = IGNORE
    losses = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none")
    for min_kept in (1, 10, 65, 66):
        kept = OHEM(0.1, min_kept).hard_pixels(losses, mask != IGNORE)
        assert torch.equal(kept, mask != IGNORE), "all labelled pixels are tied, so all are kept"


def test_ohem_ranks_saturated_pixels_by_their_logarithms():
    # In float32 all these probabilities round to 0 or nearly; their logarithms are distinct.
    logits = torch.zeros(1, 2, 1, 6)
    logits[0, 1] = torch.tensor([120.0, 150.0, 130.0, 160.0, 140.0, -5.0])
    mask = torch.zeros(1, 1, 6, dtype=torch.long)
    losses = F.cross_entropy(logits, mask, reduction="none")
    kept = OHEM(threshold=1e-38, min_kept=2).hard_pixels(losses, mask != IGNORE)
    assert kept.flatten().tolist() == [True, True, True, True, True, False]
    assert OHEM(threshold=1e-38, min_kept=6).hard_pixels(losses, mask != IGNORE).all()


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("margin", [-20_000.0, -200.0, -14.0, 0.0, 5.0, 30.0, 200.0, 20_000.0])
def test_focal_loss_and_gradient_are_exact_where_probabilities_saturate(gamma, margin):
    logits = torch.tensor([margin, 0.0]).view(1, 2, 1, 1).requires_grad_()
    found = Focal(gamma)(logits, torch.zeros(1, 1, 1, dtype=torch.long))
    (gradient,) = torch.autograd.grad(found, logits)
    odds = math.exp(min(-margin, 700.0))  # (1 - p) / p
    rest, nll = odds / (1 + odds), math.log1p(odds) if margin > -700 else -margin
    assert found.item() == pytest.approx(rest**gamma * nll, **NEAR)
    slope = rest**gamma + gamma * rest ** (gamma - 1) * (1 - rest) * nll if rest else 0.0
    assert gradient.flatten().tolist() == pytest.approx([-slope * rest, slope * rest], **NEAR)


def test_a_class_without_weight_cannot_be_smoothed_into_infinity(logits, mask):
    loss, other = CrossEntropy((1.0, 1.0, 0.0, 1.0), label_smoothing=0.2), torch.full_like(mask, 2)
    alone = loss(logits, other)  # torch divides by the weights of these pixels, which are 0
    assert alone == 0
    assert not torch.autograd.grad(alone, logits)[0].any()
    both = [loss.parts(logits, m)[0] for m in (mask, other)]
    whole = loss.parts(torch.cat([logits, logits]), torch.cat([mask, other]))
    divisor = both[0].divisor + both[1].divisor
    together = sum(mean_of([part], [divisor]) for part in both)
    torch.testing.assert_close(together, mean_of(whole))


def test_exact_windows_cost_next_to_nothing_and_classes_that_do_not_occur_nothing():
    mask = torch.randint(0, K - 1, (1, 40, 40), dtype=torch.uint8)
    truth = F.one_hot(mask.long(), K).movedim(-1, 1).double()
    loss = RegionMutualInformation(stride=1)
    assert 0 < loss(100 * truth, mask) <= (K - 1) * math.log(2) / 2
    # A class that does not occur is no part of the sum, whatever is predicted for it.
    assert loss(torch.randn(1, K, 40, 40), torch.zeros_like(mask)) == 0


def test_the_form_of_what_is_ignored_is_no_structure():
    mask = torch.ones(1, 40, 40, dtype=torch.uint8)
    mask[:, 10:30, 15:] = IGNORE
    logits = torch.randn(1, K, 40, 40)
    # Filled with zeros, ignored pixels would give the truth an outline.
    assert RegionMutualInformation(stride=1)(logits, mask) == 0


@pytest.mark.bad_input("L13")
def test_a_batch_without_labels_costs_nothing_and_breaks_nothing(loss, logits):
    value = loss(logits, torch.full((2, 5, 7), IGNORE, dtype=torch.uint8))
    (gradient,) = torch.autograd.grad(value, logits)
    assert value.item() == 0
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_ignored_pixels_get_no_gradient_and_change_nothing(loss, logits, mask):
    ignored = (mask == IGNORE).unsqueeze(1).expand_as(logits)
    value = loss(logits, mask)
    (gradient,) = torch.autograd.grad(value, logits)
    assert (gradient[ignored] == 0).all()
    assert (gradient[~ignored] != 0).any()
    other = torch.where(ignored, 10 * torch.randn_like(logits), logits)
    torch.testing.assert_close(loss(other, mask), value)


def test_half_precision_is_computed_in_float32_and_any_whole_mask_is_taken(loss, logits, mask):
    half = logits.detach().bfloat16()
    value = loss(half, mask)
    assert value.dtype == torch.float32
    assert torch.equal(value, loss(half.float(), mask))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(value, loss(half, mask))
    for dtype in (torch.int16, torch.int32, torch.int64):
        assert torch.equal(loss(half, mask.to(dtype)), value)


def test_compiled_losses_are_the_eager_ones_without_a_break_in_the_graph(mask):
    names = ["smoothed ohem", "weighted focal", "region mutual information"]
    loss = WeightedSum([LOSSES[name] for name in names], [1.0, 1.0, 1.0])
    coarse = torch.randn(2, K, 3, 2, requires_grad=True)
    eager = loss(coarse, mask)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)(coarse, mask)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(
        torch.autograd.grad(compiled, coarse), torch.autograd.grad(eager, coarse)
    )


def test_cross_entropy_plus_another_loss_is_their_weighted_sum(logits, mask):
    loss = CrossEntropyPlus(Dice(), WEIGHTS, label_smoothing=0.2, weights=(0.5, 2.0))
    parts = CrossEntropy(WEIGHTS, label_smoothing=0.2)(logits, mask), Dice()(logits, mask)
    assert loss(logits, mask).item() == pytest.approx((0.5 * parts[0] + 2 * parts[1]).item())


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "configs/loss").glob("*.yaml")))
def test_class_weights_have_one_key_and_reach_every_output_with_every_loss(name):
    weights = [0.5] * 10 + [2.0]
    experiment = compose("experiment=camvid_pretrained", f"loss={name}", "data.root=/data")
    experiment.loss.main.class_weights = weights
    criterion = make(check(experiment).loss, "loss")
    for loss in (criterion.main, criterion.auxiliary):
        loss = loss.losses[0] if isinstance(loss, WeightedSum) else loss
        assert loss.class_weights.tolist() == weights


def test_class_weights_move_with_the_loss_and_are_not_stored():
    criterion = DeepSupervision(CrossEntropy(WEIGHTS), OHEM(class_weights=WEIGHTS), {})
    assert criterion.state_dict() == {}
    criterion.to("meta")
    assert criterion.main.class_weights.device.type == "meta"
    assert criterion.auxiliary.class_weights.device.type == "meta"


# Mistakes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: OHEM(math.nan), "threshold=nan is not a probability"),
        (lambda: OHEM(normalise="all"), "normalise='all' is neither 'kept' nor 'labelled'"),
        (lambda: CrossEntropy(label_smoothing=1.0), r"label_smoothing=1.0 is not a number in \[0"),
        (lambda: OHEM(label_smoothing=-0.1), r"label_smoothing=-0.1 is not a number in \[0"),
        (lambda: Focal(-1), "gamma=-1 is not a finite number >= 0"),
        (lambda: RegionMutualInformation(0), "region=0 is not at least 1"),
        (lambda: RegionMutualInformation(stride=-1), "stride=-1 is not at least 1"),
        (lambda: RegionMutualInformation(pooling="min"), "pooling='min' is neither 'average' nor"),
        (lambda: RegionMutualInformation(epsilon=0), "epsilon=0 is not a number of at least 1e-9"),
        (lambda: WeightedSum([Dice()], [1, 2]), "1 losses and 2 weights"),
        (lambda: DeepSupervision(Dice(), weights={"p": math.nan}), r"weights.p=nan"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda m: m.float(), r"the mask is torch.float32; it must hold whole class"),
        (lambda m: m[:, :, 1:], r"mask \(2, 5, 6\) does not fit logits \(2, 4, 5, 7\)"),
        (lambda m: m[:1], r"mask \(1, 5, 7\) does not fit logits \(2, 4, 5, 7\)"),
        (lambda m: m[:, None], r"mask \(2, 1, 5, 7\) does not fit"),
    ],
    ids=["fractions", "coarser", "other images", "another axis"],
)
def test_a_mask_that_does_not_fit_is_refused(loss, logits, mask, harm, message):
    with pytest.raises(ValueError, match=message):
        loss(logits, harm(mask))


@pytest.mark.parametrize("kind", [CrossEntropy, OHEM, Focal])
def test_class_weights_of_another_number_of_classes_are_refused(kind, logits, mask):
    with pytest.raises(ValueError, match="5 class_weights for 4 classes"):
        kind(class_weights=[1.0] * 5)(logits, mask)


@pytest.mark.parametrize(("weights", "named"), [({"channel": 1.0}, "channel"), (None, "none")])
def test_an_output_without_a_weight_is_named(logits, mask, weights, named):
    output = SegmentationOutput(logits, {"position": logits})
    with pytest.raises(ValueError, match=rf"no entry for the output 'position' .* only {named}"):
        DeepSupervision(Dice(), weights=weights)(output, mask)
