"""Calibration: whether predictions of confidence p are right with probability p.

The confidence of a pixel is the probability of its predicted class, max softmax(logits / T); the
temperature T changes no class. Averaged probabilities p count as the logits log p. Guo, Pleiss,
Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from danet.errors import InputError
from danet.evaluation.metrics import in_rows

LEVELS = 65535
"""Confidences are counted as multiples of 1 / LEVELS, of which each of 15 bins has 4369."""
_OCTAVES, _STEP = 3, 0.125  # temperatures from 1/8 to 8 are tried, eight per octave
_UNIT, _LARGEST = 1 << 16, 1 << 14  # parts of a nat, and nats of a pixel: 2^33 pixels fit int64


class Calibration:
    """Counts labelled pixels by confidence, and by whether the prediction is right."""

    def __init__(self, temperature: float = 1.0, device: torch.device | str = "cpu") -> None:
        self.temperature = temperature
        self.counts = torch.zeros(2 * (LEVELS + 1), dtype=torch.int64, device=device)
        """Wrong and right pixels of each level; to be summed over processes."""

    def update(self, scores: Tensor, mask: Tensor, *, are_logits: bool) -> None:
        """Count the pixels of logits or probabilities (B, K, H, W) and a mask (B, H, W)."""
        keys = []
        for rows, part, logits in in_rows(scores, are_logits=are_logits):
            confidence = (logits / self.temperature).softmax(dim=1).amax(dim=1)  # (B, rows, W)
            # NaN, of logits that are infinite, would be no index.
            level = (confidence * LEVELS).nan_to_num_().round_().int()
            key = 2 * level + (part.max(dim=1).indices == mask[:, rows])
            keys.append(
                key.masked_fill_(mask[:, rows] >= part.shape[1], len(self.counts)).flatten()
            )
        self.counts += torch.bincount(torch.cat(keys), minlength=len(self.counts) + 1)[:-1]

    def table(self) -> np.ndarray:
        """Return the levels that occur, int64 (L, 3): level, wrong and right pixels."""
        pixels = self.counts.view(-1, 2).cpu().numpy()
        levels = np.flatnonzero(pixels.any(axis=1))
        return np.column_stack((levels, pixels[levels]))

    def facts(self) -> dict[str, Any]:
        """Compute, of at least one pixel, what metrics.json has, as plain values.

        ``ece`` is the expected calibration error over 15 bins ((m - 1) / 15, m / 15].
        ``risk_coverage`` has the share of wrong pixels among all of at least a confidence, and
        ``aurc`` is its mean over the confidences of all pixels, the area under the curve (Geifman,
        El-Yaniv, "Selective Classification for Deep Neural Networks", NeurIPS 2017).
        """
        level, wrong, right = self.table()[::-1].T  # the surest first
        sure, pixels = level / LEVELS, wrong + right
        covered, risk = pixels.cumsum(), wrong.cumsum() / pixels.cumsum()
        place = np.maximum(-(-level // 4369) - 1, 0)
        sums = np.array([np.bincount(place, x, 15) for x in (pixels, right, pixels * sure)])
        n, hits, mass = sums[:, sums[0] > 0]
        total = covered[-1].item()
        shown = np.unique(np.searchsorted(covered, total * np.arange(1, 101) / 100))
        curve = {"coverage": covered / total, "risk": risk, "confidence": sure}
        bins = {"pixels": n.astype(int), "accuracy": hits / n, "confidence": mass / n}
        return {
            "temperature": self.temperature,
            "ece": abs(hits - mass).sum().item() / total,
            "mean_confidence": mass.sum().item() / total,
            "aurc": (pixels * risk).sum().item() / total,
            "bins": {name: values.tolist() for name, values in bins.items()},
            "risk_coverage": {name: values[shown].tolist() for name, values in curve.items()},
        }


class TemperatureFit:
    """Sums, in one pass, the negative log likelihood at many temperatures as whole numbers.

    Of all pixels, one in 31 is looked at: neighbours say nearly the same.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.octaves = np.arange(-_OCTAVES, _OCTAVES + _STEP, _STEP).tolist()
        self.counts = torch.zeros(len(self.octaves), dtype=torch.int64, device=device)

    def update(self, scores: Tensor, mask: Tensor, *, are_logits: bool) -> None:
        """Count pixels of logits or probabilities (B, K, H, W) and a mask (B, H, W)."""
        for rows, part, logits in in_rows(scores, are_logits=are_logits):
            labels = mask[:, rows].flatten()[::31].long()  # (N,)
            logits = logits.movedim(1, 0).flatten(1)[:, ::31].contiguous()  # (K, N)
            logits = logits - logits.amax(dim=0)
            own = logits.gather(0, labels.clamp(max=part.shape[1] - 1)[None])[0]
            for i, octave in enumerate(self.octaves):
                nats = (logits / 2**octave).exp_().sum(dim=0).log_() - own / 2**octave
                nats = nats.masked_fill_(labels >= part.shape[1], 0).clamp_(max=_LARGEST)
                self.counts[i] += (nats * _UNIT).round_().long().sum()

    def temperature(self) -> float:
        """Return the temperature of the smallest sum, by a parabola in log T; raise InputError."""
        sums = self.counts.tolist()
        best = sums.index(min(sums))
        if not 0 < best < len(sums) - 1:
            text = "calibrate=true: no temperature of 0.125 to 8 is the best: the network is right"
            text += " nearly everywhere, or hardly better than chance; calibrate=false scores it"
            raise InputError(text)
        before, here, after = sums[best - 1 : best + 2]
        shift = (before - after) / (before - 2 * here + after) / 2
        return float(2 ** (self.octaves[best] + shift * _STEP))
