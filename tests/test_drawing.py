"""Pictures show what they claim: colours of the table, attention where the numbers are."""

import functools

import numpy as np
import pytest
import torch

from danet.errors import StorageError
from danet.evaluation.inference import Sliding
from danet.models.heads.dual import DualAttentionHead, FCNHead, SingleAttentionHead
from danet.models.resnet import ResNet
from danet.models.segmentor import Segmentor
from danet.types import Sample
from danet.visualization import attention, overlay
from danet.visualization.figure import figure, heatmap, validation_pictures
from danet.visualization.overlay import SegmentedImage

CLASSES = ("sky", "road", "a class with a long name", "car")
PALETTE = ((70, 130, 180), (128, 64, 128), (10, 200, 30), (0, 0, 142))


@pytest.fixture
def scene():
    image = np.full((60, 200, 3), 100, np.uint8)
    mask = np.zeros((60, 200), np.uint8)
    mask[30:] = 1
    mask[40:50, 20:40] = 3
    mask[:5, :5] = 255
    return image, mask


@pytest.fixture
def picture(scene):
    image, truth = scene
    prediction = np.where(truth == 255, 0, truth).astype(np.uint8)
    return SegmentedImage("x", image, prediction, truth)


DUAL = functools.partial(DualAttentionHead, reduction=2)


def network(head):
    return Segmentor(ResNet(depth=18, width=8), functools.partial(head, num_classes=4)).eval()


def test_an_overlay_mixes_the_colours_of_the_table(scene):
    image, mask = scene
    drawn = overlay.overlay(image, mask, PALETTE, opacity=0.5)
    assert drawn[45, 30].tolist() == [50, 50, 121]
    assert drawn[0, 0].tolist() == [100, 100, 100]
    assert overlay.colorize(mask, PALETTE)[45, 30].tolist() == [0, 0, 142]
    assert overlay.colorize(mask, PALETTE)[0, 0].tolist() == [0, 0, 0]


def test_errors_are_red_and_ignored_pixels_black(picture):
    picture.prediction[20, 100] = 3
    picture.prediction[0, 0] = 1
    drawn = overlay.panels_of(picture, PALETTE)[-1][18:]  # below the title
    assert drawn[20, 100].tolist() == [220, 40, 40]
    assert drawn[0, 0].tolist() == [0, 0, 0]
    assert (drawn == (220, 40, 40)).all(axis=2).sum() == 1


@pytest.mark.parametrize("width", [60, 200, 700])
def test_the_legend_shows_every_present_class_and_no_other(width):
    drawn = overlay.with_legend(np.zeros((1, width, 3), np.uint8), CLASSES, PALETTE, {0, 2, 3})
    assert drawn.shape[1] == width
    colors = {tuple(c) for c in drawn.reshape(-1, 3).tolist()}
    assert {PALETTE[0], PALETTE[2], PALETTE[3]} <= colors
    assert PALETTE[1] not in colors


def test_a_sheet_has_truth_only_where_there_is_one(picture):
    with_truth = overlay.sheet(picture, CLASSES, PALETTE)
    without = overlay.sheet(picture._replace(truth=None), CLASSES, PALETTE)
    assert with_truth.shape[0] > without.shape[0]
    assert with_truth.shape[1] == without.shape[1] == 200


def test_a_picture_is_written_with_its_colours_under_any_name(tmp_path, scene):
    from PIL import Image

    path = tmp_path / "neu" / "Straße 图.png"
    overlay.save_image(path, overlay.colorize(scene[1], PALETTE))
    assert np.array(Image.open(path))[45, 30].tolist() == [0, 0, 142]
    with pytest.raises(StorageError, match=r"blocked.png"):
        overlay.save_image(path / "blocked.png", scene[0])


def test_position_maps_are_the_rows_of_the_chosen_pixels():
    model = network(DUAL)
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    points = [attention.Point(0, 0), attention.Point(95, 63), attention.Point(50, 20)]
    maps = attention.position_maps(model, image, points)
    assert maps.shape == (3, 8, 12)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(3))
    x = model.head.position.reduce(model.backbone(model.normalise(image))[-1])
    module = model.head.position.attention
    q, k = module.query(x).flatten(2)[0], module.key(x).flatten(2)[0]
    full = (q.T @ k).softmax(dim=-1).view(96, 8, 12)
    torch.testing.assert_close(maps, full[[0, 95, 2 * 12 + 6]])


def test_channels_are_ranked_by_how_well_they_tell_a_class():
    prediction = np.zeros((32, 32), np.uint8)
    prediction[8:16, 8:16] = 2
    maps = torch.rand(5, 8, 8)
    maps[3] = 0
    maps[3, 2:4, 2:4] = 7
    maps[1] = maps[3] * 0.1 + torch.rand(8, 8) * 0.2
    ranked = attention.rank_channels(maps, prediction, 2)
    assert [channel for channel, _ in ranked[:2]] == [3, 1]
    assert sorted(channel for channel, _ in ranked) == list(range(5))
    by_hand = 7 / maps[3].std()
    assert ranked[0][1] == pytest.approx(by_hand.item())


