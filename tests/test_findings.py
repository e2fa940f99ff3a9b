"""notebooks/findings.py in few steps."""
import subprocess
import sys
from pathlib import Path

# In a process of its own, because a run changes settings of the whole process.
CODE = """
import findings
findings.SHORT["finetune_steps"] = 5
settings = findings.BASE | dict(pretrain_on="pan and tilt", mask="random", decoder_layers=2,
                                pretrain_steps=12, unlabelled_clips=1000)
result = findings.run_once((settings, 0))
assert result.items() >= settings.items()
assert 0 < result["finetune_top1"] < 100 and 0 < result["loss"] < 2, result
"""


def test_a_short_run():
    notebooks = Path(__file__).parent.parent / "notebooks"
    done = subprocess.run([sys.executable, "-c", CODE], cwd=notebooks, capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, done.stderr
