"""Trainings of sd-scripts as configs of ours."""

import shutil
import tomllib

import pytest
from converting import BASE, TEDDY, converted, written

from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.interop.recipes import convert

NETWORK = r"""#!/bin/bash
export MODEL="runwayml/stable-diffusion-v1-5"
# train_db.py --pretrained_model_name_or_path=nothing
accelerate launch --num_cpu_threads_per_process 1 --mixed_precision=bf16 ./train_network.py \
  --pretrained_model_name_or_path="$MODEL" --train_data_dir="img" --output_dir=out --output_name=dog \
  --network_module=networks.lora --network_dim=16 --network_alpha=8 --resolution=512,512 --train_batch_size=2 \
  --max_train_steps=1000 --unet_lr=1e-4 --text_encoder_lr 5e-5 --optimizer_type="AdamW8bit" \
  --lr_scheduler="cosine_with_restarts" --lr_scheduler_num_cycles=3 --lr_warmup_steps=0.1 --xformers --cache_latents \
  --caption_extension=.txt --shuffle_caption --keep_tokens=1 --min_snr_gamma=5 --clip_skip=2 --seed=42 \
  --sample_prompts=prompts.txt --save_every_n_epochs=1 --fp8_base
"""


def test_a_command_of_sd_scripts_is_a_config_of_lora(home):
    told, usual, notes = converted(home, NETWORK)
    assert told == {
        **{"base": "runwayml/stable-diffusion-v1-5", "clip_skip": 1, "precision": "bf16", "attention": "xformers"},
        **{"seed": 42, "steps": 1000, "batch": 2, "resolution": 512, "rank": 16, "alpha": 8.0, "min_snr": 5.0},
        **{"learning_rate": 1e-4, "text_learning_rate": 5e-5, "optimizer": "adamw8bit", "name": "dog"},
        **{"optimizer_args": ["betas=0.9,0.999"], "schedule": "cosine", "cycles": 3, "warmup": 0.1},
        **{"sample_prompts": ["sks dog --w 512 --d 7", "sks dog's house"]},
        **{"images": (home / "mine-images.toml").as_posix(), "quantize": "int8"},
    }
    assert {key: usual[key] for key in ("targets", "train_text_encoder")} == {
        "targets": "transformers",
        "train_text_encoder": True,
    }
    assert notes == (
        "fp8_base = fp8: int8 takes its place",
        "save_every_n_epochs = 1: --save-every of sfumato train lora counts steps",
    )


def test_of_what_sd_scripts_is_not_told_its_defaults_are_written(home):
    """Those of library/train_util.py and networks/lora.py, where ours are others."""
    _, usual, notes = converted(home, 'pretrained_model_name_or_path = "a"\nnetwork_dim = 8', "kohya.toml")
    assert notes == ()
    assert usual == {
        **{"learning_rate": 2e-6, "text_learning_rate": 2e-6},
        **{"steps": 1600, "batch": 1, "targets": "transformers", "alpha": 1.0, "train_text_encoder": True},
        **{"weight_decay": 0.01, "schedule": "constant", "min_snr": 0.0},
    }


