"""Tests of benchmarks/: rows run, the two sides are the right models, the page reports results."""
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bench  # noqa: E402
import gpu  # noqa: E402


def test_rows_run(capsys, monkeypatch):
    pytest.importorskip("transformers", reason="transformers is not installed")
    monkeypatch.setitem(bench.SIZES, "tiny", (4, 0.75))
    bench.main(["--seconds", "0.5", "--only", "tiny pretrain fp32 eager", "processor"])
    bench.main(["--seconds", "0.5", "--only", "processor", "--sides", "ours"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " ms" in line]
    pretrain, processor, ours = ([x.strip() for x in line.split("|")[1:-1]] for line in lines)

    assert [x[0] for x in (pretrain, processor, ours)] == [
        "tiny pretrain fp32 eager", "processor", "processor"]
    for _, our_time, their_time, ratio, _ in (pretrain, processor):
        our_time, their_time = (float(x.removesuffix(" ms").replace(",", ""))
                                for x in (our_time, their_time))
        assert float(ratio) == pytest.approx(their_time / our_time, abs=0.01)
    assert 0 < int(pretrain[-1].removesuffix("%")) < 100 and not processor[-1]
    assert ours[1] and not ours[2] and not ours[3]


@pytest.mark.parametrize("task", ["pretrain", "classify"])
def test_the_two_sides_are_ours_and_transformers(task):
    pytest.importorskip("transformers", reason="transformers is not installed")
    ours, theirs = (bench.make_model(side, "tiny", task) for side in bench.SIDES)
    assert type(ours).__module__ == "videomae"
    assert type(theirs).__module__ == "transformers.models.videomae.modeling_videomae"
    assert theirs.config._attn_implementation == "sdpa"

    for name in ("hidden_size", "image_size", "num_frames", "use_mean_pooling", "num_labels"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    counts = [sum(x.numel() for x in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == counts[1]


def test_the_page_reports_how_each_part_ended(tmp_path):
    hangs = "import time; print('started', flush=True); time.sleep(60)"
    parts = [
        ("Hangs", 0.03, ["-c", hangs]),
        ("Works", 0.1, ["-c", "import os, tiny; print(os.environ['VIDEOMAE_DEVICE'])"]),
        ("Lacks", 0.1, ["-c", """raise ImportError("No module named 'av'")"""]),
        ("Fails", 0.1, ["-c", "1 / 0"]),
    ]
    page = tmp_path / "new" / "page.md"
    assert gpu.write_page("On this machine", parts[1:3], page)
    assert not gpu.write_page("On this machine", parts, page)

    title, *ends = page.read_text().split("\n## ")
    assert title == "# On this machine\n"
    for end, expected in zip(ends, [
        ("Hangs", "Timed out (2 s)", "started"),
        ("Works", "Passed", gpu.DEVICE),
        ("Lacks", "Skipped, av is not installed", "$ python -c raise"),
        ("Fails", "**Failed**", "ZeroDivisionError"),
    ], strict=True):
        assert end.startswith(expected[0]) and all(text in end for text in expected)
