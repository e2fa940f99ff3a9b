"""Tests of tiny/ except videos: synthetic clips, colours, evaluation, pictures and tables."""
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tiny import report
from tiny.augment import colour_jitter
from tiny.evaluate import (
    accuracies,
    choose_labelled,
    features,
    linear_probe,
    probabilities,
    start_from_probe,
)
from tiny.synthetic import MOTIONS, TEST_SEED, SyntheticClips, draw_scenes, film
from videomae import (
    VideoMAEConfig,
    VideoMAEForPreTraining,
    VideoMAEForVideoClassification,
    VideoMAEModel,
    normalize,
    patchify,
    random_mask,
)

TINY = VideoMAEConfig.preset("tiny")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------------
# Synthetic clips: the label is the motion, and no single frame gives it away


def test_the_same_seed_gives_the_same_clips_and_keeps_the_global_generator():
    before = torch.get_rng_state()
    clips, again, others = (SyntheticClips(20, TINY, seed) for seed in (5, 5, 6))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(clips.clips, again.clips) and torch.equal(clips.labels, again.labels)
    assert not torch.equal(clips.clips, others.clips)
    index = torch.tensor([3, 0])
    assert torch.equal(clips.train_clips(index), clips.clips[index])
    assert torch.equal(clips.test_views(3), normalize(clips.clips[3:4]))
    for wrong in (dict(image_size=(32, 40)), dict(num_channels=1)):
        with pytest.raises(ValueError, match="synthetic clips: got .* expected 3 channels and"):
            SyntheticClips(20, VideoMAEConfig.preset("tiny", **wrong), 0)


def test_the_middle_frame_does_not_depend_on_the_label():
    """With the same random draws, every label gives the same middle frame, bit for bit."""
    def clips(label):
        torch.manual_seed(1)
        return film(scenes, torch.full((64,), label), 8, 32)

    scenes = draw_scenes(8, 64)
    clips = torch.stack([clips(label) for label in range(len(MOTIONS))])  # (8, 64, T, 3, H, W)
    assert (clips[:, :, 4] == clips[:1, :, 4]).all()
    for frame in (0, 1, 2, 3, 5, 6, 7):
        assert all((clips[i, :, frame] != clips[j, :, frame]).any()
                   for i in range(8) for j in range(i))


def test_a_single_frame_tells_at_most_zoom_in_from_zoom_out():
    """The best cue in one frame is how fine it is. In the middle frame this does little better than
    chance, and in the first it gains less than recognizing both zooms (2 of 8 classes) would."""
    train_clips, test_clips = (SyntheticClips(3000, TINY, seed) for seed in (11, 12))

    def fineness(clips, frame):
        return clips.clips[:, frame].float().diff(dim=-1).square().mean(dim=(1, 2, 3))

    def top1(frame):
        fine, test_fine = fineness(train_clips, frame), fineness(test_clips, frame)
        edges = fine.quantile(torch.linspace(0, 1, 21)[1:-1])  # 20 bins, each predicting one label
        counts = torch.zeros(20, len(MOTIONS))
        bins = torch.bucketize(fine, edges), train_clips.labels
        counts.index_put_(bins, torch.ones(3000), accumulate=True)
        predictions = counts.argmax(dim=1)[torch.bucketize(test_fine, edges)]
        return (predictions == test_clips.labels).float().mean().item()

    assert top1(4) < 0.155 and top1(0) < 0.30  # chance is 0.125


def motion_by_optical_flow(clips):
    """(B, T, C, 32, 32) uint8 -> (B,) MOTIONS index by least squares of I_t + u . grad I = 0, where
    u = shift + rotation * (-y, x) + zoom * (x, y)."""
    video = clips.float()
    average = (video[:, 1:] + video[:, :-1]) / 2
    dt = (video[:, 1:] - video[:, :-1])[..., 1:-1, 1:-1]
    dx = (average[..., 1:-1, 2:] - average[..., 1:-1, :-2]) / 2
    dy = (average[..., 2:, 1:-1] - average[..., :-2, 1:-1]) / 2
    y, x = torch.meshgrid(torch.arange(30) - 14.5, torch.arange(30) - 14.5, indexing="ij")
    # A turn about another centre is the same turn plus a shift, so a shift is fitted too.
    columns = torch.stack([dx, dy, dy * x - dx * y, dx * x + dy * y], dim=-1)
    dt = -dt.flatten(1)[..., None]
    solution = torch.linalg.lstsq(columns.flatten(1, -2), dt).solution[..., 0]
    shift_x, shift_y, rotation, zoom = solution.unbind(dim=1)
    zoom = 2.2 * zoom  # zooms are half as fast as turns
    turning = torch.stack([rotation, -rotation, zoom, -zoom], dim=1)
    straight = torch.stack([-shift_x, shift_x, -shift_y, shift_y], dim=1)
    strongest, turn = turning.max(dim=1)
    return torch.where(strongest > 0.1, 4 + turn, straight.argmax(dim=1))


