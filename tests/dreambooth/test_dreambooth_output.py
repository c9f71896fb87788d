"""What comes out: a folder that diffusers loads, the difference from the base, or a LoRA that describes itself."""

import json
import re

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sfumato import Adapter, compose
from sfumato.errors import FileError
from sfumato.files import read_adapter, read_header, read_lora, read_tensors
from sfumato.files.metadata import thumbnail_uri
from sfumato.models import load_base
from sfumato.training.methods.full import write_folder as full_writer
from tests.dreambooth.subject import PROMPT
from tests.tiny import CPU

pytestmark = pytest.mark.usefixtures("quick")


def test_the_folder_is_whole_and_plain_diffusers_loads_it_as_its_card_says(train, pocket_folder):
    """Everything but the U-Net is the base's, the scheduler included, and nothing half-written stays."""
    from diffusers import DiffusionPipeline

    path = train("run", "--prior", "none", "--steps", "1", "--sample-every", "1", "--resolution", "32")
    with Image.open(path.parent / "samples/000001/0.png") as sample:
        assert sample.size == (32, 32)
    pipe = DiffusionPipeline.from_pretrained(path)
    before = DiffusionPipeline.from_pretrained(pocket_folder)
    assert dict(pipe.scheduler.config) == dict(before.scheduler.config)
    for part in ("vae", "text_encoder"):
        written = getattr(pipe, part).state_dict()
        for name, tensor in getattr(before, part).state_dict().items():
            assert torch.equal(tensor, written[name])
    learned = pipe.unet.state_dict()
    assert any(not torch.equal(t, learned[n]) for n, t in before.unet.state_dict().items())
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".run")]
    assert load_base(str(path), precision=CPU).family.name == "pocket"
    assert 'DiffusionPipeline.from_pretrained("run")' in (path.parent / "README.md").read_text()
    assert (path.parent / "images/before_after.png").is_file()


@pytest.mark.slow
def test_a_folder_in_half_precision_draws_with_the_lines_of_its_card(train, monkeypatch, capsys):
    """Text encoders are read in the dtype of their files unless one is asked for, the U-Net in fp32."""
    path = train("run", "--prior", "none", "--steps", "1", "--save-precision", "fp16")
    assert "Writing model shards" not in capsys.readouterr().err
    code = re.search("```python\n(.*?)```", (path.parent / "README.md").read_text(), re.DOTALL)[1]
    *loading, drawing = code.splitlines()
    assert drawing.startswith("image = pipe(")
    monkeypatch.chdir(path.parent)
    known: dict[str, object] = {}
    exec("\n".join(loading), known)
    picture = known["pipe"](PROMPT, num_inference_steps=1, output_type="np").images[0]
    assert picture.std() > 0


@pytest.mark.slow
def test_base_and_difference_are_the_trained_weights(train, pocket_folder):
    options = ("--prior", "none", "--steps", "2", "--train-text-encoder")
    whole, change = train("whole", *options), train("change", *options, "--save", "difference")
    file = read_adapter(change)
    assert set(file.kinds) == {"difference"}
    assert file.family == "pocket"
    assert json.loads(file.metadata["sfumato.config"])["method"] == "full"
    base, trained = (load_base(str(folder), precision=CPU) for folder in (pocket_folder, whole))
    parts = {"unet": "unet", "text_encoder": "text_encoders"}
    seen = set()
    for (part, place), one in file.changes.items():
        old, new = (getattr(b, parts[part]) for b in (base, trained))
        old, new = ((m[0] if isinstance(m, tuple) else m).get_submodule(place) for m in (old, new))
        assert_close(old.weight + one.delta(old.weight), new.weight, rtol=0, atol=1e-6)
        if one.bias_delta is not None:
            assert_close(old.bias + one.bias_delta, new.bias, rtol=0, atol=1e-6)
        seen.add(part)
    assert seen == set(parts)
    with compose(base, Adapter(change)):
        mixed = base.unet.state_dict()
        for name, tensor in trained.unet.state_dict().items():
            assert_close(mixed[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("plotted")
def test_a_lora_describes_itself_and_no_file_tells_a_path(train, tmp_path, pictures):
    path = train("run", "--method", "lora", "--steps", "1", "--sample-every", "1", "--measure-every", "1",
                 "--over-steps", "0-0.8", "--resolution", "32", "--own-negative")  # fmt: skip
    metadata = read_header(path).metadata
    assert metadata["sfumato.over_steps"] == "0-0.8"
    assert json.loads(metadata["sfumato.negatives"]) == [PROMPT]
    assert metadata["modelspec.trigger_phrase"] == PROMPT
    assert json.loads(metadata["sfumato.config"])["prior"] == "pictures"
    with Image.open(path.parent / "samples/000001/0.png") as subject:  # not the class, nor what is unrelated
        assert subject.size == (32, 32)
        assert metadata["modelspec.thumbnail"] == thumbnail_uri(subject)
    assert read_lora(path).family == "pocket"
    text = json.dumps(dict(metadata)) + (path.parent / "README.md").read_text()
    assert str(tmp_path) not in text
    assert str(pictures) not in text
    names = {file.name for file in path.parent.iterdir()}
    assert {"config.toml", "log.jsonl", "plot.png", "samples.png", "README.md"} <= names


@pytest.mark.slow
def test_adapters_on_the_way_are_those_of_runs_that_end_there(train):
    steady = ("--method", "lora", "--prior", "none", "--schedule", "constant")
    path = train("run", *steady, "--save-every", "2")
    kept = sorted((path.parent / "adapters").iterdir())
    assert [each.name for each in kept] == ["run-step00000002.safetensors", "run-step00000003.safetensors"]
    ended = train("ended", *steady, "--steps", "2")
    assert read_header(kept[0]).metadata["ss_steps"] == "2"
    first, last = read_tensors(kept[0]), read_tensors(ended)
    assert first.keys() == last.keys()
    assert all(torch.equal(first[name], last[name]) for name in last)
    end = read_tensors(path)
    assert not all(torch.equal(first[name], end[name]) for name in end)


@pytest.mark.slow
def test_the_extracted_lora_is_the_change_and_says_what_it_keeps(train, pocket_folder, capsys):
    """At full rank the layers' very change; at rank 1 less, and both report it."""
    options = ("--prior", "none", "--steps", "2")
    trained = load_base(str(train("whole", *options)), precision=CPU).unet
    base = load_base(str(pocket_folder), precision=CPU).unet
    capsys.readouterr()
    file = read_lora(train("all", *options, "--save", "lora", "--keep-energy", "1", "--rank", None))
    said = capsys.readouterr().err
    assert "of the energy" in said
    for (_, place), module in file.modules.items():
        old, new = (model.get_submodule(place).weight.detach() for model in (base, trained))
        assert_close(module.delta(old), new - old, rtol=1e-2, atol=1e-5)
    one = read_lora(train("one", *options, "--save", "lora", "--rank", "1"))
    assert {module.rank for module in one.modules.values()} == {1}
    kept = [float(f.metadata["sfumato.kept_energy"]) for f in (file, one)]
    assert kept[1] < kept[0] <= 1


def test_a_folder_of_one_s_own_is_never_taken_for_an_earlier_base(train, tmp_path, capsys):
    mine = tmp_path / "run/run/mine.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    train("run", status=2)
    assert "run holds run and no run; a run would write over that" in capsys.readouterr().err
    with pytest.raises(FileError, match="holds something that is no base, so it was not replaced"):
        full_writer(None, mine.parent, torch.float32)
    assert mine.read_text() == "mine"