def test_a_map_of_a_class_is_the_mean_over_its_cells():
    model = network(DUAL)
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    prediction = np.zeros((64, 96), np.uint8)
    prediction[16:32, 8:24] = 2  # cells (2..3, 1..2)
    prediction[0, 0] = 3  # no cell is this class for the most part
    points = [attention.Point(8 * c + 4, 8 * r + 4) for r in (2, 3) for c in (1, 2)]
    expected = attention.position_maps(model, image, points).mean(dim=0)
    torch.testing.assert_close(attention.class_map(model, image, prediction, 2), expected)
    corner = attention.position_maps(model, image, [attention.Point(0, 0)])[0]
    torch.testing.assert_close(attention.class_map(model, image, prediction, 3), corner)


def test_queries_and_keys_give_the_maps():
    model = network(DUAL)
    image = torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8)
    queries, keys = attention.queries_and_keys(model, image)
    weights = (queries.flatten(1).T @ keys.flatten(1)).softmax(dim=-1).view(8, 12, 8, 12)
    expected = attention.position_maps(model, image, [attention.Point(50, 20)])[0]
    torch.testing.assert_close(weights[2, 6], expected)


def test_points_lie_inside_wanted_or_rare_classes(picture):
    prediction = picture.prediction
    (point,) = attention.choose_points(prediction, wanted=[3, 2])
    assert prediction[point.y, point.x] == 3
    assert 24 <= point.x <= 35
    chosen = attention.choose_points(prediction, count=2)
    assert [int(prediction[p.y, p.x]) for p in chosen] == [3, 1]


POINTS = {"points": [attention.Point(30, 45), attention.Point(100, 10)]}
POSITION = functools.partial(SingleAttentionHead, reduction=2, attention="position")
CHANNEL = functools.partial(SingleAttentionHead, attention="channel")


@pytest.mark.parametrize(
    ("head", "options", "panels"),
    [
        (DUAL, POINTS, 7),
        (POSITION, POINTS, 5),
        (CHANNEL, POINTS, 5),
        (DUAL, {"wanted": [1, 3], "by_class": True, "channels": 2}, 1 + 2 + 2 * 2 + 2),
    ],
    ids=["dual", "position", "channel", "means of classes"],
)
def test_figure_6_has_a_panel_for_all_there_is(picture, head, options, panels):
    drawn = figure(network(head), picture, CLASSES, PALETTE, **options)
    rows = (drawn.shape[0] - panels * (60 + 18) - (panels - 1) * 4) / 18
    assert rows == int(rows) >= 1


class Pictures(list):
    """A data set of pictures that are there already."""

    classes, palette = CLASSES, PALETTE


def test_pictures_of_a_validation_pass_the_network_in_small_parts(scene):
    samples = Pictures(Sample(*scene, name) for name in "ab")
    model, seen = network(DUAL), []
    model.backbone.register_forward_pre_hook(lambda _, x: seen.append(x[0][0, 0].numel()))
    infer = Sliding(crop=(32, 32), stride=(32, 32), windows_per_batch=1)
    drawn = validation_pictures(model, samples, infer, max_pixels=1500, count=2)
    assert list(drawn) == ["a", "a_attention", "b"]
    assert max(seen) <= 1500


def test_no_channel_indicates_a_class_that_fills_the_picture(picture, monkeypatch):
    monkeypatch.setattr("danet.visualization.figure.rank_channels", None)  # not to be called
    picture.prediction[:] = 3
    figure(network(DUAL), picture, CLASSES, PALETTE)


def test_a_contact_sheet_has_a_line_for_each_picture_whatever_its_size(picture):
    tall = SegmentedImage("tall", *(np.rot90(array).copy() for array in picture[1:]))
    large = SegmentedImage("large", *(a.repeat(9, 0).repeat(9, 1) for a in picture[1:]))
    own = picture._replace(truth=None)
    lines = [picture, tall, own, overlay.thumbnail(large)]
    drawn = overlay.contact_sheet(lines, CLASSES, PALETTE)
    assert drawn.shape[1] == 4 * 292
    assert drawn.shape[0] == 4 * (18 + 4) + 60 + 200 + 60 + 86 + 18


@pytest.mark.parametrize("is_known", [True, False])
def test_side_by_side_shows_where_only_one_is_right(picture, is_known):
    second = picture.prediction.copy()
    second[50:55, 100:110] = 3
    picture.prediction[10:12, 50:60] = 3
    first = picture if is_known else picture._replace(truth=None)
    drawn = overlay.side_by_side(first, second, ("1st: a", "2nd: b"), CLASSES, PALETTE)
    pixels = drawn.reshape(-1, 3)

    def count(color):
        return int((pixels == color).all(axis=1).sum())

    if is_known:
        assert (count((30, 110, 220)), count((240, 130, 20))) == (50, 20)
    else:
        assert count((200, 0, 200)) == 70


def test_a_head_without_attention_says_so():
    assert not attention.has_attention(network(FCNHead))


def test_a_heatmap_goes_from_black_to_white():
    drawn = heatmap(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), (20, 20), color=False)
    assert drawn[0, 0].tolist() == [0, 0, 0]
    assert drawn[-1, -1].tolist() == [255, 255, 255]
    assert heatmap(torch.zeros(2, 2), (4, 4), color=True).shape == (4, 4, 3)