def test_motion_gives_the_label_and_reversed_clips_have_the_opposite_one():
    clips = SyntheticClips(500, TINY, seed=3)
    right = motion_by_optical_flow(clips.clips) == clips.labels
    reversed_right = motion_by_optical_flow(clips.clips.flip(1)) == clips.labels ^ 1
    assert right.float().mean() > 0.7 and reversed_right.float().mean() > 0.7


# --------------------------------------------------------------------------------------------------
# Colours and evaluation


def test_colour_jitter_changes_colours_and_nothing_else():
    clip, signs = torch.randn(64, 2, 3, 8, 8), set()
    jittered = colour_jitter(clip)
    for before, after in zip(clip, jittered, strict=True):
        # Each channel is a linear function of one input channel, the same in all frames.
        channels = torch.cat([before, after], dim=1).transpose(0, 1).flatten(1)  # (6, T H W)
        correlation = channels.corrcoef()[3:, :3]
        is_source = correlation.abs() > 0.9999
        assert is_source.sum() == 3
        signs.add(tuple(correlation[is_source].sign().tolist()))
    assert len(signs) == 8, "each channel is negated independently"
    assert jittered.std(dim=(1, 3, 4)).std(dim=1).min() > 0.005, "each channel has its own contrast"


class TwoViews:
    """A data set as described in tiny/__init__.py: noise whose mean is the label."""

    classes = ["dark", "bright", "blinding"]
    labels = torch.tensor([0, 0, 0, 1, 1, 2, 0, 1, 2, 2, 2])

    def test_views(self, index):
        torch.manual_seed(index)
        return torch.randn(2, 8, 3, 32, 32) + self.labels[index]


def test_predictions_and_features_are_means_over_views():
    clips, everything = TwoViews(), torch.arange(11)
    config = VideoMAEConfig.preset("tiny", num_labels=3, drop_path_rate=0.5, use_mean_pooling=True)
    classifier, encoder = VideoMAEForVideoClassification(config), VideoMAEModel(config)
    shares, tokens = probabilities(classifier, clips), features(encoder, clips, everything)
    with torch.no_grad():
        for i in everything.tolist():
            views = clips.test_views(i)
            expected = classifier(views).logits.softmax(dim=1).mean(dim=0)
            torch.testing.assert_close(shares[i], expected)
            expected = encoder(views).last_hidden_state.mean(dim=(0, 1))
            torch.testing.assert_close(tokens[i], expected)
    assert linear_probe(encoder, clips, everything[:6], clips)["top1"] == 100
    before = {name: x.clone() for name, x in classifier.state_dict().items()}
    start_from_probe(classifier, clips, everything[:6])
    assert torch.equal(probabilities(classifier, clips).argmax(dim=1), clips.labels)
    changed = [name for name, x in classifier.state_dict().items() if (x != before[name]).any()]
    assert changed == ["classifier.weight", "classifier.bias"]


def test_accuracies_and_labels():
    predictions, labels = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 2])
    assert accuracies(predictions, labels) == dict(top1=75.0, mean_class=50.0)
    labels = torch.arange(30) % 3
    for seed in (0, 1):
        chosen = choose_labelled(labels, 4, seed)
        assert len(set(chosen.tolist())) == 12 and labels[chosen].bincount().tolist() == [4, 4, 4]
    assert set(chosen.tolist()) != set(choose_labelled(labels, 4, 0).tolist())
    assert torch.equal(choose_labelled(labels, 0, 0), torch.arange(30))
    with pytest.raises(ValueError, match="--labels-per-class: got 11, but class . has only 10"):
        choose_labelled(labels, 11, 0)


# --------------------------------------------------------------------------------------------------
# Pictures and tables


