"""Find the videos of a folder, their classes, and the split into training and test videos."""
import re
from collections import defaultdict
from pathlib import Path, PurePath
from typing import NamedTuple

SUFFIXES = ".avi .mp4 .mkv .webm .mov .m4v .mpg .mpeg .wmv .flv .3gp".split()

LAYOUTS = [  # training videos and test videos, in two lists or in two folders of Class/*
    ("train.csv", "test.csv"), ("train.csv", "val.csv"),
    ("ucfTrainTestlist/trainlist{:02}.txt", "ucfTrainTestlist/testlist{:02}.txt"),
    ("train", "test"), ("train", "val"),
]
# A line of a list: a path, usually a label, and sometimes a number that is not used.
LINE = re.compile(rf"""["']?(.+(?:{"|".join(SUFFIXES)}))["']?"""
                  r"""(?:[\s,;]+["']?(.+?)["']?(?:[\s,;]+(-?\d+))?)?[\s,;]*""", re.I)


class Video(NamedTuple):
    """One video file of a folder."""
    file: Path
    label: str  # its class, "" if there are none
    split: str  # "train", "test", or "" if its group decides


def find_videos(folder: Path, split: int = 0) -> list[Video]:
    """The videos of a folder in one of LAYOUTS; else those in a train.csv, or in Class/*, or any.

    split: the number of UCF101's lists; 0 if not given, which means 1."""
    for train, test in LAYOUTS:
        number = split or 1
        parts = {"train": folder / train.format(number), "test": folder / test.format(number)}
        if all(path.exists() for path in parts.values()):
            break
    else:
        parts = {"": folder / "train.csv" if (folder / "train.csv").exists() else folder}
    if split and "{" not in train:
        raise ValueError(f"split: got {split}, but {folder} has no such lists of UCF101")
    if all(path.is_file() for path in parts.values()):
        return read_lists(folder, parts)
    for name in ("test.csv", "val.csv", "ucfTrainTestlist", "testTrainMulti_7030_splits"):
        if (folder / name).exists():  # not to be passed over in silence; the last is HMDB51's
            raise ValueError(f"{folder / name}: expected lists as docs/videos.md describes them")

    def videos_in(pattern):
        return [Video(file, file.parent.name, part) for part, root in parts.items()
                for file in sorted(root.glob(pattern))
                if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]

    videos = videos_in("*/*")
    if len({video.label for video in videos}) > 1:
        return videos
    return [video._replace(label="") for video in videos_in("**/*")]


def split_videos(folder: Path, videos: list[Video], classes) -> tuple[list[Video], list[Video]]:
    """-> the videos to train on and those to test on.

    Unless lists or folders decide, every fifth group of a class is for testing. A group is a single
    file, or the files that share a `_g07_` in their names, as in UCF101."""
    train, test, groups = [], [], defaultdict(dict)
    for video in videos:
        match, known = re.search(r"_g\d+_", video.file.name), groups[video.label]
        number = known.setdefault(match[0] if match else video.file, len(known))
        is_test = video.split == "test" or not video.split and number % 5 == 0
        (test if is_test else train).append(video)
    for name, part in (("train", train), ("test", test)):
        if missing := sorted(set(classes) - {video.label for video in part}):
            raise ValueError(f"{folder}: no {name} video of class {', '.join(missing)} can be "
                             "read, expected at least one (or two groups, to split)")
    return train, test


def read_lists(folder: Path, lists: dict[str, Path]) -> list[Video]:
    """The videos in {split: list}. Their classes are their labels, with the names of their folders
    if labels and folders fit one to one."""
    videos, lost = {}, []
    for split, path in lists.items():
        for name, label in read_list(path):
            # Lists may come from another machine: look for A/1.avi if not for /data/A/1.avi.
            parts = PurePath(name.replace("\\", "/")).parts
            files = (folder.joinpath(*parts[i:]) for i in range(len(parts)))
            if file := next(filter(Path.is_file, files), None):
                video = videos.setdefault(file.resolve(), Video(file, label, split))
                if video[1:] != (label, split):
                    raise ValueError(f"{path}: {file} is in both lists or has two labels")
            else:
                lost.append(name)
    if lost:
        print(f"skipped: {len(lost):,} files listed, but not in {folder}; the first is {lost[0]}")

    videos = list(videos.values())
    pairs = {(video.file.parent.name, video.label) for video in videos if video.label}
    if len(pairs) == len(dict(pairs)) == len({label for _, label in pairs}):
        return [video._replace(label=video.file.parent.name) for video in videos]
    if bare := [video.file for video in videos if not video.label]:
        raise ValueError(f"{folder}: {bare[0]} has no label in its list, and the other labels do "
                         "not fit the folders")
    return videos


def read_list(path: Path) -> list[tuple[str, str]]:
    """The path and the label in each line of a list."""
    lines = path.read_text("utf-8-sig", "surrogateescape").splitlines()
    lines = [line.strip() for line in lines if line.strip()]
    if lines and not re.search(r"[\d/\\.]", lines[0]):
        del lines[0]  # a header
    rows = [LINE.fullmatch(line) for line in lines]
    for line, row in zip(lines, rows, strict=True):
        if not row or row[3] != rows[0][3]:
            raise ValueError(f"{path}: got {line}, expected a path, a label and perhaps a number "
                             "that is the same in all lines")
    return [(row[1], row[2] or "") for row in rows]
