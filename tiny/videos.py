"""Decode videos once into a cache and sample clips from them. tiny/folders.py finds the videos.

Memory does not grow with a video's length. Invalid input raises a ValueError with the path.
"""
import contextlib
import hashlib
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints import write_atomic
from tiny.augment import crop_and_flip, cut
from tiny.folders import SUFFIXES, find_videos, split_videos
from videomae import VideoMAEConfig, frame_indices, normalize, preprocess


def load_videos(folder, config: VideoMAEConfig, fps: float, split: int = 1, views: int = 5,
                flip: bool = True, cache="runs/.cache") -> tuple["VideoClips", "VideoClips"]:
    """A folder of videos -> training clips and test clips, at `fps` frames per second.

    split: 1 to 3, for UCF101. views: per test video. flip: mirror training clips at random."""
    videos = find_videos(Path(folder), split)
    names = {video.label for video in videos}
    classes = sorted(names, key=lambda name: (len(name) * name.isdigit(), name))  # 2 before 10
    if len(classes) < 2:
        raise ValueError(f"{folder}: got {classes or 'no videos'}, expected videos of at least "
                         f"two classes, Class/*{{{','.join(SUFFIXES)}}}")
    if config.num_channels != 3:
        raise ValueError(f"num_channels: got {config.num_channels}, expected 3 for videos")
    split_videos(folder, videos, classes)  # fails on a bad split before hours of decoding
    decoded = decode_all([video.file for video in videos], config.image_hw, fps, cache)

    # Split again without the broken files, which may include a class's only test video.
    clips = []
    readable = [video for video in videos if video.file in decoded]
    for part in split_videos(folder, readable, classes):
        labels = torch.tensor([classes.index(video.label) for video in part])
        files = [decoded[video.file] for video in part]
        clips.append(VideoClips(classes, labels, files, config, views, flip))
    lengths = [len(np.load(path, mmap_mode="r")) for path in decoded.values()]
    if short := sum(length < config.num_frames for length in lengths):
        print(f"{short} of {len(lengths)} videos have fewer than {config.num_frames} frames at "
              f"{fps:g} fps; their last frame is repeated")
    return tuple(clips)


# ---- Decoding -----------------------------------------------------------------------------------

def decode_all(files: list[Path], image_hw, fps: float, cache) -> dict[Path, Path]:
    """Videos -> {video: .npy file of its frames}. Those that cannot be decoded are skipped."""
    def missing(file):
        """Bytes that a video will add to the cache."""
        if cache_path(file, image_hw, fps, cache).exists():
            return 0
        times, (h, w) = scan(file, fps)
        return 3 * len(times) * math.prod(cover(h, w, *image_hw))

    sizes = for_each(missing, files, "measuring")
    Path(cache).mkdir(parents=True, exist_ok=True)
    needed, free = sum(sizes.values()) / 1e9, shutil.disk_usage(cache).free / 1e9
    if new := sum(size > 0 for size in sizes.values()):
        print(f"decoding {new} of {len(files)} videos into {cache}/: needs about "
              f"{needed:.2f} GB, {free:.1f} GB free")
    if needed > free:
        raise ValueError(f"{cache}: got {free:.1f} GB free, expected {needed:.1f} GB for decoded "
                         "frames; use fewer videos or a lower fps")
    return for_each(lambda file: decode(file, image_hw, fps, cache), list(sizes), "decoding")


def for_each(function, files: list[Path], text: str) -> dict:
    """-> {file: function(file)}, in threads. Files that cannot be read are reported and skipped."""
    def attempt(file):
        try:
            return file, function(file)
        except (ValueError, FileNotFoundError) as error:
            print(f"skipped: {error}")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = tqdm(pool.map(attempt, files), text, len(files), leave=False, disable=None)
        return dict(filter(None, results))


def cache_path(file: Path, image_hw, fps: float, cache) -> Path:
    """The path of a video's decoded frames, which changes whenever the video does."""
    stat = file.stat()
    key = repr((file.resolve(), stat.st_size, stat.st_mtime_ns, image_hw, float(fps)))
    return Path(cache, hashlib.blake2b(key.encode(), digest_size=12).hexdigest() + ".npy")


