"""Shared by several test files: a local stand-in for the hub, and video files."""
import contextlib
import http.server
import json
import re
import struct
import threading
from pathlib import Path

import numpy as np


@contextlib.contextmanager
def hub_server(folder: Path):
    """Serve folder/owner/name/resolve/main/file as the hub does -> environment variables for it."""

    class Hub(http.server.BaseHTTPRequestHandler):
        def answer(self) -> bytes | None:
            path = re.sub("/resolve/[^/]+/", "/resolve/main/", self.path.partition("?")[0])
            if api := re.fullmatch("/api/models/(.+)/(revision|tree)/.+", path):
                root = folder / api[1] / "resolve/main"
                files = [file for file in root.rglob("*") if file.is_file()]
                tree = [dict(type="file", path=file.relative_to(root).as_posix(), oid=file.name,
                             size=file.stat().st_size) for file in files]
                names = [dict(rfilename=file["path"]) for file in tree]
                about = dict(id=api[1], sha="0" * 40, siblings=names)
                return json.dumps(tree if api[2] == "tree" else about).encode() if tree else None
            file = folder / path.lstrip("/")
            return file.read_bytes() if file.is_file() else None

        def do_GET(self):
            body = self.answer()
            self.send_response(404 if body is None else 200)
            body = body or b""
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{self.path.rpartition("/")[2]}"')
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
    finally:
        server.shutdown()
        server.server_close()


def write_video(path: Path, frames: np.ndarray, rate=25, codec="mpeg4", pix_fmt="yuv420p",
                stamps=None, gop=None, **options):
    """Write frames (T, H, W, 3) uint8 as a video. stamps: when each is shown, in units of 1 / rate;
    gop: the distance between key frames."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = pix_fmt, 4_000_000
        if gop:
            stream.codec_context.gop_size = gop
        for number, frame in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            frame.pts = number if stamps is None else int(stamps[number])
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def damage(path: Path, out: Path, is_damaged) -> list[tuple[bool, bool]]:
    """Copy a video, zeroing the first 60 bytes of each packet where is_damaged(number, is_key) ->
    for each packet, whether it is a key frame and whether it is damaged."""
    import av

    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        contents = [(bytes(packet), packet.is_keyframe) for packet in packets]
    file, flags = path.read_bytes(), []
    for number, (content, is_key) in enumerate(contents):
        flags.append((is_key, is_damaged(number, is_key)))
        if flags[-1][1]:
            assert file.count(content) == 1
            file = file.replace(content, bytes(min(60, len(content))) + content[60:])
    out.write_bytes(file)
    return flags


def turn_clockwise(path: Path):
    """Make players rotate an MP4 by 90 degrees, as a phone that was held upright does."""
    content = bytearray(path.read_bytes())
    # The display matrix (nine numbers) follows version, flags, times, ids, layer and volume.
    at = content.index(b"tkhd") + 4 + 40
    matrix = (0, 1, 0, -1, 0, 0, 0, 0, 0x4000)
    content[at : at + 36] = struct.pack(">9i", *(x << 16 for x in matrix))
    path.write_bytes(content)
