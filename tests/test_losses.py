"""The losses equal their formulas, pixel by pixel and in pieces, and IGNORE never counts."""

import math
from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from conftest import LargestTensor
from test_config import compose

from danet.config.build import make
from danet.config.validate import check
from danet.losses import OHEM, CrossEntropy, DeepSupervision, Dice, LovaszSoftmax, WeightedSum
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
    "ohem": OHEM(0.6, min_kept=20),
    "ohem over labelled": OHEM(0.6, min_kept=20, normalise="labelled", class_weights=WEIGHTS),
    "dice": Dice(),
    "dice, not smooth": Dice(smooth=0),
    "lovasz": LovaszSoftmax(),
    "sum": WeightedSum([CrossEntropy(), Dice(), LovaszSoftmax()], [1.0, 0.5, 2.0]),
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


# Equal to the formula

ONES = (1.0,) * K
RULES = [(0.3, 1), (0.3, 45), (0.9, 1), (0.001, 1), (0.001, 7), (0.01, 10**6), (1.0, 1)]
FORMULAS = [
    (CrossEntropy(), slow_cross_entropy),
    (CrossEntropy(WEIGHTS), partial(slow_cross_entropy, weights=WEIGHTS)),
    *((Dice(s), partial(slow_dice, smooth=s)) for s in (0, 1.0, 10.0)),
    (LovaszSoftmax(), slow_lovasz),
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
def test_the_gradient_is_that_of_finite_differences(mask, align_corners):
    logits = torch.randn(2, K, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(2, 5, 7, dtype=torch.float64) * (mask != IGNORE)

    def loss(x):
        return cross_entropy_sum(x, mask.long(), weights, align_corners=align_corners)

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


@pytest.mark.parametrize("loss", [CrossEntropy(), CrossEntropy((1.0,) * 19), OHEM()], ids=str)
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


@pytest.mark.parametrize("choice", ["cross_entropy", "ohem", "dice", "lovasz"])
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
        kept = OHEM(0.1, min_kept).hard_pixels(losses, mask)
        assert torch.equal(kept, mask != IGNORE), "all labelled pixels are tied, so all are kept"


def test_ohem_ranks_saturated_pixels_by_their_logarithms():
    # In float32 all these probabilities round to 0 or nearly; their logarithms are distinct.
    logits = torch.zeros(1, 2, 1, 6)
    logits[0, 1] = torch.tensor([120.0, 150.0, 130.0, 160.0, 140.0, -5.0])
    mask = torch.zeros(1, 1, 6, dtype=torch.long)
    losses = F.cross_entropy(logits, mask, reduction="none")
    kept = OHEM(threshold=1e-38, min_kept=2).hard_pixels(losses, mask)
    assert kept.flatten().tolist() == [True, True, True, True, True, False]
    assert OHEM(threshold=1e-38, min_kept=6).hard_pixels(losses, mask).all()


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
    for dtype in (torch.int16, torch.int32, torch.int64):
        assert torch.equal(loss(half, mask.to(dtype)), value)


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


@pytest.mark.parametrize("kind", [CrossEntropy, OHEM])
def test_class_weights_of_another_number_of_classes_are_refused(kind, logits, mask):
    with pytest.raises(ValueError, match="5 class_weights for 4 classes"):
        kind(class_weights=[1.0] * 5)(logits, mask)


@pytest.mark.parametrize(("weights", "named"), [({"channel": 1.0}, "channel"), (None, "none")])
def test_an_output_without_a_weight_is_named(logits, mask, weights, named):
    output = SegmentationOutput(logits, {"position": logits})
    with pytest.raises(ValueError, match=rf"no entry for the output 'position' .* only {named}"):
        DeepSupervision(Dice(), weights=weights)(output, mask)
