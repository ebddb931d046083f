"""Calibration is that of its formulas, exact over processes, and changes no class."""

import math
import os

import numpy as np
import pytest
import torch
from conftest import rewrite
from test_evaluation import MODES, PROTOCOLS, K, StandIn, picture, pictures_of, run
from torch import nn
from torch.utils._pytree import tree_leaves

from danet.checkpoint import format as checkpoint_format
from danet.checkpoint.manager import add_temperature
from danet.config.build import load_model
from danet.errors import InputError
from danet.evaluation import calibration, metrics, sliding_window
from danet.evaluation.calibration import LEVELS, Calibration, TemperatureFit
from danet.prediction.predict import predict_maps
from danet.types import IGNORE

CLASSES = 5


@pytest.fixture
def pixels():
    """Returns logits (2, K, 40, 60), which are too sure, and labels drawn from them."""
    logits = 2 * torch.randn(2, CLASSES, 40, 60)
    labels = torch.distributions.Categorical(logits=logits.movedim(1, 3)).sample()
    labels[:, :3] = IGNORE
    return 1.6 * logits, labels.byte()


def literal_confidences(logits, labels, temperature):
    """Returns the confidence, as it is counted, and whether it is right, of labelled pixels."""
    found = []
    for image, truths in zip(logits.double().numpy(), labels.numpy(), strict=True):
        for row, column in np.argwhere(truths != IGNORE):
            powers = np.exp(image[:, row, column] / temperature)
            sure = powers.max() / powers.sum()
            is_right = image[:, row, column].argmax() == truths[row, column]
            found.append((round(sure * LEVELS) / LEVELS, is_right))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("kind", ["logits", "probabilities", "multiples"])
def test_all_numbers_are_those_of_their_formulas(pixels, temperature, kind, monkeypatch):
    monkeypatch.setattr(metrics, "_ELEMENTS", 2000)
    logits, labels = pixels
    counter = Calibration(temperature)
    scores = {"logits": logits, "probabilities": logits.softmax(1), "multiples": logits.exp()}[kind]
    counter.update(scores, labels, are_logits=kind == "logits")
    facts = counter.facts()
    known = literal_confidences(logits, labels, temperature)
    error, risks = 0.0, []
    for m in range(15):
        inside = [(p, hit) for p, hit in known if m / 15 < p <= (m + 1) / 15]
        if inside:
            error += abs(sum(p for p, _ in inside) - sum(hit for _, hit in inside)) / len(known)
    for p, _ in known:
        among = [hit for q, hit in known if q >= p] if len(risks) % 97 == 0 else None
        risks.append(1 - sum(among) / len(among) if among else math.nan)
    # A float32 probability may be rounded to the next level.
    assert facts["ece"] == pytest.approx(error, abs=1e-4)
    assert facts["mean_confidence"] == pytest.approx(np.mean([p for p, _ in known]), abs=1e-4)
    assert facts["aurc"] == pytest.approx(np.nanmean(risks), rel=0.05)
    hits = np.cumsum([not hit for _, hit in known]) / np.arange(1, len(known) + 1)
    curve = facts["risk_coverage"]
    assert len(curve["coverage"]) > 80
    assert curve["coverage"][-1] == 1
    for coverage, risk in zip(curve["coverage"], curve["risk"], strict=True):
        assert risk == pytest.approx(hits[round(coverage * len(known)) - 1], abs=2e-3)
    assert sum(facts["bins"]["pixels"]) == counter.counts.sum() == len(known)


def test_confidences_at_the_edge_of_a_bin_are_in_the_lower_one():
    counter = Calibration()
    for level, right in ((4369 * 3, 10), (4369 * 3 + 1, 7), (0, 1), (LEVELS, 2)):
        counter.counts[2 * level + 1] = right
    assert counter.facts()["bins"]["pixels"] == [1, 10, 7, 2]


def test_labels_that_are_no_classes_and_infinite_logits_stop_nothing():
    counter, logits = Calibration(), torch.full((1, CLASSES, 1, 3), math.inf)
    counter.update(logits, torch.tensor([[[0, CLASSES, IGNORE]]]).byte(), are_logits=True)
    assert counter.counts.sum() == 1


@pytest.mark.parametrize("infer", [*MODES, *PROTOCOLS], ids=lambda i: type(i).__name__)
def test_counts_of_shares_of_a_split_add_up_to_the_bit(infer, monkeypatch):
    monkeypatch.setattr(sliding_window, "STRIP", 60)
    model, pictures = StandIn().eval(), pictures_of((40, 70), (33, 47), (40, 70))
    found = []
    for rank, world in ((0, 1), (0, 2), (1, 2)):
        counters = [Calibration(1.7), TemperatureFit()]
        run(model, pictures, infer, counters, rank=rank, world=world)
        found.append(torch.cat([c.counts for c in counters]))
    assert torch.equal(found[0], found[1] + found[2])
    assert (found[1] != found[2]).any()


