"""Heads: feature map -> logits by name.

A head maps the last feature map to named logits at the resolution of that map. ``main`` is the
prediction; others exist in training only, for deep supervision. The arguments that heads share:

    in_channels: Of the feature map.
    num_classes: K.
    channels: Before the classifier; if None a part of ``in_channels``, by default a quarter (512
        after a ResNet-50).
    dropout: Of whole channels, before each classifier.
"""
