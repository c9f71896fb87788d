"""Trainings of SimpleTuner as configs of ours. Defaults are those of its field_registry."""

import json
import tomllib

import pytest
from converting import written

from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.interop.recipes import convert

SAVED = {
    **{
        "--model_type": "lora",
        "--model_family": "sdxl",
        "--model_flavour": "base-1.0",
        "--output_dir": "output/models",
    },
    **{"--validation_resolution": "1024x768,1280x768", "--validation_guidance": 3.4, "--learning_rate": "1e-4"},
    **{"--use_gradient_checkpointing": "true", "--optimizer": "adamw_bf16", "--lr_scheduler": "polynomial"},
    **{"--lr_power": 1.0},
    **{"--lr_warmup_steps": 100, "--max_train_steps": 10000, "--num_train_epochs": 0, "--train_batch_size": 1},
    **{"--lora_rank": 8, "--data_backend_config": "config/bear/backends.json", "--validation_prompt": "a cat"},
    **{"--validation_num_inference_steps": 20, "--validation_seed": 42, "--validation_step_interval": 100},
    **{"--checkpoint_step_interval": 500, "--checkpoints_total_limit": 5, "--caption_dropout_probability": 0.1},
    **{"--mixed_precision": "bf16", "--seed": 42, "--report_to": "wandb", "--resume_from_checkpoint": "latest"},
    **{"--attention_mechanism": "diffusers", "--minimum_image_size": 0, "--disable_benchmark": "false"},
    **{"--hub_model_id": "x", "--push_to_hub": "false", "--lora_type": "standard", "--caption_strategy": "textfile"},
}
BACKENDS = [
    {"id": "a", "instance_data_dir": "img", "resolution": 0.5, "resolution_type": "area", "cache_dir_vae": "v"},
    {"id": "b", "dataset_type": "text_embeds", "default": True, "cache_dir": "t"},
]


def of_simpletuner(home, *, without=(), lycoris=None, size=None, **changes):
    """The training with these settings changed, which lies where SimpleTuner has it: config/NAME/config.json."""
    folder = home / "config/bear"
    folder.mkdir(parents=True, exist_ok=True)
    written(folder / "backends.json", json.dumps([{**BACKENDS[0], **(size or {})}, *BACKENDS[1:]]))
    written(folder / "lycoris.json", json.dumps(lycoris))
    values = {key: value for key, value in SAVED.items() if key.removeprefix("--") not in without}
    config = written(folder / "config.json", json.dumps({**values, **{f"--{k}": v for k, v in changes.items()}}))
    return convert(config, home / "mine-images.toml")


def test_a_config_of_simpletuner_is_one_of_lora(home):
    training = of_simpletuner(home)
    assert training.recipe.program == "lora"
    assert training.recipe.told == {
        **{"base": "stabilityai/stable-diffusion-xl-base-1.0", "precision": "bf16", "gradient_checkpointing": True},
        **{"rank": 8, "learning_rate": 1e-4, "steps": 10000, "batch": 1, "seed": 42, "resolution": 704},
        **{"optimizer": "adamw", "optimizer_args": ["betas=0.9,0.999", "eps=1e-6"], "schedule": "linear"},
        **{"warmup": 100, "caption_dropout": 0.1, "keep": 5, "checkpoint_every": 500, "sample_every": 100},
        **{"wandb": "simpletuner", "sample_prompts": ["a cat --s 20 --l 3.4 --d 42 --w 1024 --h 768"]},
        "images": (home / "mine-images.toml").as_posix(),
    }
    assert training.recipe.usual == {
        **{"alpha": 8.0, "dropout": 0.1, "targets": "attention", "weight_decay": 0.01, "clip": 0.0, "min_snr": 0.0},
    }
    assert training.notes == ()
    assert tomllib.loads(training.images.text)["source"] == [{"path": "img/10_sks bear"}]


def test_of_what_simpletuner_is_not_told_its_defaults_are_written(home):
    config = written(home / "config.json", '{"model_family": "sd1x", "model_type": "lora"}')
    recipe = convert(config, home / "i.toml").recipe
    assert recipe.ask == ("images",)
    assert recipe.told == {
        **{"base": "Lykon/dreamshaper-8", "optimizer": "adamw"},
        "optimizer_args": ["betas=0.9,0.999", "eps=1e-6"],
    }
    assert recipe.usual == {
        **{"gradient_checkpointing": True, "rank": 16, "alpha": 16.0, "dropout": 0.1, "targets": "attention"},
        **{"learning_rate": 4e-7, "epochs": 1, "batch": 4, "weight_decay": 0.01, "clip": 0.0, "schedule": "constant"},
        **{"min_snr": 0.0, "resolution": 1024, "caption_dropout": 0.1},
    }


