"""Test of scripts/findings.py with few steps."""
import importlib.util
from pathlib import Path


def test_a_short_run():
    path = Path(__file__).parent.parent / "scripts" / "findings.py"
    spec = importlib.util.spec_from_file_location("findings", path)
    findings = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(findings)

    settings = findings.BASE | dict(mask="random", decoder_layers=2, pretrain_steps=12, seed=0,
                                    unlabelled_clips=1000, pretrain_on="pan and tilt")
    result = findings.run_once(settings, train_clips=1200, test_clips=64, finetune_steps=5)
    assert result.items() >= settings.items()
    assert 0 < result["finetune_top1"] < 100 and 0 < result["loss"] < 2, result