@pytest.mark.parametrize(
    ("line", "told", "usual"),
    [
        ("--network_train_unet_only", {}, {"train_text_encoder": None}),
        ("--text_encoder_lr 0", {"text_learning_rate": None}, {"train_text_encoder": None}),
        ("--text_encoder_lr 1e-5 2e-5", {"text_learning_rate": 2e-5}, {}),
        ("--learning_rate 3e-5", {"learning_rate": 3e-5, "text_learning_rate": 3e-5}, {}),
        ("--unet_lr 1e-4 --learning_rate 3e-5", {"learning_rate": 1e-4, "text_learning_rate": 3e-5}, {}),
        ("--network_args conv_dim=4 conv_alpha=2", {"conv_rank": 4, "conv_alpha": 2.0}, {"targets": "everything"}),
        ("--network_args conv_dim=4 conv_alpha=0", {"conv_rank": 4, "conv_alpha": 4.0}, {"targets": "everything"}),
        (
            "--network_module lycoris.kohya --network_args conv_dim=4 conv_alpha=0",
            {"conv_rank": 4, "conv_alpha": 4.0},
            {},
        ),
        ("--network_args conv_dim=4", {"conv_rank": 4}, {"targets": "everything", "conv_alpha": 1.0}),
        ("--network_alpha 0", {"alpha": 8}, {}),
        ("--network_args loraplus_lr_ratio=4", {"loraplus_ratio": 4.0}, {}),
        ("--network_args rank_dropout=0.1 module_dropout=0", {"rank_dropout": 0.1, "module_dropout": 0.0}, {}),
        ("--network_args conv_dim=4", {"rank_dropout": None, "module_dropout": None}, {"rank_dropout": None}),
        (
            "--network_module lycoris.kohya --network_args algo=loha module_dropout=0.2",
            {"algo": "loha", "module_dropout": 0.2, "rank_dropout": None},
            {},
        ),
        (
            "--network_module lycoris.kohya --network_args algo=lokr factor=8 conv_dim=6 dora_wd=True",
            {"algo": "lokr", "factor": 8, "conv_rank": 6, "dora": True},
            {"targets": "everything", "conv_alpha": 1.0},
        ),
        (
            "--network_module lycoris.kohya --network_alpha 2 --network_args algo=diag-oft conv_dim=4 conv_alpha=1",
            {"algo": "oft", "rank": 8, "conv_rank": 4, "alpha": None, "conv_alpha": None},
            {"alpha": None, "conv_alpha": None},
        ),
        (
            "--network_module lycoris.kohya --network_args preset=attn-mlp",
            {"algo": "lora"},
            {"targets": "transformers"},
        ),
        ("--max_train_epochs 10 --max_train_steps 5", {"epochs": 10, "steps": None}, {"steps": None}),
        ("--lr_scheduler constant_with_warmup --lr_warmup_steps 7", {"schedule": "constant", "warmup": 7}, {}),
        ("--lr_warmup_steps 7", {"warmup": None}, {"schedule": "constant"}),
        ("--lr_scheduler polynomial", {"schedule": "linear"}, {}),
        ("--use_8bit_adam", {"optimizer": "adamw8bit"}, {}),
        ("--optimizer_type Lion", {"optimizer": "lion", "optimizer_args": None}, {"weight_decay": 0.0}),
        (
            "--optimizer_type prodigy --optimizer_args decouple=True weight_decay=0.1 d_coef=2 betas=0.9,0.99",
            {
                "weight_decay": 0.1,
                "optimizer_args": ["use_bias_correction=False", "safeguard_warmup=False", "d_coef=2"],
            },
            {},
        ),
        ("--optimizer_type DAdaptAdam", {"optimizer": "prodigy"}, {}),
        ("--optimizer_type prodigyplus.ProdigyPlusScheduleFree", {"optimizer": "prodigy"}, {}),
        ("--optimizer_args 'betas=(0.9, 0.95)'", {"optimizer_args": ["betas=(0.9, 0.95)"]}, {}),
        (
            "--optimizer_type adafactor --optimizer_args relative_step=False scale_parameter=False warmup_init=False",
            {"optimizer": "adafactor", "optimizer_args": None},
            {"weight_decay": 0.0},
        ),
        ("--debiased_estimation_loss", {"debiased": True}, {"min_snr": None}),
        ("--multires_noise_iterations 6 --multires_noise_discount 0.2", {"pyramid_noise": 0.2}, {}),
        ("--multires_noise_discount 0.2", {"pyramid_noise": None}, {}),
        ("--loss_type huber", {"huber": 0.1}, {}),
        ("--resolution 512,768", {"resolution": 624}, {}),
        ("--clip_skip 1", {"clip_skip": None}, {}),
        ("--max_token_length 225", {"max_tokens": 225}, {}),
        ("--v2 --v_parameterization", {"prediction_type": "v_prediction"}, {}),
        ("--logging_dir logs", {"tensorboard": True, "wandb": None}, {}),
        ("--log_with wandb --logging_dir logs", {"tensorboard": None, "wandb": "network_train"}, {}),
        (
            "--log_with=all --logging_dir logs --log_tracker_name p --wandb_run_name r",
            {"tensorboard": True, "wandb": "p", "wandb_name": "r"},
            {},
        ),
        ("--wandb_run_name r --log_tracker_name p", {"wandb": None, "wandb_name": None}, {}),
    ],
)
def test_a_setting_of_sd_scripts_means_here(line, told, usual, home):
    found = converted(home, f"python train_network.py --pretrained_model_name_or_path=a --network_dim=8 {line}")
    assert {key: found[0].get(key) for key in told} == told
    assert {key: found[1].get(key) for key in usual} == usual


