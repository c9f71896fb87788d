"""Trainings of ai-toolkit as configs of ours. Defaults are those of toolkit/config_modules.py there."""

import copy
import json
import tomllib

import pytest
from converting import converted, written

from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.interop.recipes import convert

SAVED = """
job: extension
config:
  name: bear
  process:
    - type: 'diffusion_trainer'
      training_folder: "output"
      sqlite_db_path: './aitk_db.db'
      device: cuda
      trigger_word: "p3r5on"
      performance_log_every: 10
      network:
        type: "lora"
        linear: 32
        linear_alpha: 16
        conv: 8
        conv_alpha: 4
        lokr_full_rank: true
        lokr_factor: -1
        network_kwargs: {ignore_if_contains: []}
      save: {dtype: bf16, save_every: 250, max_step_saves_to_keep: 4, save_format: diffusers, push_to_hub: false}
      datasets:
        - folder_path: "img"
          mask_path: null
          mask_min_value: 0.1
          default_caption: ''
          caption_ext: "txt"
          caption_dropout_rate: 0.05
          cache_latents_to_disk: false
          is_reg: false
          network_weight: 1
          resolution: [512, 768, 1024]
          controls: []
          shrink_video_to_frames: true
          num_frames: 1
          flip_x: false
          flip_y: false
          num_repeats: 1
      train:
        batch_size: 1
        bypass_guidance_embedding: true
        steps: 3000
        gradient_accumulation: 2
        train_unet: true
        train_text_encoder: false
        gradient_checkpointing: true
        noise_scheduler: ddpm
        optimizer: adamw8bit
        timestep_type: sigmoid
        content_or_style: balanced
        optimizer_params: {weight_decay: 1e-4}
        unload_text_encoder: false
        cache_text_embeddings: false
        lr: 1e-4
        ema_config: {use_ema: false, ema_decay: 0.99}
        skip_first_sample: false
        disable_sampling: false
        dtype: bf16
        diff_output_preservation: false
        diff_output_preservation_multiplier: 1.0
        diff_output_preservation_class: person
        switch_boundary_every: 1
        loss_type: mse
      logging: {log_every: 1, use_ui_logger: true}
      model:
        name_or_path: "stabilityai/stable-diffusion-xl-base-1.0"
        quantize: false
        qtype: qfloat8
        quantize_te: false
        qtype_te: qfloat8
        arch: sdxl
        low_vram: false
        model_kwargs: {}
        compile: false
      sample:
        sampler: ddpm
        sample_every: 250
        width: 1024
        height: 768
        samples:
          - prompt: "[trigger] in the snow"
          - prompt: "a bear of [name] --m 2 --cfg 5 --n red"
            seed: 7
        neg: ''
        seed: 42
        walk_seed: true
        guidance_scale: 6
        sample_steps: 25
        num_frames: 1
        fps: 1
meta: {name: "[name]", version: '1.0'}
"""
"""As its window saves a job."""
LEAST = {"type": "sd_trainer", "model": {"name_or_path": "a"}, "network": {"linear": 8}, "train": {}}


def of_toolkit(home, *parts, **changes):
    """The training of the least config with these parts changed: (network={...}) changes what is in it."""
    process = copy.deepcopy(LEAST)
    for key, value in changes.items():
        process[key] = {**process.get(key, {}), **value} if isinstance(value, dict) else value
        if value is None:
            del process[key]
    text = json.dumps({"job": "extension", "config": {"name": "x", "process": [process, *parts]}})
    return convert(written(home / "job.json", text), home / "mine-images.toml")


