"""DANet as its authors and mmsegmentation compute it, written anew on their own tensors' names.

The forward passes use nothing of danet: convolutions, norms and the two attentions with their whole
maps, from a dictionary of tensors. Shapes of such dictionaries are those of a network of danet.
"""

import torch
import torch.nn.functional as F
from test_config import compose

from danet.checkpoint.convert import PROGRAMS
from danet.config.build import make_model
from danet.config.validate import check

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
NAMES = {
    "pam in": ("conv5a", "pam_in_conv"),
    "cam in": ("conv5c", "cam_in_conv"),
    "pam out": ("conv51", "pam_out_conv"),
    "cam out": ("conv52", "cam_out_conv"),
    "query": ("sa.query_conv", "pam.query_project"),
    "key": ("sa.key_conv", "pam.key_project"),
    "value": ("sa.value_conv", "pam.value_project"),
    "pam gamma": ("sa.gamma", "pam.gamma.scale"),
    "cam gamma": ("sc.gamma", "cam.gamma.scale"),
    "pam classes": ("conv6.1", "pam_conv_seg"),
    "cam classes": ("conv7.1", "cam_conv_seg"),
    "classes": ("conv8.1", "conv_seg"),
}
"""Parts of the head, as the authors and as mmsegmentation call them."""


def _names(column, prefix, conv, norm):
    found = {part: prefix + names[column] for part, names in NAMES.items()}
    blocks = {p: (f"{n}.{conv}", f"{n}.{norm}") for p, n in found.items() if p[4:] in ("in", "out")}
    return {**found, **blocks}


AUTHORS = _names(0, "head.", "0", "1")
MMSEG = _names(1, "decode_head.", "conv", "bn")


def shapes(source, depth, data="cityscapes"):
    """Yields the names that a program gives the tensors of a network, and their shapes."""
    settings = [f"data={data}", "data.root=/data", f"model/backbone=resnet{depth}"]
    if source == "mmsegmentation":
        settings += ["model.backbone.stem=32-32-64", "model/auxiliary_head=fcn"]
    with torch.device("meta"):
        network = make_model(check(compose(*settings)))
    names = {ours: theirs for theirs, ours in PROGRAMS[source]["names"].items()}
    for name, tensor in network.state_dict().items():
        start = max((ours for ours in names if name.startswith(ours)), key=len, default=None)
        if start:  # not mean and std
            is_number = source == "mmsegmentation" and name.endswith(".gamma")
            yield names[start] + name[len(start) :], () if is_number else tuple(tensor.shape)


def random_state(source, depth, data="cityscapes"):
    """Draws values that keep features near 1 through a hundred layers; no two tensors are equal."""
    generator = torch.Generator().manual_seed(5)
    state = {}
    for name, shape in shapes(source, depth, data):
        noise = torch.randn(shape, generator=generator)
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
        elif name.endswith("running_var"):
            state[name] = 1 + 0.1 * noise.abs()
        elif len(shape) == 4:
            state[name] = noise * (2 / (shape[1] * shape[2] * shape[3])) ** 0.5
        elif "gamma" in name:
            state[name] = 0.6 + 0.1 * noise
        elif name.endswith("weight"):
            # Of a norm. The last of a block is small, and so are those before the attentions: a
            # softmax of energies of hundreds would make the rounding of either side visible.
            is_small = any(part in name for part in (".bn3", "conv5a.1", "conv5c.1", "in_conv.bn"))
            state[name] = (0.3 if is_small else 1.0) + 0.05 * noise
        else:
            state[name] = 0.05 * noise
    return state


def in_float64(state):
    """Returns the same values, with which the forward passes compute in float64."""
    return {name: x.double() if x.is_floating_point() else x for name, x in state.items()}


# The forward passes