def test_sdxl_s_script_does_not_look_at_clip_skip(home):
    told, _, _ = converted(home, "sdxl_train_network.py --pretrained_model_name_or_path=a --clip_skip=2")
    assert "clip_skip" not in told


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("--optimizer_type SGDNesterov", "optimizer SGDNesterov: has no counterpart; adamw takes its place"),
        (
            "--network_module lycoris.kohya --network_dim 32 --network_args algo=diag-oft",
            "algo=diag-oft: in layers of fewer than 1024 outputs LyCORIS's blocks have other sizes",
        ),
        (
            "--scale_weight_norms 1 --network_module lycoris.kohya --network_args algo=diag-oft",
            "scale_weight_norms: rotations have no such limit, so it is left out",
        ),
        (
            "--network_module lycoris.kohya --network_args algo=diag-oft constraint=0.1 rescaled=False",
            "network_args constraint=0.1: has no counterpart here and is left out",
        ),
        ("--network_args use_tucker=True", "network_args use_tucker=True: has no counterpart here and is left out"),
        (
            "--network_module lycoris.kohya --network_args rank_dropout=0.1",
            "network_args rank_dropout=0.1: LyCORIS drops rows and scales nothing up; here the rest is scaled up, and",
        ),
        ("--optimizer_args amsgrad=True", "optimizer_args amsgrad=True: has no counterpart here and is left out"),
        ("--optimizer_args foo=1", "optimizer_args foo=1: has no counterpart here and is left out"),
        ("--loss_type smooth_l1", "loss_type = smooth_l1: has no counterpart; the errors are squared"),
        ("--sample_prompts none.txt", "sample_prompts = none.txt: no file with prompts is there; give them as"),
        ("--lr_scheduler rex", "lr_scheduler = rex: has no counterpart; cosine takes its place"),
        ("--blocks_to_swap 4", "blocks_to_swap = 4: there is no counterpart; sfumato memory tells what fits"),
        ("--loss_type huber --huber_scale 2", "huber_scale = 2: has no counterpart here and is left out"),
        ("--made_up 4", "made_up = 4: has no counterpart here and is left out"),
        ("--resolution 512,768", "resolution = 512,768: 624, of which images get about the square's pixels"),
    ],
)
def test_what_has_no_counterpart_is_named(line, note, home):
    _, _, notes = converted(home, f"train_network.py --pretrained_model_name_or_path=a --network_dim=8 {line}")
    assert [each[: len(note)] for each in notes] == [note]


def test_what_sample_prompts_say_and_has_no_counterpart_is_named(home):
    (home / "prompts.txt").write_text("a dog, sitting --n bad, blurry --ss euler_a --w 512 --l 7.5 --g 2")
    command = f"train_network.py {BASE}=a --sample_prompts=prompts.txt"
    assert cli.main(["recipe", str(written(home / "a.sh", command)), "-o", "mine.toml"]) == 0
    told, _, notes = converted(home, command)
    assert told["sample_prompts"] == ["a dog, sitting --n bad, blurry --w 512 --l 7.5"]
    assert notes == tuple(
        f"sample_prompts: --{flag} has no counterpart and is left out" for flag in ("ss euler_a", "g 2")
    )


def test_a_file_of_sample_prompts_may_be_a_json_or_a_toml(home):
    command = f"train_network.py {BASE}=a --sample_prompts="
    (home / "a.json").write_text('[{"prompt": "a dog", "seed": 7, "scale": 7.5}]')
    (home / "a.toml").write_text('[prompt]\nseed = 7\n[[prompt.subset]]\nprompt = "a dog"')
    assert converted(home, f"{command}a.json")[0]["sample_prompts"] == ["a dog --d 7 --l 7.5"]
    assert converted(home, f"{command}a.toml")[0]["sample_prompts"] == ["a dog --d 7"]
    (home / "a.json").write_text("{}")
    told, _, notes = converted(home, f"{command}a.json")
    assert "sample_prompts" not in told
    assert [note for note in notes if note.startswith("sample_prompts ")] == [
        f"sample_prompts {home / 'a.json'}: there is no prompt in it; write one on each line, or leave it out."
    ]