def test_what_its_window_saves_is_a_config_of_lora(home):
    told, usual, notes = converted(home, SAVED, "job.yaml")
    assert told == {
        **{"base": "stabilityai/stable-diffusion-xl-base-1.0", "precision": "bf16", "gradient_checkpointing": True},
        **{"rank": 32, "alpha": 16.0, "conv_rank": 8, "conv_alpha": 4.0, "learning_rate": 1e-4, "steps": 3000},
        **{"optimizer": "adamw8bit", "weight_decay": 1e-4, "batch": 1, "accumulate": 2, "resolution": 1024},
        **{"optimizer_args": ["betas=0.9,0.999", "eps=1e-6"], "name": "bear", "save_precision": "bf16"},
        **{"save_every": 250, "sample_every": 250, "images": (home / "mine-images.toml").as_posix()},
        "sample_prompts": [
            "p3r5on in the snow --w 1024 --h 768 --s 25 --l 6 --d 42",
            "a bear of bear --w 1024 --h 768 --s 25 --l 5 --d 7 --n red",
        ],
    }
    assert usual == {"targets": "everything", "schedule": "constant", "min_snr": 0.0}
    assert [note.partition(":")[0] for note in notes] == [
        "trigger_word 'p3r5on'",
        "prompts",
        "max_step_saves_to_keep = 4",
    ]
    images = convert(home / "job.yaml", home / "mine-images.toml").images
    source = {
        "path": "img/10_sks bear",
        "caption": "{trigger}, {caption}",
        "trigger": "p3r5on",
        "caption_dropout": 0.05,
    }
    assert tomllib.loads(images.text)["source"] == [source | {"resolution": [512, 768, 1024]}]


def test_of_what_it_is_not_told_its_defaults_are_written(home):
    training = of_toolkit(home)
    assert training.recipe.ask == ("images",)
    assert training.notes == ()
    assert training.recipe.usual == {
        **{"gradient_checkpointing": True, "alpha": 1.0, "targets": "transformers", "learning_rate": 1e-6},
        **{"weight_decay": 0.01, "schedule": "constant", "steps": 1000, "resolution": 512, "batch": 1},
        **{"min_snr": 0.0, "save_precision": "fp16"},
    }
    assert training.recipe.told == {
        **{"base": "a", "rank": 8, "optimizer": "adamw", "optimizer_args": ["betas=0.9,0.999", "eps=1e-6"]},
        "name": "x",
    }


