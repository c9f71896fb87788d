"""What comes out: a file that diffusers draws from and that tells of its training, in a folder that tells no path."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato.files import read_header
from sfumato.generation.draw import draw
from sfumato.models import load_base
from sfumato.precision import decide
from sfumato.runs.reporting.samples import Samples
from tests.logged import log_beside
from tests.tiny import CPU

pytestmark = pytest.mark.usefixtures("quick")


def test_plain_diffusers_draws_the_same_picture(train, pocket_folder):
    """`pipe.load_lora_weights(file)` and nothing else: our mix to 1/255 a pixel, and not the base's picture."""
    from diffusers import StableDiffusionPipeline

    from sfumato import Adapter, compose

    path = train("run", "--learning-rate", "0.1")
    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    options = {"steps": 4, "guidance": 3.0, "width": 64, "height": 64, "sampler": "ddim"}
    without = np.asarray(draw(base, "red square", 5, **options)[0], dtype=int)
    with compose(base, Adapter(path)):
        ours = np.asarray(draw(base, "red square", 5, **options)[0], dtype=int)
    pipe = StableDiffusionPipeline.from_pretrained(pocket_folder, safety_checker=None)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    theirs = pipe(
        "red square",
        num_inference_steps=4,
        guidance_scale=3.0,
        width=64,
        height=64,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    assert abs(np.asarray(theirs, dtype=int) - ours).max() <= 1
    assert abs(without - ours).max() > 5


def test_a_file_tells_of_its_training_as_sd_scripts_does(train, monkeypatch):
    """Of three processes, each of which has two batches of two pictures a step."""
    monkeypatch.setattr(Samples, "processes", 3)
    path = train("run", "--batch", "2", "--accumulate", "2", "--steps", "1", "--seed", "5", "--learning-rate", "2e-3")
    metadata = read_header(path).metadata
    assert metadata["ss_total_batch_size"] == "12"
    assert metadata["ss_steps"] == metadata["ss_max_train_steps"] == "1"
    assert metadata["ss_learning_rate"] == "0.002"
    assert metadata["ss_seed"] == "5"
    assert metadata["ss_num_train_images"] == "6"
    assert not metadata.keys() & {"ss_clip_skip", "modelspec.encoder_layer", "modelspec.timestep_range"}


def test_a_snapshot_tells_the_steps_of_its_training_and_what_it_learned_of(train):
    path = train("run", "--save-every", "1", "--steps", "2", "--clip-skip", "1", "--max-timestep", "600")
    metadata = read_header(path.parent / "adapters" / "run-step00000001.safetensors").metadata
    assert (metadata["ss_steps"], metadata["ss_max_train_steps"]) == ("1", "2")
    assert (metadata["ss_clip_skip"], metadata["modelspec.timestep_range"]) == ("2", "0,600")


@pytest.mark.usefixtures("plotted")
def test_the_run_folder_tells_everything_and_no_path(train, tmp_path, pictures, pocket_folder):
    path = train("run", "--trigger", "zwx", "--caption", "{caption} zwx", "--sample-every", "2",
                 "--measure-every", "2", "--over-steps", "0-0.8",
                 "--resolution", "32", "--own-negative")  # fmt: skip
    with Image.open(path.parent / "samples/000002/0.png") as sample:
        assert sample.size == (32, 32)
    names = {file.name for file in path.parent.iterdir()}
    assert {"config.toml", "log.jsonl", "plot.png", "samples.png", "README.md", "run.safetensors"} <= names
    metadata = read_header(path).metadata
    assert metadata["modelspec.trigger_phrase"] == "zwx"
    assert metadata["sfumato.over_steps"] == "0-0.8"
    assert metadata["sfumato.negatives"] == '["zwx"]'
    assert json.loads(metadata["sfumato.config"])["rank"] == 2
    base = load_base(pocket_folder, precision=CPU, unet=False)
    assert metadata["sfumato.base_fingerprint"] == base.adapted_fingerprint()
    text = json.dumps(dict(metadata)) + (path.parent / "README.md").read_text()
    assert str(tmp_path) not in text
    assert str(pictures) not in text
    assert "zwx" in (path.parent / "README.md").read_text()
    assert ", width=32, height=32, num_inference_steps=" in text  # as the samples
    assert " --size 32x32 --lora" in text
    steps = [row for row in log_beside(path) if "loss" in row]
    assert [row["step"] for row in steps] == [1, 2, 3, 4]


def test_what_lies_beside_the_adapter_is_known_before_it_is_written(tmp_path):
    from trainers.lora import Config, written

    plain = Config(images=tmp_path, output=tmp_path, name="n")
    assert written(plain) == []
    words = dataclasses.replace(plain, train_words=("<otter>", "<hat>"), save_every=5)
    assert written(words) == ["adapters", "n-otter.safetensors", "n-hat.safetensors"]
    assert written(dataclasses.replace(words, bundle=True)) == ["adapters"]
