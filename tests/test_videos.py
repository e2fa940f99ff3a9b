"""tiny/: videos found, decoded, split and sampled; synthetic clips, augmentation, pictures."""
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.helpers import turn_clockwise, write_video
from tiny import report
from tiny.augment import colour_jitter, flip, multi_scale_crop
from tiny.synthetic import MOTIONS, SyntheticClips, draw_scenes, film
from tiny.videos import (
    LongVideo,
    VideoClips,
    decode,
    decode_all,
    find_videos,
    load_videos,
    read_frames,
    split_videos,
)
from videomae import VideoMAEConfig, VideoMAEForPreTraining

HERE = Path(__file__).parent.parent
UCF101_MINI = HERE.parent / "shared/ucf101_mini"
TINY = VideoMAEConfig.preset("tiny")


def recipe(**changes):
    """What tiny/ reads of a recipe."""
    defaults = dict(fps=25.0, views=5, crops=3, max_minutes=60.0, cache_gb=1.0, split=1,
                    mask="tube", mask_ratio=0.75)
    return SimpleNamespace(**defaults | changes)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# --------------------------------------------------------------------------------------------------
# Decoded


def ramp(frames):
    """(frames, 48, 64, 3): each frame of one colour, which says when it is."""
    t = np.arange(frames)
    colours = np.stack([20 + 200 * t // frames, np.full(frames, 120), 200 - 150 * t // frames], 1)
    return np.tile(colours[:, None, None].astype(np.uint8), (1, 48, 64, 1))


def test_odd_videos_are_read_and_broken_ones_named(tmp_path, capsys):
    """What a folder of a real person holds: whatever can be decoded gives a clip."""
    video = ramp(40)
    video[:, :24] = 0  # the upper half is black
    folder = tmp_path / "A"
    write_video(folder / "good.avi", video)
    write_video(folder / "old.mpg", video, codec="mpeg1video")
    write_video(folder / "one frame.mp4", video[:1])
    write_video(folder / "five frames.mp4", video[:5])
    write_video(folder / "portrait.mp4", video.transpose(0, 2, 1, 3))
    write_video(folder / "turned.mp4", video)
    turn_clockwise(folder / "turned.mp4")
    write_video(folder / "grey.mkv", video, codec="ffv1", pix_fmt="gray")
    write_video(folder / "16 bit.mkv", video, codec="ffv1", pix_fmt="rgb48le")
    write_video(folder / "odd.mkv", video[:, :47, :63], codec="ffv1", pix_fmt="yuv444p10le")
    write_video(folder / "Bogenschießen 射箭.avi", video)
    whole = (folder / "good.avi").read_bytes()
    (folder / "truncated.avi").write_bytes(whole[: len(whole) * 3 // 4])
    (folder / "empty.mp4").touch()
    (folder / "text.mp4").write_text("hello")
    files = [*sorted(folder.iterdir()), folder / "missing.mp4"]

    decoded = decode_all(files, 32, recipe(cache=tmp_path / "cache"))
    lengths = {file.name: len(np.load(path)) for file, path in decoded.items()}
    assert lengths.pop("truncated.avi") in range(1, 40)
    assert lengths == {
        "good.avi": 40, "old.mpg": 40, "one frame.mp4": 1, "five frames.mp4": 5, "portrait.mp4": 40,
        "turned.mp4": 40, "grey.mkv": 40, "16 bit.mkv": 40, "odd.mkv": 40,
        "Bogenschießen 射箭.avi": 40,
    }
    left_out = re.findall(r"left out: .*/(\w+\.mp4)", capsys.readouterr().out)
    assert sorted(left_out) == ["empty.mp4", "missing.mp4", "text.mp4"]

    labels = torch.zeros(len(decoded), dtype=torch.int64)
    clips = VideoClips(["A"], list(decoded.values()), labels, TINY, recipe())
    for random in (None, torch.rand(10, 4)):
        assert clips.load(torch.arange(10), random).shape == (10, 8, 3, 32, 32)
    turned = np.load(decoded[folder / "turned.mp4"])[0].astype(int)
    assert turned.shape[0] > turned.shape[1]
    assert turned[:, -8:].mean() < 30 < turned[:, :8].mean(), "black on the right"


def test_decoded_frames_are_the_video(tmp_path):
    """Colours and order survive the way from a file to a clip; a short video holds its last."""
    write_video(tmp_path / "A/one.mp4", ramp(6))
    some = recipe(cache=tmp_path / "cache")
    decoded = decode(tmp_path / "A/one.mp4", 32, some)
    labels = torch.zeros(1, dtype=torch.int64)
    clips = VideoClips(["A"], [decoded], labels, TINY, recipe())
    clip = clips.load(torch.tensor([0]))[0]  # (8, 3, 32, 32)
    expected = torch.from_numpy(ramp(6)[[0, 1, 2, 3, 4, 5, 5, 5], 0, 0]).float()
    assert (clip.float().mean(dim=(2, 3)) - expected).abs().max() < 6
    time = decoded.stat().st_mtime_ns
    assert decode(tmp_path / "A/one.mp4", 32, some) == decoded
    assert decoded.stat().st_mtime_ns == time, "decoded once"


def seconds_seen(path, length, fps):
    """The time of each frame of a video made of `ramp`, read off its colour."""
    red = np.stack(list(read_frames(path, 32, fps)))[..., 0].mean(axis=(1, 2))
    return (red - 20) / 200 * length


def test_time_counts_and_not_frames(tmp_path):
    """The same two seconds at 25, 30 and 60 frames a second, and at a rate that changes, give the
    same frames, to within one frame of the video."""
    for rate in (25, 30, 60):
        write_video(tmp_path / f"{rate}.mp4", ramp(2 * rate), rate=rate)
    stamps = np.concatenate([np.arange(0, 500, 40), np.arange(500, 2000, 100)])  # milliseconds
    frames = ramp(2000)[stamps]
    write_video(tmp_path / "changes.mkv", frames, rate=1000, stamps=stamps)
    for name, slowest in (("25.mp4", 25), ("30.mp4", 30), ("60.mp4", 60), ("changes.mkv", 10)):
        seen = seconds_seen(tmp_path / name, 2.0, 6.25)
        assert len(seen) in (12, 13), name
        expected = np.arange(len(seen)) / 6.25
        assert np.abs(seen - expected).max() < 1 / slowest + 0.04, name  # 0.04: of the coding
    assert len(seconds_seen(tmp_path / "25.mp4", 2.0, 50)) in (99, 100), "frames are repeated"


def test_long_videos_are_bounded_and_only_their_windows_are_decoded(tmp_path, capsys):
    write_video(tmp_path / "long.mp4", ramp(1500))  # a minute
    write_video(tmp_path / "live.mkv", ramp(1500), live="1")  # its header does not say how long
    for name in ("long.mp4", "live.mkv"):
        video = LongVideo(tmp_path / name, TINY, recipe(views=4, crops=1))
        for view in range(4):
            clip = video.load(torch.tensor([0]), view=view)[0]  # (8, 3, 32, 32)
            red = clip[:, 0].float().mean(dim=(1, 2))
            start = (view + 0.5) / 4 * (60 - 8 / 25)
            assert (red - 20 - 200 * start / 60).abs().max() < 4, "spread over the whole length"

    files, some = [tmp_path / "long.mp4"], recipe(max_minutes=0.5, fps=5.0, cache=tmp_path)
    (decoded,) = decode_all(files, 32, some).values()
    assert len(np.load(decoded)) == 150
    said = "about 0.00 GB for 0.5 of 1.0 minutes of video, the first 0.5 of each"
    assert said in capsys.readouterr().out
    some.cache_gb = 1e-6
    with pytest.raises(ValueError, match="--cache-gb: got 1e-06"):
        decode_all(files, 32, some)


def test_a_killed_decode_leaves_nothing_that_counts(tmp_path):
    write_video(tmp_path / "long.mp4", ramp(3000))
    code = ("import sys; from types import SimpleNamespace; from pathlib import Path;"
            "from tiny.videos import decode; print(decode(Path('long.mp4'), 32,"
            "SimpleNamespace(fps=25.0, max_minutes=60.0, cache='cache')))")
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path,
                               env=os.environ | {"PYTHONPATH": str(HERE)})
    while not list(tmp_path.glob("cache/*.tmp")):
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not list(tmp_path.glob("cache/*.npy"))
    decoded = decode(tmp_path / "long.mp4", 32, recipe(cache=tmp_path / "cache"))
    assert np.load(decoded, mmap_mode="r").shape == (3000, 32, 43, 3)


def test_views_and_crops(tmp_path):
    """Which frames and places make a clip, read off a video whose colours say time and column."""
    video = np.zeros((50, 32, 96, 3), dtype=np.uint8)
    video[..., 0] = 5 * np.arange(50)[:, None, None]
    video[..., 1] = 2 * np.arange(96)
    np.save(tmp_path / "video.npy", video)
    zero = torch.tensor([0])

    def clips(**changes):
        return VideoClips(["A"], [tmp_path / "video.npy"], zero, TINY, recipe(**changes))

    def times(clip):
        return (clip[0, :, 0, 0, 0] // 5).tolist()

    six = clips(views=2, crops=3)
    loaded = [six.load(zero, view=view) for view in range(six.num_views)]
    # A quarter and three quarters of the 43 starts, and three places at each.
    assert [times(x)[0] for x in loaded] == [10, 10, 10, 32, 32, 32]
    assert [int(x[0, 0, 1, 0, 0]) // 2 for x in loaded] == [0, 32, 64] * 2
    assert all(np.diff(times(x)).tolist() == [1] * 7 for x in loaded)

    drawn = [six.load(zero, torch.rand(1, 4)) for _ in range(600)]
    assert {times(x)[0] for x in drawn} == set(range(43)), "every start there is"
    lefts = {int(x[0, 0, 1, 0, 0]) // 2 for x in drawn}
    assert min(lefts) < 4 and max(lefts) > 64 and len(lefts) > 40, "anywhere"
    again = torch.rand(1, 4)
    assert torch.equal(six.load(zero, again), six.load(zero, again))


# --------------------------------------------------------------------------------------------------
# Found and split


def split(folder, number=1):
    """-> {"train": [(class name, file name)], "test": ...}."""
    found = find_videos(folder, number)
    sides = split_videos(found, {file.parent.name for file, _ in found})
    return {side: [(file.parent.name, file.name) for file in files]
            for side, files in zip(("train", "test"), sides, strict=True)}


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_folders_split_by_scene_by_lists_or_as_they_are(tmp_path):
    clips = [(g, c) for g in range(1, 7) for c in (1, 2)]
    names = [f"{name}/v_{name}_g{g:02}_c{c:02}.avi" for name in "AB" for g, c in clips]
    touch(tmp_path, *names, "A/notes.txt", "A/._v_A_g01_c01.avi")
    sides = split(tmp_path)
    scenes = {side: {(name, file[4:7]) for name, file in sides[side]} for side in sides}
    assert scenes["test"] == {("A", "g01"), ("A", "g06"), ("B", "g01"), ("B", "g06")}
    assert not scenes["train"] & scenes["test"]
    assert (len(sides["train"]), len(sides["test"])) == (16, 8)

    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    for number, g in ((1, 1), (2, 5)):
        trained = "A/v_A_g02_c01.avi 1\nB/v_B_g02_c01.avi 2\nC/not_here.avi 3\n"
        (lists / f"trainlist0{number}.txt").write_text(trained)
        tested = "".join(f"{name}/v_{name}_g0{g}_c01.avi\n" for name in "AB")
        (lists / f"testlist0{number}.txt").write_text(tested)
        tested = [("A", f"v_A_g0{g}_c01.avi"), ("B", f"v_B_g0{g}_c01.avi")]
        assert split(tmp_path, number)["test"] == tested
        assert [name for name, _ in split(tmp_path, number)["train"]] == ["A", "B"]
    with pytest.raises(FileNotFoundError, match="trainlist03.txt"):
        split(tmp_path, 3)

    (tmp_path / "train.csv").write_text("B/v_B_g02_c01.avi 0\n\nA/v_A_g02_c01.avi 1\n")
    with pytest.raises(FileNotFoundError, match="val.csv"):
        split(tmp_path)
    (tmp_path / "val.csv").write_text(f"{tmp_path}/A/v 1.avi 1\nB/v_B_g01_c01.avi 0\n")
    assert split(tmp_path) == {"train": [("A", "v_A_g02_c01.avi"), ("B", "v_B_g02_c01.avi")],
                               "test": [("A", "v 1.avi"), ("B", "v_B_g01_c01.avi")]}

    for held_out in ("val", "test"):
        touch(tmp_path / "own", *(f"train/{name}/1.mp4" for name in "AB"))
        touch(tmp_path / "own", *(f"{held_out}/{name}/{held_out}.MP4" for name in "AB"))
        tested = [("A", f"{held_out}.MP4"), ("B", f"{held_out}.MP4")]
        assert split(tmp_path / "own") == {"train": [("A", "1.mp4"), ("B", "1.mp4")],
                                           "test": tested}


def test_folders_that_cannot_be_used_are_refused(tmp_path):
    def load(folder):
        return load_videos(TINY, recipe(data=folder, cache=tmp_path / "cache"))

    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ValueError, match="--data: got no video in .*Class/"):
            load(folder)
    touch(tmp_path, "A/one.mp4", "A/two.mp4")
    with pytest.raises(ValueError, match=r"--data: got \['A'\] in .* two classes or more"):
        load(tmp_path)
    touch(tmp_path, "B/one.mp4")
    with pytest.raises(ValueError, match="--data: no train video of class B"):
        load(tmp_path)


def test_a_broken_file_does_not_take_a_class_its_test_scene(tmp_path, capsys):
    """The first scene of each class is for testing; of B, it is the first that can be read."""
    data = tmp_path / "data"
    for name in "AB":
        for g in (1, 2, 3):
            frames = ramp(4 + g + 3 * (name == "B"))
            write_video(data / f"{name}/v_{name}_g{g:02}_c01.avi", frames)
    broken = data / "B/v_B_g01_c01.avi"
    broken.write_bytes(b"not a video")
    some = recipe(data=data, cache=tmp_path / "cache")
    train_clips, test_clips = load_videos(TINY, some)
    assert train_clips.classes == ["A", "B"]
    assert (train_clips.labels.tolist(), test_clips.labels.tolist()) == ([0, 0, 1], [0, 1])
    said = f"left out: {broken}: cannot be decoded, expected a video\n"
    assert capsys.readouterr().out.endswith(said)
    assert train_clips.load(torch.arange(3)).shape == (3, 8, 3, 32, 32)
    assert not set(train_clips.videos) & set(test_clips.videos)
    (data / "B/v_B_g02_c01.avi").write_bytes(b"nor this one")
    with pytest.raises(ValueError, match="--data: no train video of class B that can be read"):
        load_videos(TINY, some)


@pytest.mark.skipif(not UCF101_MINI.is_dir(), reason="needs the real clips in ../shared")
def test_real_clips(tmp_path):
    sides = split(UCF101_MINI)
    assert [len(sides[side]) for side in ("train", "test")] == [58, 23]
    config, names = VideoMAEConfig.preset("laptop"), ["Punch", "YoYo"]
    files = [next((UCF101_MINI / name).iterdir()) for name in names]
    decoded = decode_all(files, 112, recipe(cache=tmp_path))
    clips = VideoClips(names, list(decoded.values()), torch.arange(2), config, recipe())
    loaded = clips.load(torch.arange(2))
    assert loaded.shape == (2, 16, 3, 112, 112) and loaded.float().std() > 20


# --------------------------------------------------------------------------------------------------
# Augmentation


def test_augmentations():
    """Each changes what it should and keeps what it must."""
    clip = torch.randn(64, 2, 3, 8, 8)
    random = torch.cat([torch.rand(64, 9), torch.randn(64, 3)], dim=1)

    flipped = flip(clip, random[:, 0])
    mirrored = (flipped == clip.flip(-1)).flatten(1).all(dim=1)
    assert 15 < mirrored.sum() < 49 and torch.equal(flipped[~mirrored], clip[~mirrored])

    jittered, signs = colour_jitter(clip, random), set()
    for before, after in zip(clip, jittered, strict=True):
        # Each channel is a straight function of one channel before, alike in time.
        channels = torch.cat([before, after], dim=1).transpose(0, 1).flatten(1)  # (6, T H W)
        correlation = channels.corrcoef()[3:, :3]
        is_source = correlation.abs() > 0.9999
        assert is_source.sum() == 3
        signs.add(tuple(correlation[is_source].sign().tolist()))
    assert len(signs) == 8, "each channel is negated or not, whatever the others are"
    assert jittered.std(dim=(1, 3, 4)).std(dim=1).min() > 0.005, "and has its own contrast"

    frames = torch.arange(40 * 60).byte().view(1, 1, 40, 60).expand(2, 3, -1, -1)
    crops = [multi_scale_crop(frames, 32, random) for random in torch.rand(50, 3).tolist()]
    assert all(crop.shape == (2, 3, 32, 32) for crop in crops)
    assert len({int(crop.float().mean()) for crop in crops}) > 5
    for corner in ([0.0] * 3, [1.0] * 3):
        assert multi_scale_crop(frames, 32, corner).shape == (2, 3, 32, 32)


# --------------------------------------------------------------------------------------------------
# Synthetic clips: the label is the motion, and no single frame gives it away


def test_the_middle_frame_does_not_depend_on_the_label():
    """The same draws with another label: the middle frame is the same to the last bit."""
    scenes = draw_scenes(8, 64, torch.Generator().manual_seed(0))
    clips = torch.stack([
        film(scenes, torch.full((64,), label), 8, 32, torch.Generator().manual_seed(1))
        for label in range(len(MOTIONS))
    ])  # (8, 64, T, 3, H, W)
    assert (clips[:, :, 4] == clips[:1, :, 4]).all()
    for frame in (0, 1, 2, 3, 5, 6, 7):
        assert all((clips[i, :, frame] != clips[j, :, frame]).any()
                   for i in range(8) for j in range(i))


def test_a_single_frame_gives_at_most_zoom_in_from_zoom_out_away():
    """The best cue in one frame is how fine it is. Learned on other clips, it says nothing of the
    middle frame, and of the first less than which way each zoom goes (2 of 8 classes more)."""
    train_clips, test_clips = (SyntheticClips(3000, TINY, seed) for seed in (11, 12))

    def fineness(clips, frame):
        return clips.clips[:, frame].float().diff(dim=-1).square().mean(dim=(1, 2, 3))

    def top1(frame):
        fine, test_fine = fineness(train_clips, frame), fineness(test_clips, frame)
        edges = fine.quantile(torch.linspace(0, 1, 21)[1:-1])  # 20 bins, each with its usual label
        counts = torch.zeros(20, len(MOTIONS))
        bins = torch.bucketize(fine, edges), train_clips.labels
        counts.index_put_(bins, torch.ones(3000), accumulate=True)
        predictions = counts.argmax(dim=1)[torch.bucketize(test_fine, edges)]
        return (predictions == test_clips.labels).float().mean().item()

    assert top1(4) < 0.155 and top1(0) < 0.30  # chance is 0.125


def motion_by_optical_flow(clips):
    """(B, T, C, 32, 32) uint8 -> (B,) MOTIONS index: least squares of I_t + u . grad I = 0, where
    u = shift + rotation * (-y, x) + zoom * (x, y)."""
    video = clips.float()
    average = (video[:, 1:] + video[:, :-1]) / 2
    dt = (video[:, 1:] - video[:, :-1])[..., 1:-1, 1:-1]
    dx = (average[..., 1:-1, 2:] - average[..., 1:-1, :-2]) / 2
    dy = (average[..., 2:, 1:-1] - average[..., :-2, 1:-1]) / 2
    y, x = torch.meshgrid(torch.arange(30) - 14.5, torch.arange(30) - 14.5, indexing="ij")
    # Turning about another centre is the same turn and a shift, so the shift is free here.
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
# Pictures and tables


def test_the_table_has_a_row_for_each_way_and_a_spread_for_several_runs():
    def summary(data, plus=0.0):
        return dict(
            recipe=dict(data=data, labels_per_class=2), finetune_top1=60 + plus,
            finetune_balanced=50.0, linear_probe_top1=40.0, linear_probe_balanced=10.0,
            majority_top1=25.0, majority_balanced=20.0, scratch_full_time_top1=30.0 + plus,
            seconds=dict(pretrain=100.0, finetune=10 + plus, scratch_full_time=110.0))

    assert report.table([summary("synthetic")]).splitlines() == [
        "| 2 labels per class | top-1, % | seconds |",
        "| --- | --- | --- |",
        "| from scratch | 30.0 | 110 |",
        "| pretrained, linear probe | 40.0 | 100 |",
        "| pretrained, fine-tuned | 60.0 | 100 + 10 |",
        "| always the largest class | 25.0 |  |",
    ]
    runs = [summary("folder"), summary("folder", plus=2.0)]
    for run in runs:
        del run["scratch_full_time_top1"]
    assert report.table(runs).splitlines() == [
        "| 2 labels per class | top-1, % | balanced, % | seconds |",
        "| --- | --- | --- | --- |",
        "| pretrained, linear probe | 40.0 +- 0.0 | 10.0 +- 0.0 | 100 |",
        "| pretrained, fine-tuned | 61.0 +- 1.4 | 50.0 +- 0.0 | 100 + 11 |",
        "| always the largest class | 25.0 +- 0.0 | 20.0 +- 0.0 |  |",
    ]
    runs[1]["recipe"]["labels_per_class"] = 5
    with pytest.raises(ValueError, match="labels per class, expected the same"):
        report.table(runs)


def test_pictures_are_drawn_and_say_what_is_borrowed(tmp_path, monkeypatch):
    from PIL import Image

    clips, saved = SyntheticClips(6, TINY, seed=1), []
    save_gif = report.save_gif

    def save_and_listen(pictures, text, path):
        saved.append((pictures, text))
        save_gif(pictures, text, path)

    monkeypatch.setattr(report, "save_gif", save_and_listen)
    for norm_pix_loss in (True, False):
        config = VideoMAEConfig.preset("tiny", norm_pix_loss=norm_pix_loss)
        report.draw_reconstruction(VideoMAEForPreTraining(config), clips, recipe(),
                                   tmp_path / "moving.gif")
    assert ["borrow mean and contrast" in text for _, text in saved] == [True, False]
    assert Image.open(tmp_path / "moving.gif").n_frames == 8
    # Rows: original, masked with grey, reconstruction. Visible patches are equal.
    rows = saved[0][0].unflatten(1, (3, -1)).transpose(0, 1)  # (3, T, H, 4 W, 3)
    is_grey = (rows[1] == 0.5).all(dim=-1)
    assert is_grey.float().mean() == 0.75
    same = (rows[0] == rows[2]).all(dim=-1)
    assert same[~is_grey].all() and same[is_grey].float().mean() < 0.5

    metrics = [dict(stage=stage, step=step, loss=1 / (step + 1))
               for stage in ("pretrain", "finetune") for step in range(150)]
    report.draw_curves(metrics, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 300