WHOLE = {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "factor": 16, "full_matrix": True}


@pytest.mark.parametrize(
    ("changes", "told", "usual"),
    [
        ({"model_flavour": "base-0.9"}, {"base": "stabilityai/stable-diffusion-xl-base-0.9"}, {}),
        ({"pretrained_model_name_or_path": "xl.safetensors"}, {"base": "xl.safetensors"}, {}),
        ({"lora_alpha": 4, "lora_dropout": 0}, {"alpha": 4.0, "dropout": 0.0}, {}),
        ({"use_dora": True, "init_lora": "b"}, {"dora": True, "init_from": "b"}, {}),
        ({"peft_lora_target_modules": ["to_k", "to_q", "to_v", "to_out.0"]}, {}, {"targets": "attention"}),
        ({"num_train_epochs": 3, "max_train_steps": 0}, {"epochs": 3, "steps": None}, {}),
        ({"optimizer": "ao-adamw8bit"}, {"optimizer": "adamw8bit"}, {"weight_decay": 0.01}),
        ({"optimizer": "bnb-adamw8bit-paged"}, {"optimizer": "adamw8bit"}, {}),
        ({"optimizer": "optimi-adamw"}, {"optimizer_args": ["eps=1e-6"]}, {"weight_decay": 0.0}),
        ({"optimizer": "optimi-lion"}, {"optimizer": "lion", "optimizer_args": None}, {"weight_decay": 0.0}),
        (
            {"optimizer": "prodigy", "optimizer_config": "d_coef=2,weight_decay=0.1"},
            {"optimizer": "prodigy", "weight_decay": 0.1},
            {},
        ),
        ({"optimizer": "bnb-adam8bit"}, {"optimizer": "adamw8bit"}, {"weight_decay": 0.0}),
        ({"optimizer": "muon"}, {"optimizer": "muon"}, {"weight_decay": 0.1}),
        ({"optimizer": "adamw_schedulefree+aggressive"}, {"optimizer_args": ["betas=0.9,0.999", "eps=1e-6"]}, {}),
        ({"optimizer_beta1": 0.8, "optimizer_beta2": 0.9}, {"optimizer_args": ["betas=0.8,0.9", "eps=1e-6"]}, {}),
        ({"max_grad_norm": 1.5, "grad_clip_method": "norm"}, {"clip": 1.5}, {}),
        ({"lr_scheduler": "constant_with_warmup"}, {"schedule": "constant", "warmup": 100}, {}),
        ({"lr_scheduler": "constant"}, {"schedule": "constant", "warmup": None}, {}),
        ({"lr_scheduler": "linear"}, {"schedule": "linear", "warmup": 100}, {}),
        ({"snr_gamma": 5, "loss_type": "huber"}, {"min_snr": 5.0, "huber": 0.1}, {}),
        ({"offset_noise": True, "noise_offset_probability": 1}, {"noise_offset": 0.1}, {}),
        ({"noise_offset": 0.1}, {"noise_offset": None}, {}),
        ({"use_ema": True}, {"ema": 0.995}, {}),
        ({"caption_dropout_probability": 0}, {"caption_dropout": 0.0}, {}),
        ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, {"zero_terminal_snr": True}, {}),
        (
            {"report_to": "tensorboard", "push_to_hub": True},
            {"tensorboard": True, "wandb": None, "push_to_hub": "x"},
            {},
        ),
        ({"tracker_project_name": "p", "tracker_run_name": "r"}, {"wandb": "p", "wandb_name": "r"}, {}),
        ({"report_to": "none", "tracker_run_name": "r"}, {"wandb": None, "wandb_name": None}, {}),
        ({"validation_disable": True}, {"sample_every": 0}, {}),
        ({"user_prompt_library": "config/bear/library.json"}, {"sample_prompts": ["a cat", "a fox", "a crab"]}, {}),
        ({"train_text_encoder": True, "text_encoder_lr": 1e-5}, {"text_learning_rate": 1e-5}, {}),
        ({"lora_type": "lycoris"}, {"algo": "lokr", "rank": 10_000, "factor": 16}, {"targets": "everything"}),
        ({"model_type": "full", "use_ema": True}, {"ema_on_cpu": True}, {"method": None, "targets": None}),
    ],
)
def test_a_setting_of_simpletuner_means_here(changes, told, usual, home):
    (home / "config/bear").mkdir(parents=True)
    written(home / "config/bear/library.json", '{"fox": "a fox", "crab": {"prompt": "a crab"}}')
    flags = [key for key in SAVED if key.startswith("--validation_") and key[13:] not in ("prompt", "step_interval")]
    without = [flag.removeprefix("--") for flag in flags]
    changes = {**changes, "lycoris_config": "config/bear/lycoris.json"} if "lora_type" in changes else changes
    recipe = of_simpletuner(home, without=without, lycoris=WHOLE, **changes).recipe
    assert {key: recipe.told.get(key) for key in told} == told
    assert {key: recipe.usual.get(key) for key in usual} == usual


