"""What kohya_ss saves as configs of ours, by way of the settings that it gives sd-scripts."""

import json
import tomllib

import pytest
from converting import written

from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.interop.recipes import convert

SAVED = {
    **{"LoRA_type": "Standard", "LyCORIS_preset": "full", "adaptive_noise_scale": 0, "additional_parameters": ""},
    **{"block_alphas": "", "bucket_no_upscale": True, "bucket_reso_steps": 64, "cache_latents": True, "conv_dim": 4},
    **{"caption_dropout_every_n_epochs": 0.0, "caption_dropout_rate": 0, "caption_extension": ".txt", "factor": -1},
    **{"clip_skip": "2", "conv_alpha": 2, "epoch": 3, "flip_aug": False, "gradient_accumulation_steps": 1.0},
    **{"gradient_checkpointing": True, "keep_tokens": 2, "learning_rate": 0.0001, "lora_network_weights": ""},
    **{"lr_scheduler": "cosine", "lr_scheduler_num_cycles": "", "lr_scheduler_power": "", "lr_warmup": 10},
    **{"max_grad_norm": 1, "max_resolution": "512,512", "max_timestep": 1000, "max_token_length": "75"},
    **{"max_train_epochs": "", "min_snr_gamma": 5, "mixed_precision": "bf16", "model_list": "custom"},
    **{"module_dropout": 0, "multires_noise_discount": 0.3, "multires_noise_iterations": 6, "network_alpha": 8},
    **{"network_dim": 16, "network_dropout": 0, "noise_offset": 0.05, "noise_offset_type": "Original"},
    **{"num_cpu_threads_per_process": 2, "optimizer": "AdamW8bit", "optimizer_args": "", "output_dir": "out"},
    **{"output_name": "bear", "pretrained_model_name_or_path": "a", "prior_loss_weight": 1.0, "rank_dropout": 0},
    **{"reg_data_dir": "", "sample_prompts": "sks bear --w 512\n\n# no\na cat", "save_every_n_epochs": 0},
    **{"save_precision": "fp16", "scale_weight_norms": 0, "sdxl": False, "seed": "0", "shuffle_caption": True},
    **{"stop_text_encoder_training_pct": 0, "text_encoder_lr": 5e-05, "train_batch_size": 2, "train_data_dir": "img"},
    **{"unet_lr": 0.0001, "unit": 1, "use_cp": False, "v2": False, "vae": "", "xformers": "xformers"},
}


def of_window(home, **changes):
    values = {key: value for key, value in {**SAVED, **changes}.items() if value is not None}
    return convert(written(home / "saved.json", json.dumps(values)), home / "mine-images.toml")


def test_its_run_at_w_and_b_is_ours_and_its_key_is_not(home):
    asked = {"log_with": "wandb", "log_tracker_name": "p", "wandb_run_name": "r", "wandb_api_key": "0a1b2c3d"}
    recipe = of_window(home, **asked).recipe
    assert (recipe.told["wandb"], recipe.told["wandb_name"]) == ("p", "r")
    assert "0a1b2c3d" not in str((recipe, recipe.notes))


def test_what_its_window_saves_is_a_config_of_lora(home):
    training = of_window(home)
    assert training.source == "train_network.py in saved.json"
    assert training.recipe.told == {
        **{"base": "a", "clip_skip": 1, "precision": "bf16", "gradient_checkpointing": True, "epochs": 3, "batch": 2},
        **{"attention": "xformers", "save_precision": "fp16", "accumulate": 1, "resolution": 512, "rank": 16},
        **{"alpha": 8.0, "learning_rate": 1e-4, "text_learning_rate": 5e-5, "optimizer": "adamw8bit"},
        **{"optimizer_args": ["betas=0.9,0.999"], "schedule": "cosine", "clip": 1.0, "min_snr": 5.0},
        **{"noise_offset": 0.05, "max_timestep": 1000, "name": "bear", "warmup": 0.1},
        **{"sample_prompts": ["sks bear --w 512", "a cat"], "images": (home / "mine-images.toml").as_posix()},
    }
    assert training.recipe.usual == {"targets": "transformers", "train_text_encoder": True, "weight_decay": 0.01}
    assert training.notes == ("bucket_no_upscale = True: small images are enlarged, and sfumato check names them",)
    source = {"path": "img", "shuffle_tags": True, "keep_tags": 2}  # its folder's name has the rest, as there
    assert tomllib.loads(training.images.text)["source"] == [source]


