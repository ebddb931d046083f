"""How far confidence can be trusted: calibration errors, selective risk, and temperature scaling.

The confidence of a pixel is the probability of its predicted class. Temperature scaling divides the
final logits by one number T; averaged probabilities p count as the logits log p. No class changes
by it. Guo, Pleiss, Sun, Weinberger, "On Calibration of Modern Neural Networks", ICML 2017.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from danet.errors import InputError
from danet.evaluation.metrics import row_slices

LEVELS = 65535
"""Confidences are counted as multiples of 1 / LEVELS, of which each of 15 bins has 4369."""
_BINS = 15
_SAMPLED = (
    1 << 14
)  # labelled pixels of a piece of an image, at most, that a temperature is fitted to
_UNIT = 1 << 16  # of the sums of negative log likelihoods, per nat: 1.5e-5 nats are far below noise
_LARGEST = 1 << 14  # nats of a pixel, so that the sums of 2^33 pixels fit int64
_OCTAVES, _PER_OCTAVE = 3, 8  # of the temperatures that are tried, 1/8 to 8
_TINY = torch.finfo(torch.float32).tiny


def exponentials(scores: Tensor, temperature: float, *, are_logits: bool) -> tuple[Tensor, Tensor]:
    """Return the classes (B, H, W), and exp(logits / T) divided by its largest, (B, K, H, W).

    Divided by their sum over K, these are the probabilities. ``scores`` are logits, probabilities
    or a multiple of them, (B, K, H, W).
    """
    if not are_logits:
        scores = scores.clamp(min=_TINY)
    largest, classes = scores.max(dim=1, keepdim=True)
    if are_logits:
        return classes[:, 0], (scores - largest).div_(temperature).exp_()
    return classes[:, 0], scores.div_(largest).pow_(1 / temperature)


class Calibration:
    """Counts pixels by confidence, and by whether the prediction is right, in int64.

    All numbers come from this one histogram. Ignored pixels are not counted.
    """

    def __init__(self, temperature: float = 1.0, device: torch.device | str = "cpu") -> None:
        self.temperature = temperature
        self.counts = torch.zeros(2 * (LEVELS + 1), dtype=torch.int64, device=device)
        """Wrong and right pixels of each level of confidence; to be summed over processes."""

    def update(self, scores: Tensor, mask: Tensor, *, are_logits: bool) -> None:
        """Count the pixels of logits or probabilities (B, K, H, W) and a mask (B, H, W)."""
        keys = []
        for rows in row_slices(scores):
            part, labels = scores[:, :, rows], mask[:, rows]
            classes, shares = exponentials(part, self.temperature, are_logits=are_logits)
            # NaN, of logits that are infinite, would be no index.
            levels = (LEVELS / shares.sum(dim=1)).nan_to_num_().round_().int()  # (B, rows, W)
            key = 2 * levels + (classes == labels)
            keys.append(key.masked_fill_(labels >= part.shape[1], len(self.counts)).flatten())
        self.counts += torch.bincount(torch.cat(keys), minlength=len(self.counts) + 1)[:-1]

    def table(self) -> np.ndarray:
        """Return the levels that occur, int64 (L, 3): level, wrong and right pixels."""
        pixels = self.counts.view(-1, 2).cpu().numpy()
        levels = np.flatnonzero(pixels.any(axis=1))
        return np.column_stack((levels, pixels[levels]))

    def facts(self) -> dict[str, Any]:
        """Compute all numbers as plain values; there must be a counted pixel.

        ``ece`` is the expected calibration error with 15 equal bins, of which bin m has confidences
        in ((m - 1) / 15, m / 15]. ``risk_coverage`` has the share of wrong pixels among those of at
        least a confidence, about one point per percent of coverage (Geifman and El-Yaniv,
        "Selective Classification for Deep Neural Networks", NeurIPS 2017), and ``aurc`` is the area
        below that curve, in which pixels of one level are mixed evenly.
        """
        level, wrong, right = self.table().T
        confidence, pixels = level / LEVELS, wrong + right
        total = pixels.sum()
        place = np.maximum(-(-level * _BINS // LEVELS) - 1, 0)  # of its bin
        sums = [np.bincount(place, x, _BINS) for x in (pixels, right, pixels * confidence)]
        bins = [
            {"pixels": int(n), "accuracy": hit / n, "confidence": sure / n}
            for n, hit, sure in np.transpose(sums).tolist()
            if n
        ]
        gaps = (b["pixels"] * abs(b["accuracy"] - b["confidence"]) for b in bins)
        # From the surest level on.
        n, errors = pixels[::-1], wrong[::-1]
        covered, missed = n.cumsum(), errors.cumsum()
        before, risk = covered - n, errors / n
        # Integral of (E + risk t) / (N + t) over the t = 0..n pixels of a level, after N pixels of
        # which E are errors.
        grown = np.log(covered[1:] / before[1:])
        area = (risk * n).sum() + ((missed - errors - risk * before)[1:] * grown).sum()
        steps = np.searchsorted(covered, total * np.arange(1, 101) / 100)
        curve = [
            {"coverage": covered[i] / total, "risk": missed[i] / covered[i], "confidence": sure}
            for i, sure in zip(np.unique(steps), confidence[::-1][np.unique(steps)], strict=True)
        ]
        return {
            "temperature": self.temperature,
            "ece": sum(gaps) / total.item(),
            "mean_confidence": (pixels * confidence).sum().item() / total.item(),
            "aurc": area.item() / total.item(),
            "bins": bins,
            "risk_coverage": [{k: float(v) for k, v in point.items()} for point in curve],
        }


class TemperatureFit:
    """Sums, in one pass, the negative log likelihood of labels for many temperatures.

    The pixels are evenly spaced ones of each piece of an image. Sums are whole numbers, so that the
    temperature is the same for any number of processes.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        count = 2 * _OCTAVES * _PER_OCTAVE + 1
        self.octaves = torch.linspace(-_OCTAVES, _OCTAVES, count).tolist()
        self.counts = torch.zeros(count, dtype=torch.int64, device=device)
        """The sum of each temperature."""

    def update(self, scores: Tensor, mask: Tensor, *, are_logits: bool) -> None:
        """Count pixels of logits or probabilities (B, K, H, W) and a mask (B, H, W)."""
        labelled = (mask < scores.shape[1]).nonzero()
        step = -(-len(labelled) // _SAMPLED) | 1  # odd, or all might lie in few columns
        image, row, column = labelled[::step].T
        logits = scores[image, :, row, column].T.contiguous()  # (K, pixels)
        logits = logits if are_logits else logits.clamp(min=_TINY).log()
        logits = logits - logits.amax(dim=0)
        own = logits.gather(0, mask[None, image, row, column].long())[0]  # (pixels,)
        for i, octave in enumerate(self.octaves):
            nats = (logits / 2**octave).exp_().sum(dim=0).log_() - own / 2**octave
            # Weighted by the step, all pixels count alike.
            self.counts[i] += step * (nats.clamp_(max=_LARGEST) * _UNIT).round_().long().sum()

    def temperature(self) -> float:
        """Return where the sum is smallest, between the temperatures by a parabola in log T.

        Raises InputError if it is smallest at an end.
        """
        sums = self.counts.tolist()
        best = sums.index(min(sums))
        if not 0 < best < len(sums) - 1:
            raise InputError(
                f"calibrate=true: the best temperature is not between {2.0**-_OCTAVES:g} and "
                f"{2.0**_OCTAVES:g}: the network is right nearly everywhere, or hardly better than "
                "chance; leave calibrate out to see its scores"
            )
        before, here, after = sums[best - 1 : best + 2]
        shift = (before - after) / (before - 2 * here + after) / 2
        return float(2 ** (self.octaves[best] + shift / _PER_OCTAVE))