class Original:
    """Layers by the names of their tensors."""

    def __init__(self, state):
        self.state = state

    def conv(self, name, x, **how):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **how)

    def norm(self, name, x):
        parts = (f"{name}.{p}" for p in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *(self.state[p] for p in parts), eps=1e-5)

    def conv_norm_relu(self, names, x):
        return self.norm(names[1], self.conv(names[0], x, padding=1)).relu()

    def bottleneck(self, name, x, stride, dilation):
        out = self.norm(f"{name}.bn1", self.conv(f"{name}.conv1", x)).relu()
        how = {"stride": stride, "dilation": dilation, "padding": dilation}
        out = self.norm(f"{name}.bn2", self.conv(f"{name}.conv2", out, **how)).relu()
        out = self.norm(f"{name}.bn3", self.conv(f"{name}.conv3", out))
        if f"{name}.downsample.0.weight" in self.state:
            x = self.conv(f"{name}.downsample.0", x, stride=stride)
            x = self.norm(f"{name}.downsample.1", x)
        return (out + x).relu()

    def stages(self, prefix, x, depth, last):
        """Returns the outputs of the third and the fourth stage; ``last``: its dilations."""
        counts = BLOCKS[depth]
        dilations = ([1] * counts[0], [1] * counts[1], [1] + [2] * (counts[2] - 1), last)
        for stage, row in enumerate(dilations, 1):
            third = x
            for block, dilation in enumerate(row):
                stride = 2 if (stage, block) == (2, 0) else 1
                x = self.bottleneck(f"{prefix}layer{stage}.{block}", x, stride, dilation)
        return third, x

    def pam(self, names, x):
        parts = (self.conv(names[part], x) for part in ("query", "key", "value"))
        query, key, value = (part.flatten(2) for part in parts)  # (B, D, N)
        attention = torch.einsum("bdi,bdj->bij", query, key).softmax(dim=-1)  # (B, N, N)
        context = torch.einsum("bij,bcj->bci", attention, value).view_as(x)
        return self.state[names["pam gamma"]] * context + x

    def cam(self, names, x):
        features = x.flatten(2)  # (B, C, N)
        energy = torch.einsum("bin,bjn->bij", features, features)  # (B, C, C)
        attention = (energy.amax(dim=-1, keepdim=True) - energy).softmax(dim=-1)
        context = torch.einsum("bij,bjn->bin", attention, features).view_as(x)
        return self.state[names["cam gamma"]] * context + x

    def head(self, names, x):
        pam = self.pam(names, self.conv_norm_relu(names["pam in"], x))
        pam = self.conv_norm_relu(names["pam out"], pam)
        cam = self.cam(names, self.conv_norm_relu(names["cam in"], x))
        cam = self.conv_norm_relu(names["cam out"], cam)
        return {
            "main": self.conv(names["classes"], pam + cam),
            "position": self.conv(names["pam classes"], pam),
            "channel": self.conv(names["cam classes"], cam),
        }


def normalised(image, like):
    """RGB bytes as both normalise them, in the dtype of a weight."""
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=like.dtype)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=like.dtype)
    return (image.to(like.dtype) / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def authors_forward(state, image, depth, multi_grid):
    """Returns the three outputs of the released code, at the size of the image."""
    net = Original(state)
    x = normalised(image, state["pretrained.conv1.weight"])
    x = net.conv("pretrained.conv1", x, stride=2, padding=3)
    x = F.max_pool2d(net.norm("pretrained.bn1", x).relu(), 3, stride=2, padding=1)
    last = [4, 8, 16] if multi_grid else [2, 4, 4]
    outputs = net.head(AUTHORS, net.stages("pretrained.", x, depth, last)[1])
    return _enlarged(outputs, image, align_corners=True)


def mmseg_forward(state, image, depth, align_corners):
    """Returns the three outputs of DAHead and the one of the auxiliary head."""
    net = Original(state)
    x = normalised(image, state["backbone.stem.0.weight"])
    for place, stride in ((0, 2), (3, 1), (6, 1)):
        x = net.conv(f"backbone.stem.{place}", x, stride=stride, padding=1)
        x = net.norm(f"backbone.stem.{place + 1}", x).relu()
    x = F.max_pool2d(x, 3, stride=2, padding=1)
    third, fourth = net.stages("backbone.", x, depth, [2, 4, 4])
    outputs = net.head(MMSEG, fourth)
    names = ("auxiliary_head.convs.0.conv", "auxiliary_head.convs.0.bn")
    outputs["backbone"] = net.conv("auxiliary_head.conv_seg", net.conv_norm_relu(names, third))
    return _enlarged(outputs, image, align_corners=align_corners)


def _enlarged(outputs, image, align_corners):
    size = image.shape[-2:]
    return {
        name: F.interpolate(x, size, mode="bilinear", align_corners=align_corners)
        for name, x in outputs.items()
    }
