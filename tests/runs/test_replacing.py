"""Replacing a run: it is whole until the first step of the new one, and then nothing of it lies beside its files."""

from dataclasses import replace

import pytest

from bench.runs_resume import command, make_inputs
from sfumato import cli
from sfumato.runs.run import Run
from tests.runs.small import Config, train


def everything(folder):
    """By path, without the lock and who holds it."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".holder.json"))
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture
def learn(pocket_folder, pictures, tmp_path, quick):
    def run(*options, status=0):
        words = ["--images", pictures, "--output", tmp_path / "run", "--base", pocket_folder, "--rank", "1"]
        words += ["--batch", "2", "--steps", "2", "--measure-every", "0", *options]
        assert cli.main(["train", "lora", "--learn", "plain", *map(str, words)]) == status
        return tmp_path / "run"

    return run


def test_a_wrong_use_costs_nothing_of_the_run_that_it_would_replace(learn, capsys):
    run = learn("--caption", "{caption}", "--sample-prompts", "red")
    before = everything(run)
    wrong = ("--caption", "{caption}", "--overwrite", "--learning-rate", "1e-3")
    learn(*wrong, "--warmup", "3", status=2)
    assert "--warmup 3 is longer than the 2 steps" in capsys.readouterr().err
    learn(*wrong, "--targets", "nothing", status=2)
    assert everything(run) == before


@pytest.mark.slow
@pytest.mark.usefixtures("plotted")
def test_nothing_of_the_old_run_lies_beside_the_new_one_and_what_is_nobodys_stays(learn):
    words = ("--caption", "<x> {caption}", "--train-words", "<x>", "--sample-prompts", "red")
    run = learn(*words, "--name", "old", "--save-every", "1")
    assert (run / "adapters/old-step00000001-x.safetensors").is_file()
    for earlier in ("old-000001", "old-000001-x"):  # as versions before 0.4.0 called them
        (run / f"adapters/{earlier}.safetensors").write_text("learned")
    mine = [run / "notes.txt", run / "adapters/best.safetensors", run / "images/mine.png"]
    for path in mine:
        path.write_text("mine")
    learn("--caption", "{caption}", "--sample-every", "0", "--overwrite")
    assert {path.read_text() for path in mine} == {"mine"}
    left = {path.as_posix() for path in everything(run) if run / path not in mine and path.parts[0] != "checkpoints"}
    assert left == {"README.md", "config.toml", "log.jsonl", "pictures.json", "plot.png", "run.json", "run.safetensors"}


def test_what_the_new_run_begins_with_stays_until_it_is_written_over(learn):
    words = ("--caption", "{caption}", "--sample-every", "0")
    run = learn(*words)
    learn(*words, "--overwrite", "--init-from", run / "run.safetensors", "--name", "run-2")
    assert (run / "run.safetensors").is_file()


def test_the_program_may_begin_earlier_than_its_steps(tmp_path):
    config = Config(output=tmp_path / "run", checkpoint_every=4)
    train(config)
    run = Run.start(replace(config, overwrite=True, seed=7), program="small", writes=["model"])
    assert "seed = 0" in (tmp_path / "run/config.toml").read_text()
    run.begin()
    assert "seed = 7" in (tmp_path / "run/config.toml").read_text()
    assert not (tmp_path / "run/run.safetensors").exists()
    (tmp_path / "run/model").mkdir()
    assert len(list(run.steps(3))) == 3
    assert (tmp_path / "run/model").is_dir()
    run.close()
    train(replace(config, overwrite=True))
    assert not (tmp_path / "run/model").exists()


@pytest.mark.slow
def test_a_base_that_is_replaced_gives_its_tokenizer_to_nobody(tmp_path):
    inputs = make_inputs(tmp_path)
    quick = ("--steps", "1", "--fall-at", "0", "--warmup", "0")
    words = command("pretrain unet muon", inputs, tmp_path / "run", *quick)
    vocabulary = tmp_path / "run/tokenizer/tokenizer.json"
    assert cli.main(words) == 0
    assert "xylophone" not in vocabulary.read_text()
    (tmp_path / "data/words.txt").write_text("xylophone\n" * 9)
    assert cli.main([*words, "--overwrite"]) == 0
    assert "xylophone" in vocabulary.read_text()


@pytest.mark.parametrize("name", ["..", "../mine", "a/../../mine", ""])
def test_no_made_up_record_leads_out_of_the_folder(name, tmp_path):
    config = Config(output=tmp_path / "run")
    train(config)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_text("mine")
    facts = tmp_path / "run/run.json"
    facts.write_text(facts.read_text().replace("{", f'{{"writes": "{name}",', 1))
    config_file = tmp_path / "run/config.toml"
    config_file.write_text(f'name = "{name}/x"\n')
    train(replace(config, overwrite=True))
    assert (tmp_path / "mine/file").read_text() == "mine"