def decode(file: Path, image_hw, fps: float, cache="runs/.cache") -> Path:
    """Decode a video, once, into a .npy file of (frames, H, W, 3) uint8 at `fps` frames per second,
    scaled to just cover image_hw."""
    def write(out):
        count = 0
        out.seek(128)  # the size of numpy's header, which holds the number of frames
        for frame in read_frames(file, image_hw, scan(file, fps)[0]):
            out.write(frame)
            count += 1
        if not count:
            raise ValueError(f"{file}: no frame can be decoded")
        out.seek(0)
        header = dict(descr="|u1", fortran_order=False, shape=(count, *frame.shape))
        np.lib.format.write_array_header_1_0(out, header)

    path = cache_path(file, image_hw, fps, cache)
    if not path.exists():
        write_atomic(path, write)
    return path


@contextlib.contextmanager
def open_video(file: Path):
    """-> PyAV's container, its video stream and its frame rate, which a header may get wrong."""
    if not os.path.exists(file):
        raise ValueError(f"{file}: no such file")
    try:
        with av.open(str(file), metadata_errors="ignore") as container:  # tags may be damaged
            streams = [stream for stream in container.streams.video if stream.codec_context]
            if not streams:
                raise ValueError(f"{file}: got no video stream that can be decoded")
            yield container, streams[0], max(1.0, float(streams[0].average_rate or 25))
    except av.FFmpegError as error:
        raise ValueError(f"{file}: cannot be decoded ({error.strerror})") from error


def packets_of(container, stream):
    """The packets of a stream, up to where the file is cut off."""
    with contextlib.suppress(av.FFmpegError):
        yield from container.demux(stream)


def scan(file: Path, fps: float) -> tuple[np.ndarray, tuple[int, int]]:
    """Find, without decoding, the times in seconds that sample a file at `fps` frames per second,
    and the frames' (H, W). The first time need not be 0. Gaps of over a second are skipped."""
    with open_video(file) as (container, stream, rate):
        stamps = [packet.dts if packet.pts is None else packet.pts
                  for packet in packets_of(container, stream) if packet.size]
        unit, size = float(stream.time_base), (stream.height, stream.width)
    if not stamps:
        raise ValueError(f"{file}: got no frames")
    times = np.sort([i / rate if x is None else x * unit for i, x in enumerate(stamps)])
    steps = np.diff(times, prepend=times[:1])
    elapsed = np.where(steps > 1, 1 / rate, steps).cumsum()
    count = int((elapsed[-1] + 0.5 / rate) * fps) + 1
    return np.interp(np.arange(count) / fps, elapsed, times), size


def cover(h: int, w: int, height: int, width: int) -> tuple[int, int]:
    """The size of a frame (h, w) scaled to just cover (height, width)."""
    scale = max(height / h, width / w)
    return max(height, round(scale * h)), max(width, round(scale * w))


def read_frames(file: Path, image_hw, times: np.ndarray, seek: bool = False):
    """Yield the frame shown at each time, (H, W, 3) uint8, all of one size.

    seek: start at the key frame before the first time, not at the beginning."""
    reformatter = av.video.reformatter.VideoReformatter()  # reuse makes it six times as fast
    done, size = 0, None
    for first, last, frame in decoded_frames(file, times[0] if seek else None):
        done = max(done, np.searchsorted(times, first))
        count = np.searchsorted(times, last, side="right") - done
        if count <= 0:
            continue
        if size is None:
            # A phone held upright stores landscape frames and the angle to rotate them by.
            turns = round(frame.rotation / 90)
            size = cover(frame.height, frame.width, *image_hw[:: -1 if turns % 2 else 1])
        pixels = reformatter.reformat(frame, size[1], size[0], "rgb24").to_ndarray()
        yield from count * [np.ascontiguousarray(np.rot90(pixels, turns))]
        done += count


