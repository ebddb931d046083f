"""The deletion test removes what it says it removes, and measures what a literal head computes."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch

from danet.errors import InputError
from danet.models.heads.dual import DualAttentionHead, FCNHead, SingleAttentionHead
from danet.visualization import evidence
from danet.visualization.evidence import as_rows, deletion_test

SHAPE = (5, 7)
NAMES = "abc"
PAPER = {"gamma": 0.8}
VARIANTS = [
    PAPER,
    {"gamma": -0.9, "similarity": "whitened", "scale": "learned", "unary": True, "registers": 2},
    {"gamma": 2.0, "similarity": "cosine", "scale": "learned", "registers": 1},
]
POSITION = functools.partial(SingleAttentionHead, attention="position")
SHARED = functools.partial(DualAttentionHead, shared_input=True, fusion="concat")


def network(make=POSITION, **variant):
    """A head in double precision with three classes, all of which it predicts."""
    torch.manual_seed(0)
    head = make(16, 3, channels=8, reduction=2, **variant).double().eval()
    for name, parameter in head.named_parameters():
        if "gamma" not in name and "scale" not in name:
            torch.nn.init.normal_(parameter, std=0.5)
    features = torch.randn(1, 16, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        head.classify[1].bias -= head(features)["main"].mean(dim=(0, 2, 3))
    return SimpleNamespace(head=head), features


def literal(head, features, removed=()):
    """The weights (N, N + registers) and probabilities (K, N) of a head without some positions."""
    x = getattr(head, "shared", torch.nn.Identity())(features)
    branch, attention = head.position, head.position.attention
    inputs = branch.reduce(x)
    query, key = attention.project(inputs)
    weights = (query[0] @ key[0].T).softmax(dim=-1)
    value = attention.value(inputs)[0].flatten(1).T.clone()
    every = torch.ones(len(value))
    every[list(removed)] = 0
    kept = every.nonzero()[:, 0]  # columns of the others are left out of the products
    context = weights[:, kept] @ value[kept]
    if attention.register_values is not None:
        context = context + weights[:, len(value) :] @ attention.register_values
    if attention.unary is not None:
        unary = attention.unary(inputs).flatten().softmax(dim=0)
        context = context + unary[kept] @ value[kept]
    position = branch.refine(inputs + attention.gamma * context.T.view_as(inputs))
    if isinstance(head, SingleAttentionHead):
        fused = position
    elif head.join is None:
        fused = position + head.channel(x)
    else:
        fused = head.join(torch.cat((position, head.channel(x)), dim=1)) + x
    return weights, head.classify(fused)[0].flatten(1).softmax(dim=0)


@torch.no_grad()
def literal_test(model, features, share, points, seed):
    weights, before = literal(model.head, features)
    generator, found = torch.Generator().manual_seed(seed), []
    for index in range(3):
        cells = [c for c in range(len(before[0])) if before[:, c].argmax() == index]
        step = (len(cells) - 1) / max(min(points, len(cells)) - 1, 1)
        for number in range(min(points, len(cells))):
            cell = cells[round(number * step)]
            row = weights[cell, : len(before[0])].tolist()
            places = {"strongest": [], "equal_count": [], "equal_mass": []}
            ranked = sorted(range(len(row)), key=lambda j, row=row: -row[j])
            while sum(row[j] for j in places["strongest"]) < share:
                places["strongest"].append(ranked.pop(0))
            order = torch.randperm(len(ranked), generator=generator).tolist()
            others = [ranked[j] for j in order]
            places["equal_count"] = others[: len(places["strongest"])]
            mass = sum(row[j] for j in places["strongest"])
            while others and sum(row[j] for j in places["equal_mass"]) < mass:
                places["equal_mass"].append(others.pop(0))
            measured = [
                (
                    len(removed),
                    sum(row[j] for j in removed),
                    (before - literal(model.head, features, removed)[1])[index, cell].item(),
                )
                for removed in places.values()
            ]
            if measured[2][1] < mass:
                measured[2] = None
            found.append((index, before[index, cell].item(), *measured))
    return found


def flat(deletions):
    numbers = []
    for label, before, *removals in deletions:
        numbers += [label, before]
        for removal in removals:
            numbers += [-1] if removal is None else list(removal)
    return numbers


@pytest.mark.parametrize("make", [POSITION, DualAttentionHead, SHARED])
@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: v.get("similarity", "dot"))
def test_falls_are_those_of_a_literal_head(make, variant):
    model, features = network(make, **variant)
    before = {name: value.clone() for name, value in model.head.state_dict().items()}
    found = deletion_test(model, features, share=0.3, points=4, seed=5)
    expected = literal_test(model, features, 0.3, 4, 5)
    assert flat(found) == pytest.approx(flat(expected), rel=1e-4, abs=1e-6)
    assert {d.label for d in found} == {0, 1, 2}
    assert max(abs(d.strongest.fall) for d in found) > 1e-3
    after = model.head.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in after)


def test_without_weight_of_the_context_nothing_falls():
    found = deletion_test(*network(gamma=0.0))
    assert {removal.fall for d in found for removal in d[2:] if removal} == {0.0}


def test_the_test_is_deterministic_and_the_seed_changes_the_random_positions_alone():
    model, features = network(**PAPER)
    found = deletion_test(model, features)
    assert deletion_test(model, features) == found
    other = deletion_test(model, features, seed=1)
    assert [d[:3] for d in other] == [d[:3] for d in found]
    assert [d.equal_mass for d in other] != [d.equal_mass for d in found]


@pytest.mark.parametrize("share", [0.1, 0.4])
def test_random_positions_are_others_of_as_nearly_the_same_mass_as_the_order_allows(share):
    weights = torch.rand(60, dtype=torch.float64)
    weights = 0.9 * weights / weights.sum()  # a tenth is on registers
    found = evidence._choose(weights, share, torch.Generator().manual_seed(0))
    strongest, count, equal = found["strongest"], found["equal_count"], found["equal_mass"]
    assert weights[strongest].sum() >= share > weights[strongest[:-1]].sum()
    others = torch.ones(60, dtype=torch.bool)
    others[strongest] = False
    assert weights[strongest].min() >= weights[others].max()
    for places in (count, equal):
        assert others[places].all()
        assert len(places.unique()) == len(places)
    assert len(count) == len(strongest)
    assert weights[equal].sum() >= weights[strongest].sum() > weights[equal[:-1]].sum()


def test_random_positions_are_uniform_over_the_others():
    weights = torch.tensor([0.4, *[0.1] * 6], dtype=torch.float64)
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(7)
    for _ in range(600):
        counts[evidence._choose(weights, 0.3, generator)["equal_count"]] += 1
    assert counts[0] == 0
    assert ((counts[1:] - 100).abs() < 40).all()  # four standard deviations


def test_points_with_a_sink_have_no_equal_and_are_counted():
    model, features = network(**PAPER)
    query, key = model.head.position.attention.query, model.head.position.attention.key
    torch.nn.init.zeros_(query.weight)
    torch.nn.init.ones_(query.bias)
    torch.nn.init.constant_(key.bias, 0.0)
    torch.nn.init.constant_(key.weight, 5.0)  # all queries are alike, so one key wins everywhere
    found = deletion_test(model, features)
    assert all(d.strongest.places == 1 and d.strongest.mass > 0.5 for d in found)
    assert all(d.equal_mass is None and d.equal_count.places == 1 for d in found)
    for row in as_rows(found, NAMES):
        assert row["skipped"] == row["points"]
        assert row["matched"] is row["equal_mass"] is None
        assert row["strongest"]["points"] == row["equal_count"]["points"] == row["points"]


def test_registers_are_not_removed_and_may_leave_too_little():
    model, features = network(registers=2, **PAPER)
    attention = model.head.position.attention
    torch.nn.init.zeros_(attention.query.weight)
    torch.nn.init.ones_(attention.query.bias)
    torch.nn.init.constant_(attention.register_keys, 50.0)
    found = deletion_test(model, features)
    assert all(d.strongest is d.equal_count is d.equal_mass is None for d in found)
    (row, *_) = as_rows(found, NAMES)
    assert row["skipped"] == row["points"]
    assert row["strongest"] is None
    assert row["before"] == pytest.approx(sum(d.before for d in found if d.label == 0) / 8)


def test_rows_are_means_over_the_points_of_all_pictures():
    model, features = network(**PAPER)
    both = [*deletion_test(model, features), *deletion_test(model, -features)]
    rows = as_rows(both, NAMES)
    assert json.loads(json.dumps(rows)) == rows
    for row in rows:
        found = [d for d in both if NAMES[d.label] == row["class"]]
        matched = [d for d in found if d.equal_mass]
        assert (row["points"], row["skipped"]) == (len(found), len(found) - len(matched))
        for name, removals in (
            ("strongest", [d.strongest for d in found]),
            ("matched", [d.strongest for d in matched]),
            ("equal_mass", [d.equal_mass for d in matched]),
        ):
            expected = sum(r.fall for r in removals) / len(removals)
            assert row[name]["fall"] == pytest.approx(expected)
            assert row[name]["points"] == len(removals)


def test_other_heads_and_wrong_features_are_refused():
    model, features = network(**PAPER)
    with pytest.raises(ValueError, match=r"found features \(2, 16, 5, 7\), expected those of one"):
        deletion_test(model, features.repeat(2, 1, 1, 1))
    with pytest.raises(ValueError, match="share=1 is not between 0 and 1"):
        deletion_test(model, features, share=1)
    with pytest.raises(InputError, match="the head has no position attention"):
        deletion_test(SimpleNamespace(head=FCNHead(16, 3)), features)