@pytest.mark.parametrize(
    ("changes", "told", "usual"),
    [
        ({"network": {"rank": 4}}, {"rank": 4}, {}),  # which counts before `linear`
        ({"network": {"alpha": 2}}, {"alpha": 2.0}, {}),
        ({"network": {"conv": 6}}, {"conv_rank": 6}, {"conv_alpha": 6.0, "targets": "everything"}),
        ({"network": {"conv": 0}}, {"conv_rank": None}, {"targets": "attentions|time_emb_proj|conv_shortcut"}),
        ({"network": {"type": "dora"}}, {"dora": True}, {}),
        ({"network": {"type": "locon"}}, {}, {"targets": "attentions|time_emb_proj|conv_shortcut"}),
        (
            {"network": {"type": "lokr", "lokr_factor": 8}},
            {"algo": "lokr", "factor": 8, "rank": 10_000, "conv_rank": 10_000},
            {"targets": "everything"},
        ),
        ({"network": {"type": "lokr", "lokr_full_rank": False}}, {"rank": 8, "conv_rank": None}, {}),
        ({"network": {"dropout": 0.1, "pretrained_lora_path": "b"}}, {"dropout": 0.1, "init_from": "b"}, {}),
        ({"network": {"network_kwargs": {"rank_dropout": 0.1, "module_dropout": 0}}}, {"rank_dropout": 0.1}, {}),
        ({"train": {"train_text_encoder": True, "lr": 2e-4, "text_encoder_lr": 1}}, {"text_learning_rate": 2e-4}, {}),
        ({"train": {"optimizer": "prodigy", "lr": 1e-4}}, {"learning_rate": 1.0}, {"weight_decay": 0.0}),
        ({"train": {"optimizer": "adam8bit"}}, {"optimizer": "adamw8bit"}, {"weight_decay": 0.0}),
        ({"train": {"optimizer": "adafactor"}}, {"optimizer": "adafactor", "optimizer_args": None}, {"clip": 0.0}),
        ({"train": {"optimizer": "adafactor", "max_grad_norm": 0.5}}, {"clip": None}, {"clip": 0.0}),
        (
            {"train": {"optimizer_params": {"betas": [0.9, 0.95]}}},
            {"optimizer_args": ["betas=0.9,0.95", "eps=1e-6"]},
            {},
        ),
        ({"train": {"lr_scheduler": "cosine"}}, {"schedule": "cosine"}, {}),
        ({"train": {"lr_scheduler": "constant_with_warmup"}}, {"schedule": "constant"}, {"warmup": 1000}),
        (
            {"train": {"lr_scheduler": "constant_with_warmup", "lr_scheduler_params": {"num_warmup_steps": 7}}},
            {"warmup": 7},
            {},
        ),
        # It counts the batches between which nothing is updated.
        ({"train": {"steps": 300, "gradient_accumulation_steps": 4}}, {"steps": 75, "accumulate": 4}, {}),
        (
            {
                "train": {"lr_scheduler": "constant_with_warmup", "gradient_accumulation_steps": 4},
                "save": {"save_every": 250},
                "sample": {"sample_every": 100},
            },
            {"save_every": 62, "sample_every": 25},
            {"steps": 250, "warmup": 250},
        ),
        ({"train": {"min_snr_gamma": 5, "noise_offset": 0.05}}, {"min_snr": 5.0, "noise_offset": 0.05}, {}),
        ({"train": {"prompt_dropout_prob": 0.1, "max_grad_norm": 0.5}}, {"caption_dropout": 0.1, "clip": 0.5}, {}),
        # Counted from the noisiest timestep, of which it leaves out both ends: 998 - 100 is the noisiest it has.
        ({"train": {"min_denoising_steps": 100}}, {"max_timestep": 899, "min_timestep": None}, {}),
        ({"train": {"max_denoising_steps": 900}}, {"min_timestep": 101, "max_timestep": None}, {}),
        ({"train": {"ema_config": {"use_ema": True}}}, {"ema": 0.999}, {}),
        ({"train": {"gradient_checkpointing": False}}, {"gradient_checkpointing": False}, {}),
        ({"train": {"disable_sampling": True}, "sample": {"sample_every": 9}}, {"sample_every": 0}, {}),
        ({"train": {"xformers": True}, "device": "cuda:1"}, {"attention": "xformers", "device": "cuda:1"}, {}),
        ({"model": {"is_v_pred": True, "vae_path": "v"}}, {"prediction_type": "v_prediction", "vae": "v"}, {}),
        ({"model": {"arch": "sd15"}}, {"base": "a"}, {}),
        ({"save": {"push_to_hub": True, "hf_repo_id": "me/x"}}, {"push_to_hub": "me/x"}, {}),
        ({"training_seed": 3, "log_dir": "l"}, {"seed": 3, "tensorboard": True}, {}),
        ({"logging": {"use_wandb": True}}, {"wandb": "ai-toolkit", "tensorboard": None}, {}),
        (
            {"logging": {"use_wandb": True, "project_name": "p", "run_name": "r"}, "log_dir": "l"},
            {"wandb": "p", "wandb_name": "r", "tensorboard": True},
            {},
        ),
        ({"logging": {"use_wandb": False, "project_name": "p"}}, {"wandb": None, "wandb_name": None}, {}),
        ({"sample": {"prompts": ["a", "b"], "seed": 0}}, {"sample_prompts": ["a --d 0", "b --d 0"]}, {}),
        ({"sample": {"prompts": ["a"], "neg": "red"}}, {"sample_prompts": ["a --n red"]}, {}),
        (
            {"embedding": {"trigger": "Fox", "tokens": 3, "init_words": "fox"}, "train": {"embedding_lr": 5e-4}},
            {"train_words": ["fox"], "word_vectors": 3, "initial_words": ["fox"], "word_learning_rate": 5e-4},
            {},
        ),
    ],
)
def test_a_setting_of_ai_toolkit_means_here(changes, told, usual, home):
    recipe = of_toolkit(home, **changes).recipe
    assert {key: recipe.told.get(key) for key in told} == told
    assert {key: recipe.usual.get(key) for key in usual} == usual


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"train": {"content_or_style": "style"}}, "content_or_style = style: has no counterpart here and is left out"),
        ({"train": {"lr_scheduler": "linear"}}, "lr_scheduler = linear: there the rate rises from a third of it"),
        (
            {"train": {"lr_scheduler": "constant_with_warmup", "steps": 500}},
            "num_warmup_steps = 1000: more than the 500 steps, which all of them are here",
        ),
        ({"train": {"lr_scheduler": "step"}}, "lr_scheduler = step: has no counterpart; constant takes its place"),
        (
            {"train": {"lr_scheduler": "cosine", "lr_scheduler_params": {"eta_min": 1e-6}}},
            "eta_min = 1e-06: has no counterpart",
        ),
        ({"train": {"snr_gamma": 5}}, "snr_gamma = 5: weights of gamma / SNR without a limit"),
        ({"train": {"optimizer": "automagic"}}, "optimizer automagic: has no counterpart; adamw takes its place"),
        ({"train": {"ema_config": {"use_ema": True, "use_feedback": True}}}, "use_feedback = True: has no counterpart"),
        ({"network": {"network_kwargs": {"only_if_contains": ["up"]}}}, "network_kwargs.only_if_contains = ['up']: "),
        ({"train": {"timestep_type": "one_step"}}, "timestep_type = one_step: has no counterpart here and is left out"),
        ({"network": {"type": "dora"}}, "type = dora: one length is learned for each input here"),
        ({"model": {"quantize": True}}, "quantize = qfloat8: int8 takes its place"),
        ({"model": {"quantize": True, "qtype": "float4"}}, "quantize = float4: nf4 takes its place"),
        ({"model": {"assistant_lora_path": "a"}}, "assistant_lora_path = a: has no counterpart here and is left out"),
        ({"sample": {"prompts": ["a"], "network_multiplier": 2}}, "network_multiplier = 2: has no counterpart here"),
        ({"train": {"diff_output_preservation": True}}, "diff_output_preservation: what the base predicts for each"),
        ({"guidance": {"target_class": "a"}}, "guidance = {'target_class': 'a'}: has no counterpart here"),
    ],
)
def test_what_ai_toolkit_has_alone_is_named(changes, note, home):
    notes = of_toolkit(home, **changes).notes
    assert [each[: len(note)] for each in notes] == [note]


