"""Videos from a folder: found, decoded once into a cache, split, and sampled as clips.

Wrong input raises a ValueError that names the option, what came and what was expected. `say` is a
function of a text for the user.
"""
import contextlib
import hashlib
import os
import re
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from tqdm import tqdm

from checkpoints import optional_import, write_whole
from tiny.augment import multi_scale_crop, square_crop
from videomae import VideoMAEConfig

SUFFIXES = (".avi", ".mp4", ".mkv", ".webm", ".mov")

# A file, the name of its class, and its side: "train", "test", or "" where its scene decides.
Video = tuple[Path, str, str]


def load_videos(folder: Path, config: VideoMAEConfig, recipe, split: int, cache: Path, say):
    """A folder, see `find_videos` -> VideoClips for training and for testing."""
    found = find_videos(folder, split)
    classes = list(dict.fromkeys(name for _, name, _ in found))
    if len(classes) < 2:
        raise ValueError(f"--data: got {classes or 'no video'} in {folder}, expected the videos of "
                         f"two classes or more, Class/*{{{','.join(SUFFIXES)}}}")
    split_videos(found, classes)  # what cannot be split is refused before hours of decoding
    files = list(dict.fromkeys(file for file, _, _ in found))  # a list may name one twice
    decoded = decode_all(files, config.image_hw[0], cache, recipe.max_broken, say)

    # Split anew without the broken files: one of them could be all that a class has for testing.
    sides = split_videos([video for video in found if video[0] in decoded], classes)
    clips = []
    for side in ("train", "test"):
        labels = torch.tensor([classes.index(name) for _, name in sides[side]])
        files = [decoded[file] for file, _ in sides[side]]
        clips.append(VideoClips(classes, files, labels, config, recipe))
    return tuple(clips)


def find_videos(folder: Path, split: int) -> list[Video]:
    """The videos of a folder, in the order of their classes. The first of these layouts counts:

    1. train.csv and test.csv (or val.csv), the authors' lists
    2. train/Class/* and test/Class/* (or val/Class/*)
    3. Class/* and ucfTrainTestlist/, UCF101's official lists, of which `split` is followed
    4. Class/*
    """
    held_out = "test" if any((folder / f"test{end}").exists() for end in ("", ".csv")) else "val"
    if (folder / "train.csv").is_file():
        return read_authors_lists(folder, held_out)
    if (folder / "train").is_dir() and (folder / held_out).is_dir():
        return videos_in(folder / "train", "train") + videos_in(folder / held_out, "test")
    if (folder / "ucfTrainTestlist").is_dir():
        return read_official_lists(folder, split)
    return videos_in(folder, side="")


