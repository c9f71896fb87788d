"""What 0.27 wrote, kept in fixtures/0.27: its files load, and a run that it began goes on as it would have there."""

import json
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import sfumato
from bench.runs_resume import command, make_inputs, results, run
from sfumato import cli
from sfumato.files import read_adapter, read_tensors
from tests.logged import log_in

KEPT = Path(__file__).parent / "fixtures/0.27"
"""run: a LoRA on pocket with a new word, prior preservation, crossed samples and an average, stopped after three of six
steps. finished: what the same run gave that was not stopped."""
FIGURES = ("loss", "prior_loss", "gradient_norm", "limited", "rate")


@pytest.mark.parametrize("version", ["0.27.0", "0.28.0"])
def test_a_run_that_it_began_goes_on_as_it_would_have(version, tmp_path, monkeypatch):
    """Another processor rounds otherwise: figures and weights are compared, not bits."""
    monkeypatch.setattr(sfumato, "__version__", version)
    shutil.copytree(KEPT / "run", tmp_path / "run")
    assert cli.main(["resume", str(tmp_path / "run"), "--images", str(KEPT / "pictures")]) == 0
    found, wanted = log_in(tmp_path / "run"), log_in(KEPT / "finished")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for row, kept in zip(found, wanted, strict=True):
        assert [row[name] for name in FIGURES] == pytest.approx([kept[name] for name in FIGURES], rel=1e-3, abs=1e-9)
    for file, kept_file in (("run", "whole"), ("run-x", "whole-x")):
        made = read_tensors(tmp_path / f"run/{file}.safetensors")
        assert_close(made, read_tensors(KEPT / f"finished/{kept_file}.safetensors"), rtol=1e-3, atol=1e-4)


def test_its_adapter_and_its_word_load_and_change_what_is_drawn(tmp_path):
    adapter, word = KEPT / "finished/whole.safetensors", KEPT / "finished/whole-x.safetensors"
    assert cli.main(["verify", str(adapter)]) == 0
    assert len(read_adapter(adapter).changes) == 4
    drawn = []
    for number, options in enumerate(
        ([], ["--lora", str(adapter)], ["--lora", str(adapter), "--embedding", str(word)])
    ):
        file = tmp_path / f"{number}.png"
        words = ["generate", "a square, <x>", "--steps", "2", "--seed", "1", "-o", str(file), *options]
        assert cli.main(words) == 0
        drawn.append(file.read_bytes())
    assert len(set(drawn)) == 3


OF_ALL = (
    *("output", "checkpoint_every", "keep", "resume", "finish", "force", "overwrite", "dry_run", "tensorboard"),
    *("data", "steps", "batch", "learning_rate", "warmup", "fall_at", "optimizer", "weight_decay", "clip", "ema"),
    *("seed", "device", "precision", "sample_every", "base"),
)
STAGES = {
    "style_emphasis": (*OF_ALL, "style_emphasis", "style_together"),
    "self_play": (*OF_ALL, "empty_share", "others_share", "guidance", "sharpness"),
}
"""By program of 0.27 the fields that its config.toml had."""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL and no fork")
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_of_a_program_that_is_now_a_stage_goes_on(stage, tmp_path):
    inputs, case = make_inputs(tmp_path / "inputs"), f"pretrain {stage}"
    more = ["--checkpoint-every", "1", *(["--style-together", "1.0"] if stage == "style_emphasis" else [])]
    assert cli.main(command(case, inputs, tmp_path / "whole", *more)) == 0
    words = [word for word in command(case, inputs, tmp_path / "run", *more) if word not in ("--stage", stage)]
    words[1] = stage  # the name that the program had
    assert run(words, log=tmp_path / "log", kill_at=2) == -signal.SIGKILL
    facts = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps(facts | {"program": stage, "sfumato": "0.27.0"}))
    config = tmp_path / "run/config.toml"
    lines = config.read_text().splitlines(keepends=True)
    config.write_text("".join(line for line in lines if line.partition(" = ")[0] in STAGES[stage]))
    assert cli.main(["resume", str(tmp_path / "run")]) == 0
    whole, found = results(tmp_path / "whole"), results(tmp_path / "run")
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)