def test_the_table_has_a_row_per_method_and_intervals_over_seeds():
    def run(seed=0, plus=0.0, **recipe):
        recipe = dict(data="", init="", pretrain_steps=1600, labels_per_class=2, seed=seed) | recipe
        return dict(recipe=recipe, results={
            "pretraining": dict(seconds=100.0),
            "linear probe": dict(top1=40.0, mean_class=10.0),
            "fine-tuning": dict(top1=60.0 + plus, mean_class=50.0, seconds=10 + plus),
            "from scratch": dict(top1=30.0, mean_class=20.0, seconds=110.0),
            "majority class": dict(top1=25.0, mean_class=20.0),
        })

    assert report.table([run()]).splitlines() == [
        "| 2 labels per class | top-1, % | seconds |",
        "| --- | --- | --- |",
        "| from scratch | 30.0 | 110 |",
        "| pretrained (1,600 steps), linear probe | 40.0 | 100 |",
        "| pretrained (1,600 steps), fine-tuned | 60.0 | 100 + 10 |",
        "| majority class (chance) | 25.0 |  |",
    ]
    others = [run(seed, plus, init="a", data="x") for seed, plus in ((0, 2.0), (1, 4.0))]
    for each in others:  # as with --init and --scratch-steps 0
        del each["results"]["from scratch"], each["results"]["pretraining"]
    runs = [run(0, data="x"), run(1, 1.0, data="x"), *others]
    runs[1]["results"]["from scratch"]["top1"] = 90.0
    assert [line.split(" | ")[::3] for line in report.table(runs).splitlines()[2:]] == [
        ["| from scratch", ""],
        ["| pretrained (1,600 steps), linear probe", "-20.0 [-401.3, 361.3], no clear difference"],
        ["| pretrained (a), linear probe", "-20.0 [-401.3, 361.3], no clear difference"],
        ["| pretrained (1,600 steps), fine-tuned", "+0.5 [-374.4, 375.4], no clear difference"],
        ["| pretrained (a), fine-tuned", "+3.0 [-365.6, 371.6], no clear difference"],
        ["| majority class (chance)", ""],
    ]
    assert report.paired([7.0, 8.0, 9.0], [1.0, 1.0, 1.0]) == "+7.0 [4.5, 9.5]"
    assert report.paired(range(11), [0.0] * 11).startswith("+5.0 ["), "more than ten seeds"
    runs[1]["recipe"]["labels_per_class"] = 5
    with pytest.raises(ValueError, match="2 and 5 labels"):
        report.table(runs)


@pytest.mark.parametrize("name", ["pretrained", "drawn"])
def test_a_model_in_the_repository_has_the_loss_that_its_readme_reports(name):
    folder = Path(__file__).parent.parent / "tiny" / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4e6
    model = VideoMAEForPreTraining.from_pretrained(folder)
    clips = SyntheticClips(64, model.config, TEST_SEED)
    torch.manual_seed(0)
    mask = random_mask("tube", 64, model.config.grid, 0.75)
    with torch.no_grad():
        loss = model(normalize(clips.clips), mask).loss.item()
    assert f"held-out clips is {loss:.3f}" in (folder / "README.md").read_text().replace("\n", " ")


def test_the_picture_shows_what_the_model_adds(tmp_path):
    model = VideoMAEForPreTraining(TINY)
    clip = SyntheticClips(1, TINY, seed=1).clips
    masked = random_mask("tube", 1, TINY.grid, 0.9)
    shown, seen, flat, filled = report.draw_panels(model, normalize(clip), masked)[:, 0]
    assert (shown.int() - clip[0].movedim(1, -1)).abs().max() <= 1  # rounding
    is_grey = (seen == 127).all(dim=-1)  # (T, H, W)
    assert is_grey.float().mean() == 0.875, "14 of 16 positions, not 90 %"
    for panel in (seen, flat, filled):
        assert (panel == shown)[~is_grey].all()
    assert (shown == filled).all(dim=-1)[is_grey].float().mean() < 0.5
    patches = patchify(flat.movedim(-1, 1)[None], TINY)[masked]  # (14 x 4, pixels, channels)
    assert (patches == patches[:, :1]).all(), "of one colour, for lack of a model"
    assert model.decoder.head.weight.any(), "the model itself is as before"

    clips = SyntheticClips(6, TINY, seed=1)
    report.draw_reconstruction(model, clips, "tube", 0.9, tmp_path / "moving.gif", index=5)
    image = Image.open(tmp_path / "moving.gif")
    assert image.n_frames == 8 and image.size == (914, 248)


def test_curves_are_drawn(tmp_path):
    losses = (1 / np.arange(1, 151)).tolist()
    results = {"pretraining": dict(losses=losses), "linear probe": dict(top1=1.0),
               "fine-tuning": dict(losses=losses[:30])}
    report.draw_curves(results, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 300