def videos_in(folder: Path, side: str) -> list[Video]:
    """FOLDER/Class/*, sorted."""
    return [(file, file.parent.name, side) for file in sorted(folder.glob("*/*"))
            if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


def read_authors_lists(folder: Path, held_out: str) -> list[Video]:
    """Lines of a path (absolute, or from the folder), a space and a label. Classes are called
    after the folders of their videos where each has one to itself, else after their labels."""
    entries = []
    for side, path in (("train", folder / "train.csv"), ("test", folder / f"{held_out}.csv")):
        if not path.is_file():
            raise ValueError(f"--data: {path} is missing")
        for line in filter(str.strip, path.read_text(encoding="utf-8").splitlines()):
            file, _, label = line.strip().rpartition(" ")
            if not file or not label.isdecimal():
                raise ValueError(f"--data: got the line {line!r} in {path}, expected a path, "
                                 "a space and a label")
            entries.append((int(label), folder / file, side))
    pairs = {(label, file.parent.name) for label, file, _ in entries}
    has_names = len(pairs) == len(dict(pairs)) == len({name for _, name in pairs})
    return [(file, file.parent.name if has_names else str(label), side)
            for label, file, side in sorted(entries)]


def read_official_lists(folder: Path, split: int) -> list[Video]:
    """UCF101's lists of Class/file.avi, of which those that are there."""
    videos = []
    for side in ("train", "test"):
        path = folder / f"ucfTrainTestlist/{side}list{split:02}.txt"
        if not path.is_file():
            raise ValueError(f"--split: {path} is missing")
        # A training list has labels too, which are no files.
        files = [folder / word for word in path.read_text().split()]
        videos += [(file, file.parent.name, side) for file in files if file.is_file()]
    return sorted(videos)


def split_videos(videos: list[Video], classes: list[str]) -> dict[str, list[tuple[Path, str]]]:
    """-> {"train": [(file, class name)], "test": ...}. Without lists, every fifth scene of a class
    is for testing. A scene is a UCF101 group, `_g07_` in the names, or else a single file."""
    sides = {"train": [], "test": []}
    scenes = {name: {} for name in classes}  # {class name: {scene: its number}}
    for file, name, side in videos:
        group = re.search(r"_g\d+_", file.name)
        scene = group[0] if group else file.name
        number = scenes[name].setdefault(scene, len(scenes[name]))
        side = side or ("train" if number % 5 else "test")
        sides[side].append((file, name))
    for side, entries in sides.items():
        missing = set(classes) - {name for _, name in entries}
        if missing:
            raise ValueError(f"--data: no {side} video of class {', '.join(sorted(missing))} that "
                             "can be read, expected one at least (a class needs two scenes)")
    return sides


def decode_all(files: list[Path], short_side: int, cache: Path, max_broken: float, say):
    """Every readable file -> {file: its decoded frames}. Broken ones are named and left out."""
    sample = files[:: max(1, len(files) // 20)]
    size = np.mean([estimate_size(file, short_side) for file in sample]) * len(files)
    say(f"cache     {cache}/: about {size / 1e6:.0f} MB for {len(files)} videos")

    def attempt(file):
        try:
            return decode(file, short_side, cache)
        except ValueError as error:
            say(f"left out: {error}")
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        paths = tqdm(pool.map(attempt, files), "decoding", len(files), leave=False, disable=None)
        decoded = {file: path for file, path in zip(files, paths, strict=True) if path}
    num_broken = len(files) - len(decoded)
    if num_broken > max_broken * len(files):
        raise ValueError(f"--max-broken: {num_broken} of {len(files)} videos cannot be read, "
                         f"expected at most {max_broken:.0%}")
    return decoded


def estimate_size(file: Path, short_side: int) -> float:
    """Bytes of a decoded video, from what its header says; 0 where it says nothing."""
    av = optional_import("av", "av")
    with contextlib.suppress(av.FFmpegError, IndexError), av.open(str(file)) as container:
        stream = container.streams.video[0]
        frames = (container.duration or 0) / av.time_base * float(stream.average_rate or 25)
        sides = stream.width, stream.height
        return 3 * frames * short_side**2 * max(sides) / max(1, min(sides))
    return 0.0


def decode(file: Path, short_side: int, cache: Path) -> Path:
    """A video -> a .npy file of its frames, (frames, H, W, 3) uint8 with min(H, W) = short_side.

    It is decoded once: the cache knows a file by its content.
    """
    try:
        key = hashlib.blake2b(file.read_bytes(), digest_size=12).hexdigest()
    except OSError as error:
        raise ValueError(f"{file}: cannot be read ({error.strerror})") from error
    cached = cache / f"{key}-{short_side}.npy"
    if not cached.exists():
        frames = read_frames(file, short_side)
        if not frames:
            raise ValueError(f"{file}: cannot be decoded, expected a video")
        frames = np.stack([frame for frame in frames if frame.shape == frames[0].shape])
        write_whole(cached, lambda out: np.save(out, frames))
    return cached


def read_frames(file: Path, short_side: int) -> list[np.ndarray]:
    """The frames of a video, each (H, W, 3) uint8; of a truncated file those that it holds."""
    av = optional_import("av", "av")
    frames = []
    reformatter = av.video.reformatter.VideoReformatter()  # one for all frames: six times as fast
    with contextlib.suppress(av.FFmpegError, IndexError), av.open(str(file)) as container:
        for frame in container.decode(video=0):
            scale = short_side / min(frame.width, frame.height)
            size = [max(short_side, round(scale * x)) for x in (frame.width, frame.height)]
            pixels = reformatter.reformat(frame, *size, "rgb24").to_ndarray()
            # A phone held upright stores lying frames, and by how many degrees to turn them.
            frames.append(np.rot90(pixels, round(frame.rotation / 90)))
    return frames


def download_ucf101_subset(cache: Path) -> Path:
    """The ten classes of Hugging Face's video tutorial -> their folder, downloaded once."""
    folder = cache / "ucf101-subset"
    if folder.exists():
        return folder
    hub = optional_import("huggingface_hub", "huggingface_hub")
    cache.mkdir(parents=True, exist_ok=True)
    try:
        archive = hub.hf_hub_download("sayakpaul/ucf101-subset", "UCF101_subset.tar.gz",
                                      repo_type="dataset")
        with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=cache) as temporary:
            tar.extractall(temporary, filter="data")  # nothing outside the folder
            (train,) = Path(temporary).glob("*/train")
            os.replace(train.parent, folder)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise ValueError(f"--data: ucf101-subset cannot be had here ({reason})") from error
    return folder


class VideoClips:
    """Clips of a config's frames and size, from decoded videos (.npy files)."""

    def __init__(self, classes: list[str], videos: list[Path], labels: Tensor,
                 config: VideoMAEConfig, recipe):
        self.classes, self.videos, self.labels = classes, videos, labels
        self.size = config.image_hw[0]
        self.offsets = recipe.frame_stride * np.arange(config.num_frames)  # (T,)
        self.views, self.crops = recipe.views, recipe.crops
        self.num_views = recipe.views * recipe.crops

    def load(self, indices: Tensor, random: Tensor | None = None, view: int = 0) -> Tensor:
        """indices (B,) -> (B, T, 3, H, W) uint8.

        random (B, 4), in [0, 1]: the scale, top, left and start time of a crop, for training.
        None: one of the views for testing, `crops` places along the longer side at `views` times.
        """
        clips = []
        for row, index in enumerate(indices.tolist()):
            video = np.load(self.videos[index], mmap_mode="r")  # only what is used is read
            if random is None:
                clip = self.frames(video, (view // self.crops + 0.5) / self.views)
                place = view % self.crops / (self.crops - 1) if self.crops > 1 else 0.5
                clips.append(square_crop(clip, self.size, place))
            else:
                *crop, time = random[row].tolist()
                clips.append(multi_scale_crop(self.frames(video, time), self.size, crop))
        return torch.stack(clips)

    def frames(self, video: np.ndarray, time: float) -> Tensor:
        """(all frames, H, W, 3) -> (T, 3, H, W). time is from 0, the first possible start, to 1,
        the last. A video that is too short holds its last frame."""
        last = len(video) - 1
        start = round(time * max(0, last - self.offsets[-1]))
        frames = video[np.minimum(start + self.offsets, last)]
        return rearrange(torch.from_numpy(frames), "t h w c -> t c h w")
