"""Trainings of diffusers' example scripts as configs of ours."""

import shutil

import pytest
from converting import BASE, TEDDY, converted, written

from sfumato import cli
from sfumato.interop.recipes import convert

DOG = r"""
export MODEL_NAME="CompVis/stable-diffusion-v1-4"
export INSTANCE_DIR="./dog"

accelerate launch {script} \
  --pretrained_model_name_or_path=$MODEL_NAME --instance_data_dir=${{INSTANCE_DIR}} --output_dir="out" \
  --instance_prompt="a photo of sks dog" --resolution=512 --train_batch_size=1 --gradient_accumulation_steps=1 \
  --learning_rate=5e-6 --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=400 {more}
"""


def test_dreambooth_of_diffusers(home):
    more = '--with_prior_preservation --class_prompt="a photo of dog" --num_class_images=200 --class_data_dir=class'
    told, usual, notes = converted(home, DOG.format(script="train_dreambooth.py", more=more))
    assert told == {
        **{"images": "./dog", "instance_prompt": "a photo of sks dog", "class_prompt": "a photo of dog"},
        **{"class_count": 200, "base": "CompVis/stable-diffusion-v1-4", "steps": 400, "batch": 1, "accumulate": 1},
        **{"resolution": 512, "learning_rate": 5e-6, "optimizer": "adamw", "schedule": "constant"},
        "optimizer_args": ["betas=0.9,0.999"],
    }
    assert usual == {"method": "full", "prior": "pictures", "crop": "random", "min_snr": 0.0, "weight_decay": 0.01}
    assert notes == ()
    (home / "class").mkdir()
    shutil.copy(TEDDY / "flat.png", home / "class/a.png")
    told, _, notes = converted(home, DOG.format(script="train_dreambooth.py", more=more))
    assert (told["class_images"], "class_count" in told) == ("class", False)
    assert notes == ("num_class_images = 200: class has 1; the script draws the rest, and these are all here",)
    assert converted(home, DOG.format(script="train_dreambooth.py", more=more.replace("200", "1")))[2] == ()
    assert cli.main(["recipe", "train.sh", "-o", "mine.toml"]) == 0


def test_what_lies_beside_a_script_is_found_from_another_folder(home, monkeypatch):
    (home / "dog").mkdir()
    (home / "elsewhere").mkdir()
    monkeypatch.chdir(home / "elsewhere")
    told, _, _ = converted(home, DOG.format(script="train_dreambooth.py", more=""))
    assert (told["images"], told["base"]) == ((home / "dog").as_posix(), "CompVis/stable-diffusion-v1-4")


def test_a_lora_of_a_subject_of_diffusers(home):
    more = "--rank=8 --use_dora --lora_dropout=0.1"
    told, usual, notes = converted(home, DOG.format(script="train_dreambooth_lora_sdxl.py", more=more))
    assert (told["rank"], told["dora"], told["dropout"]) == (8, True, 0.1)
    assert (usual["method"], usual["targets"], usual["prior"]) == ("lora", "attention", "none")
    assert usual["weight_decay"] == 1e-4
    assert notes == (
        "use_dora: one length is learned for each input here, which web interfaces read, and one for each output there",
        '--class-prompt is a prompt for what the subject is, such as "a photo of a dog"',
    )


def test_a_lora_of_a_style_and_a_word_of_diffusers(home):
    command = "accelerate launch train_text_to_image_lora.py --pretrained_model_name_or_path=a --random_flip"
    told, usual, notes = converted(home, f"{command} --train_data_dir=img --validation_prompt='a cat' --snr_gamma 5")
    assert (told["images"], told["flip"], told["sample_prompts"], told["min_snr"]) == ("img", True, ["a cat"], 5.0)
    assert (usual["epochs"], usual["batch"], usual["rank"], usual["resolution"]) == (100, 16, 4, 512)
    assert usual["learning_rate"] == 1e-4
    assert notes == ()
    word = "textual_inversion.py --pretrained_model_name_or_path=a --train_data_dir=./cat --placeholder_token='<Cat>' "
    told, usual, notes = converted(
        home, f"{word} --initializer_token=toy --train_batch_size=2 --scale_lr --push_to_hub"
    )
    assert (told["placeholder"], told["initial_words"], told["learning_rate"]) == (["<cat>"], ["toy"], 2e-4)
    assert (usual["steps"], usual["templates"], usual["flip"], usual["clip"]) == (5000, "object", True, 0.0)
    assert notes == (
        "scale_lr: the rate is 0.0002 on one process, as it is given here on any number",
        "push_to_hub without hub_model_id: nothing is uploaded unless --push-to-hub OWNER/NAME is given",
    )