@pytest.mark.parametrize("kind", ["sigmoid", "linear", "weighted", "shift"])
def test_timesteps_of_flow_matching_do_nothing_with_ddpm(kind, home):
    assert of_toolkit(home, train={"timestep_type": kind}).notes == ()


def test_what_keeps_the_base_in_ai_toolkit(home):
    """Images with is_reg are a class's; what stands in for a trigger is a prompt of prior preservation."""
    sets = [{"folder_path": "img", "resolution": 64}, {"folder_path": "img", "is_reg": True, "batch_size": 2}]
    training = of_toolkit(home, datasets=sets, train={"reg_weight": 0.5})
    assert (training.recipe.told["prior_weight"], training.recipe.told["resolution"]) == (0.5, 512)
    assert [source["resolution"] for source in tomllib.loads(training.images.text)["source"]] == [64, 512]
    assert training.recipe.told["batch"] == 2
    assert [source.get("class", False) for source in tomllib.loads(training.images.text)["source"]] == [False, True]
    assert "is_reg: such images come in every second step there, and beside each batch here" in training.notes
    kept = {"diff_output_preservation": True, "diff_output_preservation_class": "bear"}
    told = of_toolkit(home, train=kept).recipe.told
    assert (told["prior_prompts"], told["prior_weight"]) == (["bear"], 1.0)
    whole = of_toolkit(home, network=None, datasets=sets, train={"unet_lr": 2e-6, "lr": 1e-6}).recipe
    assert (whole.program, whole.ask, whole.values["learning_rate"]) == ("finetune", (), 2e-6)


