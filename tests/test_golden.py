"""A few steps with a fixed seed give the losses that they gave before: refactoring changes nothing.

A change that is meant to change numbers writes them anew: ``python tests/test_golden.py``.
"""

import json
from pathlib import Path

import torch

from danet.config.build import make, make_dataset, make_model
from danet.data.loader import train_batches

STORED = Path(__file__).with_name("golden.json")
SETTINGS = [
    "data.size=[48,96]",
    "data.lengths={train:12,val:5,test:5}",
    "data.cue_radius=2",
    "model.backbone.width=8",
    "loss=ohem",
    "loss.main.min_kept=500",
]


def golden_losses() -> list[dict[str, float]]:
    """Trains five steps on the embedded scenes and returns the loss terms of each."""
    from test_config import check, compose

    config = check(compose(*SETTINGS))
    torch.manual_seed(config.seed)
    dataset = make_dataset(config, "train", training=True)
    model, criterion = make_model(config).train(), make(config.loss, "loss")
    optimizer = make(config.optimizer, "optimizer")(model)
    losses = []
    batches = train_batches(dataset, batch_size=2, seed=config.seed)
    for _ in range(5):
        batch = next(batches)
        terms = criterion(model(batch.image), batch.mask)
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append({name: round(term.item(), 6) for name, term in terms.items()})
    return losses


def test_losses_are_those_of_before():
    stored, now = json.loads(STORED.read_text()), golden_losses()
    assert len(stored) == len(now) == 5
    for step, (old, new) in enumerate(zip(stored, now, strict=True)):
        assert old.keys() == new.keys()
        for name, value in old.items():
            # Kernels of another processor may round otherwise; a changed formula is far off.
            assert abs(new[name] - value) <= 2e-3 * abs(value), (step, name, value, new[name])


if __name__ == "__main__":
    torch.manual_seed(0)
    torch.set_num_threads(1)
    STORED.write_text(json.dumps(golden_losses(), indent=1) + "\n")