def test_the_other_scripts_of_sd_scripts(home):
    word = 'pretrained_model_name_or_path = "a"\ntoken_string = "<Fox>"\ninit_word = "fox"\nnum_vectors_per_token = 4'
    training = convert(written(home / "word.toml", word), home / "i.toml")
    assert training.recipe.program == "textual_inversion"
    found = training.recipe.values
    assert (found["placeholder"], found["initial_words"], found["vectors"]) == (["<fox>"], ["fox"], 4)
    assert (found["caption"], found["keep_scale"]) == ("{caption}", False)
    whole = 'pretrained_model_name_or_path = "a"\ntrain_data_dir = "img"\nreg_data_dir = "reg"\nlearning_rate = 1e-6'
    training = convert(written(home / "whole.toml", whole), home / "i.toml")
    assert (training.recipe.program, training.recipe.ask) == ("dreambooth", ("class_name",))
    found = training.recipe.values
    assert (found["method"], found["prior"], found["train_text_encoder"]) == ("full", "pictures", True)
    assert found["learning_rate"] == found["text_learning_rate"] == 1e-6


@pytest.mark.parametrize(
    ("command", "told", "usual", "notes"),
    [
        ("fine_tune.py", {}, {"learning_rate": 2e-6, "steps": 1600, "schedule": "constant"}, []),
        ("sdxl_train.py", {}, {"learning_rate": 2e-6, "batch": 1, "min_snr": 0.0}, []),
        (
            "fine_tune.py --train_text_encoder --learning_rate 1e-5",
            {"learning_rate": 1e-5, "train_text_encoder": True, "text_learning_rate": 1e-5},
            {},
            [],
        ),
        ("fine_tune.py --train_text_encoder", {"train_text_encoder": True}, {"text_learning_rate": 2e-6}, []),
        ("fine_tune.py --train_text_encoder --learning_rate_te 3e-6", {"text_learning_rate": 3e-6}, {}, []),
        ("fine_tune.py --train_text_encoder --learning_rate_te 0", {"train_text_encoder": None}, {}, []),
        ("fine_tune.py --learning_rate_te 3e-6 --clip_skip 2", {"text_learning_rate": None, "clip_skip": 1}, {}, []),
        (
            "sdxl_train.py --train_text_encoder --learning_rate_te1 3e-6 --learning_rate_te2 3e-6",
            {"text_learning_rate": 3e-6},
            {},
            [],
        ),
        (
            "sdxl_train.py --train_text_encoder --learning_rate_te1 3e-6",
            {"text_learning_rate": 3e-6},
            {},
            ["both text encoders learn, at one rate, the highest of these"],
        ),
        (
            "sdxl_train.py --fused_backward_pass --optimizer_type adafactor --optimizer_args relative_step=False",
            {"fused": True},
            {},
            ["clips the gradient of each weight there"],
        ),
        (
            "sdxl_train.py --fused_backward_pass --max_grad_norm 0 --optimizer_type adafactor "
            "--optimizer_args relative_step=False",
            {"fused": True, "clip": 0.0},
            {},
            [],
        ),
        ("sdxl_train.py --save_every_n_steps 100", {"save_every": None}, {}, ["save_every_n_steps = 100"]),
    ],
)
def test_fine_tune_and_sdxl_train_are_finetune(command, told, usual, notes, home):
    """By what library/train_util.py and the two scripts do where they are told nothing."""
    script, _, more = command.partition(" ")
    training = convert(written(home / "a.sh", f"{script} {BASE}=a --train_data_dir=img {more}"), home / "i.toml")
    recipe = training.recipe
    assert (recipe.program, recipe.ask) == ("finetune", ())
    assert {key: recipe.told.get(key) for key in told} == told
    assert {key: recipe.usual.get(key) for key in usual} == usual
    assert [note for note in training.notes if not note.startswith("img: caption_extension")] == [
        note for note in training.notes if any(part in note for part in notes)
    ]
    assert all(any(part in note for note in training.notes) for part in notes)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("sdxl_train.py --block_lr=1e-5,1e-6", "block_lr gives each block of the U-Net a rate of its own"),
        ("sdxl_train.py --learning_rate=0", r"its U-Net does not learn \(learning_rate 0\), which `finetune` always"),
    ],
)
def test_whole_models_that_cannot_be_had_are_refused(command, said, home):
    with pytest.raises(ConfigError, match=said):
        converted(home, f"{command} {BASE}=a")