@pytest.mark.parametrize(
    ("targets", "ours"),
    [
        (["Attention"], "attention"),
        (["FeedForward", "Attention"], "attention+mlp"),
        (["Transformer2DModel"], "transformers"),
    ],
)
def test_layers_of_a_lycoris_config(targets, ours, home):
    preset = {"target_module": targets, "module_algo_map": {"Attention": {"factor": 8}}}
    own = {"algo": "loha", "linear_dim": 4, "linear_alpha": 2, "multiplier": 1.0, "apply_preset": preset}
    own |= {"module_dropout": 0.2}
    lycoris = {"lora_type": "lycoris", "lycoris_config": "config/bear/lycoris.json"}
    training = of_simpletuner(home, lycoris=own, **lycoris)
    found = training.recipe.values
    assert (found["algo"], found["rank"], found["alpha"], found["targets"]) == ("loha", 4, 2.0, ours)
    assert found["module_dropout"] == 0.2
    notes = [note.partition(":")[0] for note in training.notes]
    assert notes == ["target_module = Transformer2DModel"] * (ours == "transformers") + ["module_algo_map"]


@pytest.mark.parametrize(
    ("kind", "ours"), [("nf4-bnb", "nf4"), ("int4-quanto", "nf4"), ("fp4-bnb", "nf4"), ("int8-quanto", "int8")]
)
def test_the_format_of_simpletuner_s_frozen_weights(kind, ours, home):
    training = of_simpletuner(home, base_model_precision=kind)
    assert training.recipe.told["quantize"] == ours
    taken = f"base_model_precision = {kind}: nf4 takes its place"
    assert training.notes == (() if kind.startswith(ours) else (taken,))


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"base_model_precision": "fp8-quanto"}, "base_model_precision = fp8-quanto: int8 takes its place"),
        ({"lr_warmup_steps": 20_000}, "lr_warmup_steps = 20000: more than the 10000 steps, which all of them are here"),
        ({"lr_scheduler": "sine"}, "lr_scheduler = sine: its waves are lr_warmup_steps long; here it is one for a run"),
        ({"lr_power": 0.8}, "lr_scheduler = polynomial with lr_power 0.8: a straight line, whose power"),
        ({"lr_scheduler": "rex"}, "lr_scheduler = rex: has no counterpart; constant takes its place"),
        ({"max_grad_norm": 1}, "max_grad_norm = 1: of each number of a gradient there; --clip is of its norm"),
        ({"offset_noise": True}, "noise_offset_probability = 0.25: the noise of each sample is offset"),
        ({"loss_type": "smooth_l1"}, "loss_type = smooth_l1: has no counterpart; the errors are squared"),
        ({"use_soft_min_snr": True}, "use_soft_min_snr: the weights of --min-snr have a corner"),
        ({"timestep_bias_strategy": "later"}, "timestep_bias_strategy = later: has no counterpart here"),
        ({"optimizer": "adamw_schedulefree"}, "optimizer adamw_schedulefree: adamw takes its place"),
        ({"optimizer": "prodigy"}, "optimizer ProdigyPlusScheduleFree: prodigy takes its place"),
        ({"optimizer": "soap"}, "optimizer soap: has no counterpart; adamw takes its place"),
        ({"peft_lora_target_modules": ["to_k"]}, "peft_lora_target_modules = to_k: --targets takes a regular"),
        ({"use_dora": True}, "use_dora: one length is learned for each input here"),
        ({"distillation_method": "dmd"}, "distillation_method = dmd: has no counterpart here and is left out"),
    ],
)
def test_what_simpletuner_has_alone_is_named(changes, note, home):
    notes = of_simpletuner(home, **changes).notes
    assert [each[: len(note)] for each in notes] == [note]