@pytest.mark.parametrize("infer", [*MODES, *PROTOCOLS], ids=lambda i: type(i).__name__)
def test_a_temperature_moves_probabilities_and_no_class(infer, monkeypatch):
    monkeypatch.setattr(sliding_window, "STRIP", 60)
    monkeypatch.setattr(metrics, "_ELEMENTS", 3000)
    model, image = StandIn().eval(), picture(50, 90)
    classes = infer.predict(model, image).numpy()
    model.temperature = 2.5
    found = predict_maps(model, image, infer, ["confidence", "entropy", "probability"])
    powers = infer(model, image).double() ** (1 / 2.5)
    wanted = (powers / powers.sum(dim=1, keepdim=True)).numpy()  # (B, K, H, W)
    assert np.array_equal(found["classes"], classes)
    np.testing.assert_allclose(found["probability"], wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found["confidence"], wanted.max(axis=1), rtol=0, atol=1e-5)
    entropy = -(wanted * np.log(wanted)).sum(axis=1) / math.log(K)
    np.testing.assert_allclose(found["entropy"], entropy, rtol=0, atol=1e-5)


def fitted(logits, labels, **kind):
    fit = TemperatureFit()
    fit.update(logits, labels, are_logits=True, **kind)
    return fit.temperature()


def test_the_temperature_is_that_of_a_search_in_float64():
    logits = 2 * torch.randn(1, CLASSES, 200, 310)
    labels = torch.distributions.Categorical(logits=logits.movedim(1, 3)).sample().byte()
    for factor in (0.4, 1.0, 3.0):
        scaled, powers = factor * logits, torch.zeros((), dtype=torch.float64, requires_grad=True)
        chosen = scaled.flatten(2)[0, :, ::31].T.double()
        search = torch.optim.LBFGS([powers], max_iter=50, line_search_fn="strong_wolfe")

        def loss(chosen=chosen, powers=powers, search=search):
            search.zero_grad()
            value = nn.functional.cross_entropy(
                chosen / powers.exp(), labels.flatten()[::31].long()
            )
            value.backward()
            return value

        search.step(loss)
        assert fitted(scaled, labels) == pytest.approx(powers.exp().item(), rel=2e-3)
    assert fitted(3 * logits, labels) == pytest.approx(3 * fitted(logits, labels), rel=2e-3)
    fit = TemperatureFit()
    fit.update((3 * logits).softmax(dim=1), labels, are_logits=False)
    assert fit.temperature() == pytest.approx(fitted(3 * logits, labels), rel=1e-4)


def test_what_is_ignored_fits_nothing(pixels):
    logits, labels = pixels
    other = logits.clone()
    other.movedim(1, 3)[labels == IGNORE] = 50 * torch.randn(int((labels == 255).sum()), CLASSES)
    assert fitted(logits, labels) == fitted(other, labels)


def test_no_temperature_is_fitted_to_a_network_that_is_always_right_or_knows_nothing(pixels):
    logits, labels = pixels
    for scores, truth in ((logits, logits.argmax(dim=1).byte()), (0 * logits, labels)):
        with pytest.raises(InputError, match=r"no temperature of 0\.125 to 8 is the best"):
            fitted(scores, truth)
    assert 2.0**calibration._OCTAVES == 8, "as the message says"


def test_a_temperature_is_written_under_all_names_of_a_file_and_changes_nothing_else(network):
    folder = network.parent
    network.rename(folder / "step_000000006.pt")
    step, best, last, copy = (
        folder / f"{n}.pt" for n in ("step_000000006", "best", "last", "step_000000003")
    )
    os.link(step, best)
    last.symlink_to(step.name)
    copy.write_bytes(step.read_bytes())
    before = torch.load(step, weights_only=True)
    assert load_model(best).temperature == 1.0
    assert {p.name for p in add_temperature(last, 1.75, step=6)} == {"step_000000006.pt", "best.pt"}
    assert step.samefile(best)
    assert last.is_symlink()
    assert [load_model(p).temperature for p in (step, best, last, copy)] == [1.75, 1.75, 1.75, 1.0]
    after = torch.load(step, weights_only=True)
    assert after.pop("temperature") == 1.75
    assert list(after) == list(before)
    for new, old in zip(tree_leaves(after), tree_leaves(before), strict=True):
        assert torch.equal(new, old) if isinstance(old, torch.Tensor) else new == old
    assert checkpoint_format.load(step)["temperature"] == 1.75, "sealed"


def test_a_checkpoint_that_its_training_replaced_meanwhile_stays(network):
    before = network.read_bytes()
    with pytest.raises(InputError, match="its training replaced it meanwhile; start again"):
        add_temperature(network, 1.75, step=5)
    assert network.read_bytes() == before


@pytest.mark.parametrize(
    "wrong", [0.0, -1.0, 1e-40, 1e300, math.nan, math.inf, "2", True, torch.tensor(2.0)]
)
def test_a_temperature_that_no_fit_gives_is_refused(network, wrong):
    saved = checkpoint_format.load(network)
    checkpoint_format.save(network, {**saved, "temperature": wrong})
    with pytest.raises(InputError, match="its temperature has"):
        checkpoint_format.load(network)
    checkpoint_format.save(network, {**saved, "temperature": 2.0})
    rewrite(network, step=7)
    assert load_model(network).temperature == 2.0