def test_images_with_their_captions_in_a_file_are_repeated_as_often(home):
    """The captions themselves are told to be listed beside the images."""
    shutil.copytree(TEDDY, home / "bears")
    command = f"fine_tune.py {BASE}=a --train_data_dir=bears --in_json=meta.json --dataset_repeats=3"
    training = convert(written(home / "a.sh", command), home / "i.toml")
    assert tomllib.loads(training.images.text)["source"] == [{"path": "bears", "repeats": 3}]
    assert training.notes == (
        "in_json = meta.json: captions are read from .txt files beside the images, or from a metadata.jsonl; list them "
        "there",
    )


@pytest.mark.parametrize(
    ("settings", "script"),
    [
        ('in_json = "m.json"', "fine_tune.py"),
        ('in_json = "m.json"\nlearning_rate_te1 = 1e-6', "sdxl_train.py"),
        ("sdxl = true", "sdxl_train.py"),
        ("learning_rate = 1e-6", "train_db.py"),
        ("network_dim = 4\nsdxl = true", "sdxl_train_network.py"),
        ("network_dim = 4\nlearning_rate_te1 = 1e-6", "train_network.py"),
    ],
)
def test_a_config_tells_which_script_it_is_for(settings, script, home):
    text = f'pretrained_model_name_or_path = "a"\ntrain_data_dir = "img"\n{settings}\n'
    assert convert(written(home / "a.toml", text), home / "i.toml").source == f"{script} in a.toml"


@pytest.mark.usefixtures("quick")
def test_a_training_of_a_whole_model_trains(home, pocket_folder, capsys):
    shutil.copytree(TEDDY, home / "bears")
    command = f"fine_tune.py {BASE}={pocket_folder} --train_data_dir=bears --in_json=m.json --resolution=64 "
    written(home / "a.sh", command + "--max_train_steps=2 --mixed_precision=no --output_name=bear --learning_rate=1e-5")
    assert cli.main(["recipe", "a.sh", "-o", "mine.toml"]) == 0
    command = capsys.readouterr().out.split()
    assert command[:4] == ["sfumato", "train", "finetune", "mine.toml"]
    quiet = ["--sample-every", "0", "--measure-every", "0", "--device", "cpu"]
    assert cli.main([*command[1:], *quiet]) == 0
    assert (home / "runs/mine/bear/model_index.json").is_file()


def test_the_weight_of_regularization_images_counts_once(home):
    """It stands in their source."""
    shutil.copytree(TEDDY, home / "reg/1_bear")
    text = 'pretrained_model_name_or_path = "a"\ntrain_data_dir = "img"\nreg_data_dir = "reg"\nprior_loss_weight = 0.5'
    training = convert(written(home / "whole.toml", text), home / "i.toml")
    assert "prior_weight" not in training.recipe.values
    assert [source.get("weight") for source in tomllib.loads(training.images.text)["source"]] == [None, 0.5]


def test_what_kohya_ss_writes_and_does_nothing_needs_no_note(home):
    text = 'pretrained_model_name_or_path = "a"\nnetwork_dim = 8\nepoch = 10\nnoise_offset_type = "Original"\n'
    text += 'loss_type = "l2"\nhuber_c = 0.1\nhuber_scale = 1\nhuber_schedule = "snr"\nlr_scheduler_args = []\n'
    assert converted(home, text, "kohya.toml")[2] == ()


def test_no_secret_is_copied(home):
    asked = "--log_with wandb --wandb_api_key=0a1b2c3d --huggingface_token=0a1b2c3d"
    found = converted(home, f"{NETWORK.rstrip()} {asked}")
    assert found[0]["wandb"] == "network_train"
    assert "0a1b2c3d" not in str(found)