def test_what_changes_nothing_of_sdxl_has_no_note(home):
    """As its examples and its window write them."""
    images = {"validation_disable_unconditional": True, "validation_lycoris_strength": 1.0}
    speed = {"dynamo_backend": "inductor", "gradient_checkpointing_interval": 2, "offload_during_startup": True}
    assert of_simpletuner(home, **images, **speed, flow_schedule_shift=3, vae_cache_disable=True).notes == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_family": "flux"}, "model_family is flux; wanted sd1x, sd2x, sdxl."),
        ({"controlnet": True}, "trains a ControlNet (controlnet), which has no counterpart."),
        ({"model_type": "controlnet"}, "model_type is controlnet; wanted lora or full."),
        ({"model_flavour": "best"}, "its model_flavour best names no base that is known; give it a pretrained_model_"),
        ({"prediction_type": "flow_matching"}, "prediction_type is flow_matching; wanted epsilon or v_prediction."),
        (
            {"data_backend_config": "no.json"},
            "its data_backend_config no.json is neither beside it nor in this folder.",
        ),
        (
            {"lora_type": "lycoris", "lycoris_config": "no.json"},
            "its lycoris_config no.json is neither beside it nor in this folder.",
        ),
        ({"lora_rank": "many"}, "lora_rank is 'many'; wanted a number."),
    ],
)
def test_what_of_simpletuner_cannot_be_had_is_refused(changes, said, home):
    with pytest.raises(ConfigError) as refused:
        of_simpletuner(home, **changes)
    assert str(refused.value).removeprefix("config.json: ").startswith(said)


def test_an_oft_of_lycoris_has_no_scale(home):
    own = {"algo": "diag-oft", "linear_dim": 8, "linear_alpha": 4, "conv_dim": 4, "conv_alpha": 2}
    recipe = of_simpletuner(home, lycoris=own, lora_type="lycoris", lycoris_config="config/bear/lycoris.json").recipe
    assert recipe.values | {"algo": "oft", "rank": 8, "conv_rank": 4} == recipe.values
    assert not {"alpha", "conv_alpha"} & recipe.values.keys()


def test_a_lycoris_of_another_kind_is_refused(home):
    with pytest.raises(
        ConfigError, match=r"LyCORIS's tlora has no counterpart; lora, locon, loha, lokr, diag-oft have\."
    ):
        of_simpletuner(home, lycoris={"algo": "tlora"}, lora_type="lycoris", lycoris_config="config/bear/lycoris.json")


def test_a_toml_of_simpletuner_is_read(home):
    text = 'model_family = "sd2x"\nmodel_type = "full"\npretrained_model_name_or_path = "a"\nlearning_rate = 1e-6\n'
    training = convert(written(home / "config.toml", text), home / "i.toml")
    assert (training.source, training.recipe.program) == ("SimpleTuner in config.toml", "finetune")
    assert (training.recipe.told["learning_rate"], training.recipe.ask) == (1e-6, ("images",))


@pytest.mark.usefixtures("quick")
def test_a_training_of_simpletuner_trains(home, pocket_folder, capsys):
    size = {"resolution": 64, "resolution_type": "pixel_area"}
    changes = {"pretrained_model_name_or_path": str(pocket_folder), "model_family": "sd1x", "max_train_steps": 2}
    of_simpletuner(home, size=size, **changes, lr_warmup_steps=0, report_to="none")
    assert cli.main(["recipe", "config/bear/config.json", "-o", "mine.toml"]) == 0
    command = capsys.readouterr().out.split()
    assert command == ["sfumato", "train", "lora", "mine.toml", "--output", "runs/mine"]
    quiet = ["--sample-every", "0", "--measure-every", "0", "--device", "cpu", "--precision", "fp32"]
    assert cli.main([*command[1:], *quiet]) == 0
    config = tomllib.loads((home / "runs/mine/config.toml").read_text())
    assert (config["rank"], config["alpha"], config["targets"], config["dropout"]) == (8, 8.0, "attention", 0.1)
