"""Test of what `pip install .` installs."""
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_wheel_holds_the_modules_and_the_trained_weights(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="setuptools >= 77 builds the wheel")
    source = tmp_path / "source"  # building writes beside the sources
    unbuilt = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info")
    shutil.copytree(ROOT, source, ignore=unbuilt)
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation",
                    "--no-deps", "--wheel-dir", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    weights = {str(path.relative_to(ROOT)) for path in ROOT.glob("tiny/*/model.safetensors")}
    modules = {"videomae.py", "checkpoints.py", "processor.py", "train_tiny.py", "tiny/videos.py"}
    assert weights and weights | modules <= names
    assert not any(name.startswith(("tests", "notebooks")) for name in names)