def test_configs_that_a_command_names_are_read(home):
    (home / "config.toml").write_text('[a]\npretrained_model_name_or_path = "a"\n[b]\nnetwork_dim = 8\nseed = 1')
    (home / "data.toml").write_text(
        "[general]\nresolution = 768\n[[datasets]]\nbatch_size = 4\n[[datasets.subsets]]\nimage_dir = 'img'\n"
    )
    command = "sdxl_train_network.py --config_file=config --seed=2 --dataset_config=data.toml"
    told, _, _ = converted(home, command)
    assert (told["seed"], told["rank"], told["resolution"], told["batch"]) == (2, 8, 768, 4)
    assert told["images"].endswith("mine-images.toml")


def test_a_config_of_data_sets_counts_before_the_command_which_counts_where_it_says_nothing(home):
    """BlueprintGenerator.generate of sd-scripts' library/config_util.py."""
    data = "[general]\nkeep_tokens = 2\n[[datasets]]\nbatch_size = 4\nresolution = [512, 512]\n"
    data += "[[datasets.subsets]]\nimage_dir = 'img/10_sks bear'\n"
    written(home / "data.toml", data)
    command = f"train_network.py {BASE}=a --dataset_config=data.toml --train_batch_size=1 --resolution=768 "
    command += "--shuffle_caption --caption_extension=.txt --keep_tokens=1 --caption_dropout_rate=0.1 --masked_loss"
    training = convert(written(home / "a.sh", command), home / "i.toml")
    assert (training.recipe.told["batch"], training.recipe.told["resolution"]) == (4, 512)
    (source,) = tomllib.loads(training.images.text)["source"]
    assert source == {"path": "img/10_sks bear", "shuffle_tags": True, "keep_tags": 2, "caption_dropout": 0.1}
    assert training.notes == ("masked_loss = True: --mask files, with the masks in masks/ of each image folder",)


def test_data_sets_of_different_sizes_keep_them(home):
    data = "".join(
        f"[[datasets]]\n{side}\nbatch_size = {batch}\n[[datasets.subsets]]\nimage_dir = 'img/10_sks bear'\n"
        for side, batch in (("resolution = [512, 768]", 3), ("", 4))
    )
    written(home / "data.toml", data)
    command = f"train_network.py {BASE}=a --dataset_config=data.toml --resolution=768 --caption_extension=.txt"
    training = convert(written(home / "train.sh", command), home / "i.toml")
    assert (training.recipe.told["resolution"], training.recipe.told["batch"]) == (624, 3)
    assert [source["resolution"] for source in tomllib.loads(training.images.text)["source"]] == [624, 768]
    assert "batch_size of its data sets: 3, 4; all have the first of these" in training.notes
    written(home / "data.toml", data.replace("resolution = [512, 768]", ""))
    training = convert(home / "train.sh", home / "i.toml")
    assert (training.recipe.told["resolution"], "resolution" in training.images.text) == (768, False)


@pytest.mark.usefixtures("quick")
def test_the_command_that_is_printed_trains(home, pocket_folder, capsys):
    text = NETWORK.replace("runwayml/stable-diffusion-v1-5", str(pocket_folder)).replace("--xformers", "")
    text = text.replace("AdamW8bit", "AdamW").replace("1000", "2").replace("512,512", "64").replace("--mixed", "--not")
    (home / "train.sh").write_text(text.replace("--sample_prompts=prompts.txt", ""))
    assert cli.main(["recipe", "train.sh", "-o", "mine.toml"]) == 0
    command = capsys.readouterr().out.split()
    assert command == ["sfumato", "train", "lora", "mine.toml", "--output", "runs/mine"]
    quiet = ["--sample-every", "0", "--measure-every", "0", "--device", "cpu", "--warmup", "0", "--cycles", "1"]
    assert cli.main([*command[1:], *quiet]) == 0
    assert (home / "runs/mine/dog.safetensors").is_file()
    config = tomllib.loads((home / "runs/mine/config.toml").read_text())
    assert (config["rank"], config["targets"], config["train_text_encoder"]) == (16, "transformers", True)