def test_a_word_alone_of_ai_toolkit(home):
    recipe = of_toolkit(home, network=None, embedding={"trigger": "Fox"}, train={"embedding_lr": 5e-4}).recipe
    assert recipe.program == "textual_inversion"
    found = recipe.values
    assert (found["placeholder"], found["vectors"], found["keep_scale"]) == (["fox"], 4, False)
    assert (found["learning_rate"], "initial_words" in found, "caption" in found) == (5e-4, False, False)


def test_the_first_training_of_several_processes(home):
    training = of_toolkit(home, {"type": "sd_trainer"})
    assert training.notes == ("job.json: the first training of its 2 processes",)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"type": "image_reference_slider_trainer"},
            "its process is image_reference_slider_trainer, which has no counterpart; wanted one of concept_slider, di",
        ),
        ({"model": {"is_flux": True}}, "its model is of is_flux; wanted SD 1.x, SD 2.x or SDXL, sd1, sd15, sd2, sdxl."),
        (
            {"model": {"arch": "wan21:14b"}},
            "its model is of arch wan21; wanted SD 1.x, SD 2.x or SDXL, sd1, sd15, sd2, sdxl.",
        ),
        ({"model": {"name_or_path": ""}}, "its model has no name_or_path, the base model; give it one."),
        ({"train": {"noise_scheduler": "flowmatch"}}, "noise_scheduler is flowmatch; wanted ddpm, with which such a"),
        ({"train": {"train_unet": False}}, "its U-Net does not learn (train_unet), which `lora` always does."),
        ({"network": {"type": "lorm"}}, "network: type lorm has no counterpart; lora, dora, locon and lokr have."),
        ({"adapter": {"type": "ip"}}, "its adapter is ip, which has no counterpart; take it out."),
        ({"train": {"steps": "many"}}, "train: steps is 'many'; wanted a number."),
        ({"datasets": [{"folder_path": "img", "resolution": ["big"]}]}, "resolution is 'big'; wanted a number."),
    ],
)
def test_what_of_ai_toolkit_cannot_be_had_is_refused(changes, said, home):
    with pytest.raises(ConfigError) as refused:
        of_toolkit(home, **changes)
    assert str(refused.value).removeprefix("job.json: ").startswith(said)


@pytest.mark.usefixtures("quick")
def test_a_training_of_ai_toolkit_trains(home, pocket_folder, capsys):
    text = SAVED.replace("stabilityai/stable-diffusion-xl-base-1.0", str(pocket_folder)).replace("sdxl", "sd1")
    text = text.replace("[512, 768, 1024]", "64").replace("adamw8bit", "adamw").replace("3000", "2")
    written(home / "job.yaml", text.replace("1024", "64").replace("768", "64").replace("--m 2", ""))
    assert cli.main(["recipe", "job.yaml", "-o", "mine.toml"]) == 0
    command = capsys.readouterr().out.split()
    assert command == ["sfumato", "train", "lora", "mine.toml", "--output", "runs/mine"]
    quiet = ["--sample-every", "0", "--measure-every", "0", "--device", "cpu", "--precision", "fp32"]
    assert cli.main([*command[1:], *quiet]) == 0
    config = tomllib.loads((home / "runs/mine/config.toml").read_text())
    assert (home / "runs/mine/bear.safetensors").is_file()
    assert (config["rank"], config["conv_rank"], config["targets"]) == (32, 8, "everything")
