"""A global batch gives one gradient, however it is spread over micro-batches and processes."""

import functools
import itertools
from pathlib import Path

import pytest
import torch
from conftest import Tiny
from torch import nn

from danet.distributed.sync_batchnorm import convert_sync_batchnorm
from danet.engine.optimizer import SGD
from danet.engine.schedule import Poly
from danet.engine.settings import TrainSettings
from danet.engine.train_step import TrainStep
from danet.losses import (
    OHEM,
    CrossEntropy,
    DeepSupervision,
    Dice,
    Focal,
    LovaszSoftmax,
    RegionMutualInformation,
    WeightedSum,
)
from danet.models.heads.dual import DualAttentionHead, FCNHead
from danet.models.segmentor import Segmentor
from danet.types import IGNORE, Batch

pytestmark = [pytest.mark.slow, pytest.mark.bad_input("R11")]
K = 4
WEIGHTS = [0.5, 2.0, 1.0, 3.0]
# With min_kept=1 the threshold alone chooses, unless all pixels of a batch are easy.
LOSSES = {
    "cross entropy": lambda: (CrossEntropy(), None),
    "class weights": lambda: (CrossEntropy(WEIGHTS), CrossEntropy()),
    "ohem, kept": lambda: (OHEM(0.3, min_kept=1), CrossEntropy()),
    "ohem on every output": lambda: (OHEM(0.3, min_kept=1, class_weights=WEIGHTS), None),
    "ohem, labelled": lambda: (OHEM(0.3, min_kept=1, normalise="labelled"), None),
    "label smoothing": lambda: (CrossEntropy(WEIGHTS, label_smoothing=0.2), None),
    "focal": lambda: (Focal(1.5, class_weights=WEIGHTS), None),
    # With the default epsilon its gradient amplifies what float32 rounds in the logits.
    "region mutual information": lambda: (RegionMutualInformation(epsilon=1e-3), CrossEntropy()),
    "sum": lambda: (WeightedSum([CrossEntropy(WEIGHTS), OHEM(0.3, 1)], [1.0, 0.5]), CrossEntropy()),
}


class Frozen(Segmentor):
    """A network whose batch norms stay in eval mode: they would see micro-batches."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class Synchronised(Segmentor):
    """A network whose batch norms see the batches of all processes."""

    def __init__(self, *args):
        super().__init__(*args)
        convert_sync_batchnorm(self)


def part(first, last, *, labelled=True):
    """Some of four pictures in which very different numbers of pixels are labelled."""
    generator = torch.Generator().manual_seed(3)
    image = torch.randint(0, 256, (4, 3, 32, 40), dtype=torch.uint8, generator=generator)
    mask = torch.randint(0, K, (4, 32, 40), dtype=torch.uint8, generator=generator)
    for number, labels in ((1, 20 * 40), (2, 40), (3, 31 * 40 + 9)):
        mask[number].view(-1)[labels:] = IGNORE
    mask[3, :31] = IGNORE
    if not labelled:
        mask.fill_(IGNORE)
    return Batch(image[first:last], mask[first:last], tuple("abcd"[first:last]))


def step(loss, group, *, classes=Frozen):
    """Returns the gradients of one step, float64 (P,), its loss and the network."""
    torch.manual_seed(0)
    head = functools.partial(DualAttentionHead, num_classes=K, reduction=2, dropout=0.0)
    model = classes(Tiny(), head, functools.partial(FCNHead, num_classes=K, channels=4, dropout=0))
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(0.5)  # else the attention would get no gradient
    main, auxiliary = loss()
    weights = {"position": 1.0, "channel": 0.7, "backbone": 0.4}
    settings = TrainSettings(steps=4, precision="float32", accumulate=len(group), seed=5)
    criterion, optimizer = DeepSupervision(main, auxiliary, weights), SGD(0.1)(model)
    train_step = TrainStep(model, criterion, optimizer, Poly(), settings, num_classes=K)
    train_step.ddp_model.train()
    found = []
    optimizer.register_step_pre_hook(
        lambda *_: found.extend(p.grad.double().flatten().clone() for p in model.parameters())
    )
    terms = train_step(group, 0)
    return torch.cat(found), float(sum(terms.values())), model


def difference(one, other):
    return float((one - other).norm() / one.norm())


@pytest.mark.parametrize("loss", LOSSES)
def test_four_batches_accumulated_give_the_gradient_of_one(loss):
    whole, value, _ = step(LOSSES[loss], [part(0, 4)])
    for cuts in ([0, 1, 2, 3, 4], [0, 2, 4], [0, 3, 4]):
        group = [part(a, b) for a, b in itertools.pairwise(cuts)]
        spread, other, _ = step(LOSSES[loss], group)
        assert difference(whole, spread) < 1e-6
        assert other == pytest.approx(value, rel=1e-6)


def work(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    groups = [part(2 * rank, 2 * rank + 2)], [part(rank, rank + 1), part(2 + rank, 3 + rank)]
    found = {(n, len(g)): step(loss, g)[:2] for n, loss in LOSSES.items() for g in groups}
    found["norms"] = step(LOSSES["cross entropy"], groups[0], classes=Synchronised)[0]
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_the_gradient_of_one(tmp_path):
    torch.multiprocessing.spawn(work, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    norms = first.pop("norms")
    assert torch.equal(norms, second.pop("norms"))
    whole, _, _ = step(LOSSES["cross entropy"], [part(0, 4)], classes=Segmentor)
    assert difference(whole, norms) < 1e-4, "with statistics of all processes"
    for (name, times), (gradients, value) in first.items():
        whole, alone, _ = step(LOSSES[name], [part(0, 4)])
        assert torch.equal(gradients, second[name, times][0])
        assert difference(whole, gradients) < 1e-6, (name, times)
        # Each process knows its own part; the log has their mean.
        assert (value + second[name, times][1]) / 2 == pytest.approx(alone, rel=1e-6)


def test_counting_the_kept_pixels_first_leaves_no_trace():
    """Batch norms that learn and dropout: as if the passes that only count had not been."""

    def trained(normalise):
        def loss():
            return OHEM(1.0, min_kept=1, normalise=normalise), None

        gradients, _, model = step(loss, [part(0, 2), part(2, 4)], classes=Segmentor)
        return gradients, model.state_dict()

    kept, state = trained("kept")
    labelled, other = trained("labelled")  # needs no passes; with threshold 1 all are kept
    assert torch.equal(kept, labelled)
    assert state.keys() == other.keys()
    assert all(torch.equal(state[name], other[name]) for name in state)
    assert int(state["backbone.first.1.num_batches_tracked"]) == 2


@pytest.mark.parametrize("kind", [Dice, LovaszSoftmax])
def test_losses_of_regions_are_averaged_over_batches_with_labels(kind):
    parts = [part(0, 1), part(1, 2), part(3, 4, labelled=False)]
    found = [step(lambda: (kind(), None), [one])[0] for one in parts[:2]]
    together, _, _ = step(lambda: (kind(), None), parts)
    assert difference(sum(found) / 2, together) < 1e-6


def test_nothing_labelled_anywhere_changes_nothing():
    empty = part(0, 2, labelled=False)
    for loss in LOSSES.values():
        gradients, value, _ = step(loss, [empty, empty])
        assert value == 0
        assert not gradients.any()
