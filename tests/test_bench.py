"""benchmarks/bench.py: a short row of each kind, and two sides that are what they say."""
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_rows_run(tmp_path):
    names = ["tiny classify fp32 eager", "processor"]
    command = [sys.executable, BENCHMARKS / "bench.py", "--only", *names]
    done = subprocess.run([*command, "--output", tmp_path / "bench"],
                          capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench/results.json").read_text())["rows"]
    assert list(rows) == names
    for name, row in rows.items():
        assert row["ratio"] == row["transformers"] / row["ours"]
        assert f"| {name} | {row['ours']:,.2f} ms | {row['transformers']:,.2f} ms |" in done.stdout
    assert rows["tiny classify fp32 eager"]["over_floor"] > 1


@pytest.mark.parametrize("task", ["pretrain", "classify"])
def test_the_two_sides_are_ours_and_transformers(task, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    bench = importlib.import_module("bench")
    ours, theirs = (bench.make_model(side, "tiny", task) for side in bench.SIDES)
    assert type(ours).__module__ == "videomae"
    assert type(theirs).__module__ == "transformers.models.videomae.modeling_videomae"
    assert theirs.config._attn_implementation == "sdpa"

    for name in ("hidden_size", "image_size", "num_frames", "use_mean_pooling", "num_labels"):
        assert getattr(ours.config, name) == getattr(theirs.config, name)
    counts = [sum(x.numel() for x in model.parameters()) for model in (ours, theirs)]
    assert counts[0] == counts[1]