@pytest.mark.parametrize(
    ("script", "more", "wanted"),
    [
        ("train_text_to_image_lora.py", "--report_to=wandb", {"wandb": "text2image-fine-tune"}),
        ("train_text_to_image.py", "--report_to wandb --tracker_project_name p", {"wandb": "p"}),
        ("train_text_to_image_lora.py", "--report_to=all", {"wandb": "text2image-fine-tune", "tensorboard": True}),
        ("train_text_to_image_lora_sdxl.py", "--report_to=comet_ml", {}),
        ("textual_inversion.py", "--placeholder_token=a --report_to=wandb", {"wandb": "textual_inversion"}),
    ],
)
def test_trackers_of_diffusers(script, more, wanted, home):
    told, _, notes = converted(home, f"{script} --pretrained_model_name_or_path=a --train_data_dir=img {more}")
    assert {name: value for name, value in told.items() if name in ("wandb", "tensorboard", "wandb_name")} == wanted
    assert notes == ()


NARUTO = r"""
accelerate launch --mixed_precision="fp16" {script} \
  --pretrained_model_name_or_path=a --train_data_dir=img --use_ema --resolution=512 --center_crop --random_flip \
  --train_batch_size=1 --gradient_accumulation_steps=4 --gradient_checkpointing --max_train_steps=15000 \
  --learning_rate=1e-05 --max_grad_norm=1 --lr_scheduler="constant" --lr_warmup_steps=0 --output_dir="out" {more}
"""


def test_the_whole_model_of_diffusers_with_captions(home):
    """By the guide's command."""
    more = "--offload_ema --input_perturbation=0.1 --validation_prompts 'a cat' 'a dog' --validation_epochs 5"
    told, usual, notes = converted(home, NARUTO.format(script="train_text_to_image.py", more=more))
    assert told == {
        **{"images": "img", "ema_on_cpu": True, "input_perturbation": 0.1, "sample_prompts": ["a cat", "a dog"]},
        **{"flip": True, "base": "a", "precision": "fp16", "gradient_checkpointing": True, "steps": 15000, "batch": 1},
        **{"accumulate": 4, "resolution": 512, "learning_rate": 1e-5, "optimizer": "adamw", "clip": 1.0},
        **{"schedule": "constant", "optimizer_args": ["betas=0.9,0.999"]},
    }
    assert usual == {"ema": 0.9999, "min_snr": 0.0, "weight_decay": 0.01}
    assert notes == ("validation_epochs = 5: --sample-every of sfumato train finetune counts steps",)
    assert (
        convert(written(home / "a.sh", NARUTO.format(script="train_text_to_image.py", more="")), home).recipe.ask == ()
    )


def test_the_whole_model_of_sdxl_of_diffusers(home):
    command = f"train_text_to_image_sdxl.py {BASE}=a --train_data_dir=img --proportion_empty_prompts=0.2"
    told, usual, notes = converted(home, f"{command} --timestep_bias_strategy=none --validation_prompt='a cat'")
    assert (told["caption_dropout"], told["sample_prompts"], "ema" in usual) == (0.2, ["a cat"], False)
    assert (usual["resolution"], usual["learning_rate"], usual["epochs"], usual["batch"]) == (1024, 1e-4, 100, 16)
    assert (usual["crop"], usual["schedule"], "rank" in usual, notes) == ("random", "constant", False, ())
    _, _, notes = converted(home, f"{command} --timestep_bias_strategy=later --timestep_bias_portion=0.5")
    assert notes == ("timestep_bias_strategy = later: has no counterpart here and is left out",)


@pytest.mark.parametrize(
    ("line", "rate"),
    [
        ("train_dreambooth.py --learning_rate=2e-6 --scale_lr --train_batch_size=2", 4e-6),
        ("train_dreambooth_lora_sdxl.py --instance_prompt=a", 5e-6),
        ("train_dreambooth_lora_sdxl.py --instance_prompt=a --text_encoder_lr=1e-5", 1e-5),
        ("train_dreambooth_lora_sdxl.py --optimizer=prodigy --learning_rate=1 --text_encoder_lr=1e-5", 1.0),
        ("train_text_to_image_lora_sdxl.py --train_data_dir=img --learning_rate=2e-5", 2e-5),
    ],
)
def test_text_encoders_have_the_rate_that_diffusers_scripts_give_them(line, rate, home):
    training = convert(written(home / "a.sh", f"{line} {BASE}=a --train_text_encoder"), home / "i.toml")
    found = training.recipe.values
    assert (found["train_text_encoder"], found["text_learning_rate"]) == (True, rate)
    assert any("on their MLPs, too" in note for note in training.notes) == ("lora" in line)


@pytest.mark.parametrize(
    ("line", "side"),
    [
        ("textual_inversion_sdxl.py --placeholder_token=x", 512),
        ("train_dreambooth_lora_sdxl.py --instance_prompt=a", 1024),
        ("train_text_to_image_lora_sdxl.py --train_data_dir=img", 1024),
        ("train_text_to_image_sdxl.py --train_data_dir=img", 1024),
    ],
)
def test_the_size_of_diffusers_scripts_for_sdxl(line, side, home):
    assert converted(home, f"{line} {BASE}=a")[1]["resolution"] == side
