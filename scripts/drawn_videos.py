"""Videos for trying 04_your_videos.ipynb without real ones: a camera films drawn scenes, and the
class is how it moves."""
from pathlib import Path

import av
import numpy as np
import torch
from einops import repeat

from tiny.synthetic import MOTIONS, draw_scenes, film


def draw_videos(folder: Path, groups: int):
    """folder/Class/v_g07_c2.mp4: `groups` scenes for each class, each filmed four times."""
    torch.manual_seed(0)
    for label, name in enumerate(MOTIONS):
        for group in range(groups):
            clips = film(draw_scenes(1, 64), torch.full((4,), label), frames=16, size=32)
            for i, clip in enumerate(clips):
                write_video(folder / name / f"v_g{group:02}_c{i}.mp4", clip)


def write_video(path: Path, clip: torch.Tensor):
    """(T, 3, H, W) uint8 -> a 25 fps file, each frame shown four times and three times as large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = (3 * side for side in clip.shape[-2:])
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for frame in repeat(clip, "t c h w -> (t four) (h 3) (w 3) c", four=4).numpy():
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