def decoded_frames(file: Path, start: float | None = None):
    """Yield (first, last, frame): PyAV's frames, from the key frame before `start`, each with the
    range of times it may be shown for. Damaged packets are skipped and reported."""
    packets = frames = damaged = 0
    with open_video(file) as (container, stream, rate):
        if start is not None:
            # Without an index, a seek may fail or end at a later key frame. Then this yields
            # nothing, and read_views starts at the beginning.
            try:
                container.seek(int(start * av.time_base))
            except av.FFmpegError:
                return
        try:
            for packet in packets_of(container, stream):
                packets += packet.size > 0
                try:
                    decoded = packet.decode()
                except av.FFmpegError:
                    damaged += 1
                    continue
                for frame in decoded:
                    time = frames / rate if frame.time is None else frame.time
                    if not frames and start is not None and (
                            frame.time is None or time > start + 0.5 / rate):
                        return
                    frames += 1
                    yield time - 1, time + 0.5 / rate, frame
        finally:
            if damaged:
                read = f", {frames} of {packets} frames read" if start is None else ""
                print(f"{file}: {damaged} packet{'s' * (damaged > 1)} damaged{read}")


# ---- Sampling -----------------------------------------------------------------------------------

@dataclass
class VideoClips:
    """Clips of decoded videos, a data set as described in tiny/__init__.py."""

    classes: list[str]
    labels: Tensor  # (videos,) int64
    videos: list[Path]  # .npy files
    config: VideoMAEConfig
    views: int = 5
    flip: bool = True

    def train_clips(self, indices: Tensor) -> Tensor:
        """(B,) -> (B, T, 3, h, w) uint8: random windows. Different shapes are cropped, at a
        random place, to the smallest height and width."""
        windows = [self.window(index, torch.rand(()).item()) for index in indices.tolist()]
        height, width = (min(x.shape[dim] for x in windows) for dim in (-2, -1))
        return torch.stack([cut(window, height, width) for window in windows])

    def prepare(self, frames: Tensor) -> Tensor:
        """(B, T, 3, h, w) uint8 -> (B, T, 3, H, W) pixel_values, cropped and mirrored at random."""
        return crop_and_flip(normalize(frames), *self.config.image_hw, self.flip)

    def test_views(self, index: int) -> Tensor:
        """-> (V, T, 3, H, W) pixel_values of windows spread evenly over the video."""
        starts = (np.arange(self.views) + 0.5) / self.views  # 0.1, 0.3, 0.5, 0.7, 0.9
        windows = [self.window(index, start) for start in starts]
        return torch.stack([preprocess(frames, self.config) for frames in windows])

    def window(self, index: int, start: float) -> Tensor:
        """-> (T, 3, h, w) uint8. start: 0 for the earliest window to 1 for the latest."""
        frames = np.load(self.videos[index], mmap_mode="r")  # only the window is read
        chosen = frame_indices(len(frames), self.config.num_frames, stride=1, start=start)
        return torch.from_numpy(frames[chosen.numpy()]).permute(0, 3, 1, 2)


def read_views(file: Path, config: VideoMAEConfig, fps: float, views: int = 5) -> Tensor:
    """A video of any length -> (V, T, 3, H, W) pixel_values as from VideoClips.test_views, decoding
    only around their frames. Views that cannot be decoded are skipped."""
    def decoded(wanted, seek):
        frames = read_frames(file, config.image_hw, wanted, seek)
        return list(islice(frames, config.num_frames))

    times, clips = scan(file, fps)[0], []
    for start in (np.arange(views) + 0.5) / views:
        wanted = times[frame_indices(len(times), config.num_frames, 1, start).numpy()]
        # Some files can only be read from their beginning.
        if frames := decoded(wanted, seek=True) or decoded(wanted, seek=False):
            chosen = frame_indices(len(frames), config.num_frames, stride=1)
            clips.append(preprocess([frames[i] for i in chosen], config))
    if not clips:
        raise ValueError(f"{file}: no frame can be decoded")
    return torch.stack(clips)