@pytest.mark.parametrize(
    ("changes", "told", "usual"),
    [
        ({"max_train_steps": 500}, {"steps": 500, "epochs": None, "warmup": 0.1}, {}),
        ({"lr_warmup_steps": 7}, {"warmup": 7}, {}),
        ({"lr_warmup": 100}, {"warmup": 0.9999}, {}),
        ({"noise_offset_type": "Multires"}, {"noise_offset": None, "pyramid_noise": 0.3}, {}),
        ({"LoRA_type": "Kohya LoCon"}, {"conv_rank": 4, "conv_alpha": 2.0}, {"targets": "everything"}),
        ({"LoRA_type": "LoCon"}, {"algo": "lora", "conv_rank": 4}, {"targets": "everything"}),
        ({"LoRA_type": "LyCORIS/LoKr", "factor": 8, "dora_wd": True}, {"algo": "lokr", "factor": 8, "dora": True}, {}),
        ({"LoRA_type": "LyCORIS/Diag-OFT"}, {"algo": "oft", "alpha": None}, {}),
        ({"LoRA_type": "LyCORIS/LoHa", "LyCORIS_preset": "attn-only"}, {"algo": "loha"}, {"targets": "attention"}),
        ({"text_encoder_lr": 0}, {"text_learning_rate": None}, {"train_text_encoder": None}),
        ({"text_encoder_lr": "", "unet_lr": ""}, {"learning_rate": 1e-4, "text_learning_rate": 1e-4}, {}),
        ({"loraplus_lr_ratio": 4}, {"loraplus_ratio": 4.0}, {}),
        ({"xformers": "sdpa"}, {"attention": None}, {}),
        ({"xformers": True, "seed": "7"}, {"attention": "xformers", "seed": 7}, {}),
        ({"optimizer_args": "weight_decay=0.1 betas=0.9,0.95"}, {"weight_decay": 0.1}, {}),
        ({"optimizer_args": '"weight_decay=0.1" it\'s'}, {"weight_decay": 0.1}, {}),
        ({"lora_network_weights": "b.safetensors"}, {"init_from": "b.safetensors"}, {}),
        ({"max_grad_norm": 0}, {"clip": None}, {}),  # which its window leaves out
        ({"additional_parameters": '--ip_noise_gamma=0.1 --output_name "the bear"'}, {"name": "the bear"}, {}),
        ({"additional_parameters": "--ip_noise_gamma=0.1"}, {"input_perturbation": 0.1}, {}),
    ],
)
def test_a_setting_of_kohya_ss_means_here(changes, told, usual, home):
    recipe = of_window(home, **changes).recipe
    assert {key: recipe.told.get(key) for key in told} == told
    assert {key: recipe.usual.get(key) for key in usual} == usual


def test_its_other_windows(home):
    word = {"LoRA_type": None, "token_string": "<Bear>", "init_word": "bear", "num_vectors_per_token": 3}
    recipe = of_window(home, **word, template="style template").recipe
    assert recipe.program == "textual_inversion"
    found = recipe.values
    assert (found["placeholder"], found["initial_words"], found["vectors"]) == (["<bear>"], ["bear"], 3)
    assert found["templates"] == "style"
    recipe = of_window(home, LoRA_type=None, learning_rate_te=2e-5).recipe
    assert (recipe.program, recipe.ask, recipe.values["text_learning_rate"]) == ("dreambooth", ("class_name",), 2e-5)
    assert "train_text_encoder" not in of_window(home, LoRA_type=None, learning_rate_te=0).recipe.values


CAPTIONED = {
    **{"LoRA_type": None, "train_data_dir": None, "image_folder": "img", "train_dir": "prepared", "dataset_repeats": 4},
    **{"caption_metadata_filename": "meta_cap.json", "latent_metadata_filename": "meta_lat.json", "full_path": True},
    **{"sdxl_checkbox": False, "train_text_encoder": True, "learning_rate": 1e-5, "learning_rate_te": 5e-6},
    **{"learning_rate_te1": 1e-6, "learning_rate_te2": 2e-6, "create_caption": True, "batch_size": 1, "block_lr": ""},
}


def test_its_window_of_fine_tuning(home):
    training = of_window(home, **CAPTIONED)
    assert (training.source, training.recipe.program) == ("fine_tune.py in saved.json", "finetune")
    told = {"epochs": 3, "learning_rate": 1e-5, "train_text_encoder": True, "text_learning_rate": 5e-6}
    assert told.items() <= training.recipe.told.items()
    (source,) = tomllib.loads(training.images.text)["source"]
    assert (source["path"], source["repeats"]) == ("img", 4)
    assert training.notes[0].startswith("in_json = prepared/meta_cap.json: captions are read from .txt files beside")
    assert not [note for note in training.notes if note.startswith(("learning_rate", "dataset_repeats", "train_text"))]
    assert of_window(home, **CAPTIONED, flip_aug=True).recipe.told["epochs"] == 2  # half of 3, rounded up
    assert of_window(home, **CAPTIONED, flip_aug=True, max_train_steps=9).recipe.told["steps"] == 5
    assert "train_text_encoder" not in of_window(home, **{**CAPTIONED, "learning_rate_te": 0}).recipe.values
    large = of_window(home, **{**CAPTIONED, "sdxl_checkbox": True, "fused_backward_pass": True})
    assert (large.source, large.recipe.told["text_learning_rate"]) == ("sdxl_train.py in saved.json", 2e-6)
    assert large.recipe.told["fused"] is True
    assert "clip_skip" not in large.recipe.told


def test_its_window_of_dreambooth_with_sdxl(home):
    """sdxl_train.py on folders of images, whose text encoders learn where one has a rate."""
    rates = {"learning_rate": 1e-6, "learning_rate_te": 1e-3, "learning_rate_te1": 0, "learning_rate_te2": 0}
    training = of_window(home, LoRA_type=None, sdxl=True, **rates, stop_text_encoder_training_pct=10)
    assert (training.source, training.recipe.program) == ("sdxl_train.py in saved.json", "finetune")
    assert "train_text_encoder" not in training.recipe.values
    assert training.recipe.told["learning_rate"] == 1e-6
    assert not [note for note in training.notes if note.startswith(("stop_text", "learning_rate"))]
    both = of_window(home, LoRA_type=None, sdxl=True, **{**rates, "learning_rate_te1": 2e-6})
    assert both.recipe.told["text_learning_rate"] == 2e-6
    note = (
        "learning_rate_te1 = 2e-06, learning_rate_te2 = 0: both text encoders learn, at one rate, the highest of these"
    )
    assert note in both.notes


def test_each_window_tells_what_it_does(home):
    """Of whole models and words both kinds of noise, of whole models zeros, and of words no dropout of captions."""
    noise = {"noise_offset": 0.05, "pyramid_noise": 0.3}
    whole = of_window(home, LoRA_type=None, max_grad_norm=0, learning_rate_te1=1e-5, learning_rate_te2=1e-5)
    assert noise.items() <= whole.recipe.told.items()
    assert whole.recipe.told["clip"] == 0
    assert not [note for note in whole.notes if "learning_rate" in note]
    told = {"token_string": "bear", "caption_dropout_rate": 0.1, "stop_text_encoder_training_pct": 5}
    word = of_window(home, LoRA_type=None, max_grad_norm=0, **told)
    assert noise.items() <= word.recipe.told.items()
    assert "clip" not in word.recipe.told
    assert "caption_dropout" not in word.images.text
    assert not [note for note in word.notes if "stop_text_encoder" in note]
    of_other_noise = {"adaptive_noise_scale": 0.005, "noise_offset_random_strength": True}
    network = of_window(home, noise_offset_type="Multires", stop_text_encoder_training=5, **of_other_noise)
    assert network.notes == of_window(home).notes


def test_sdxl_s_script_for_sdxl(home):
    training = of_window(home, sdxl=True, sdxl_no_half_vae=True)
    assert training.source == "sdxl_train_network.py in saved.json"
    assert "clip_skip" not in training.recipe.told


def test_what_kohya_ss_has_alone_is_named(home):
    notes = of_window(home, LoRA_type="LyCORIS/LoKr", use_tucker=True, train_inpainting=True, lr_warmup=0).notes
    assert notes == (
        "bucket_no_upscale = True: small images are enlarged, and sfumato check names them",
        "network_args use_tucker=True: has no counterpart here and is left out",
        "train_inpainting = True: has no counterpart here and is left out",
    )
    kept = ("lr_scheduler_args = a=1", "no_token_padding = True", "save_last_n_epochs = 2", "save_last_n_steps = 3")
    there = dict(each.split(" = ") for each in kept)
    assert {note.partition(":")[0] for note in of_window(home, **there).notes} >= {*kept}
    both = of_window(home, debiased_estimation_loss=True)
    assert (both.recipe.told["min_snr"], "debiased" in both.recipe.told) == (5.0, False)
    assert "debiased_estimation_loss beside min_snr_gamma: timesteps are weighed once, by the latter" in both.notes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"LoRA_type": "LyCORIS/iA3"},
            "LoRA_type LyCORIS/iA3 has no counterpart; Standard, Kohya LoCon, LoCon, LyCORIS",
        ),
        ({"flux1_checkbox": True}, "its model is that of flux1_checkbox; wanted SD 1.x, SD 2.x or SDXL."),
        (
            {"LoRA_type": None, "sdxl": True, "block_lr": "1e-5,1e-5"},
            "block_lr gives each block of the U-Net a rate of its own, and here is one.",
        ),
        ({"unet_lr": 0}, "trains no U-Net (network_train_text_encoder_only), which `lora` always does."),
        ({"additional_parameters": "--a 'b"}, 'additional_parameters "--a \'b": No closing quotation.'),
    ],
)
def test_what_of_kohya_ss_cannot_be_had_is_refused(changes, said, home):
    with pytest.raises(ConfigError) as refused:
        of_window(home, **changes)
    assert str(refused.value).removeprefix("saved.json: ").startswith(said)


@pytest.mark.usefixtures("quick")
def test_a_training_of_kohya_ss_trains(home, pocket_folder, capsys):
    changes = {"pretrained_model_name_or_path": str(pocket_folder), "max_resolution": "64,64", "max_train_steps": 2}
    of_window(home, **changes, optimizer="AdamW", xformers="sdpa", lr_warmup=0, clip_skip="1")
    assert cli.main(["recipe", "saved.json", "-o", "mine.toml"]) == 0
    command = capsys.readouterr().out.split()
    quiet = ["--sample-every", "0", "--measure-every", "0", "--device", "cpu", "--precision", "fp32"]
    assert cli.main([*command[1:], *quiet]) == 0
    assert (home / "runs/mine/bear.safetensors").is_file()
