"""Trainings of OneTrainer as configs of ours."""

import json
import tomllib

import pytest
from converting import written

from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.interop.recipes import convert

ONETRAINER = {
    **{"training_method": "LORA", "model_type": "STABLE_DIFFUSION_XL_10_BASE", "base_model_name": "xl.safetensors"},
    **{
        "learning_rate": 3e-4,
        "epochs": 20,
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "resolution": "768,1024",
    },
    **{"learning_rate_scheduler": "COSINE", "learning_rate_warmup_steps": 100.0, "loss_weight_fn": "MIN_SNR_GAMMA"},
    **{"loss_weight_strength": 5.0, "train_dtype": "BFLOAT_16", "ema": "GPU", "ema_decay": 0.99, "peft_type": "LORA"},
    **{"lora_rank": 32, "lora_alpha": 16.0, "layer_filter_preset": "attn-mlp", "offset_noise_weight": 0.05},
    **{"max_noising_strength": 0.9, "output_model_destination": "models/dog.safetensors", "compile": True},
    **{"text_encoder_2": {"train": False}, "text_encoder": {"train": False}, "mae_strength": 0.0},
    "unet": {"learning_rate": 1e-4, "gradient_checkpointing": False},
    "optimizer": {
        "optimizer": "PRODIGY",
        "beta1": 0.9,
        "beta2": 0.99,
        "d_coef": 2.0,
        "weight_decay": 0.01,
        "fused": True,
    },
    "concepts": [{"path": "img/10_sks bear", "balancing": 2.0}],
    "samples": [{"prompt": "a dog", "width": 512, "seed": 7, "cfg_scale": 7.0}, {"prompt": "a cat", "enabled": False}],
}


def of_onetrainer(home, **changes):
    (home / "one.json").write_text(json.dumps({**ONETRAINER, **changes}))
    return convert(home / "one.json", home / "mine-images.toml")


@pytest.mark.parametrize("kind", ["15", "20", "XL_10_BASE"])
def test_an_inpainting_model_hides_what_masks_do_not_show(kind, home):
    kind = f"STABLE_DIFFUSION_{kind}_INPAINTING"
    plain = of_onetrainer(home, model_type=kind)
    assert "inpaint_whole_share" not in plain.recipe.told
    assert any(
        note.startswith(f"model_type = {kind}: a random part of most samples is hidden;") for note in plain.notes
    )
    masked = of_onetrainer(home, model_type=kind, masked_training=True)
    assert masked.recipe.told["inpaint_whole_share"] == 0.1
    asked = of_onetrainer(home, model_type=kind, masked_training=True, unmasked_probability=0.3)
    assert asked.recipe.told["inpaint_whole_share"] == 0.3
    assert any(note.startswith(f"model_type = {kind}: in half of the samples a random part") for note in asked.notes)
    ordinary = of_onetrainer(home, masked_training=True, unmasked_probability=0.3)
    assert "inpaint_whole_share" not in ordinary.recipe.told


def test_a_lora_of_onetrainer(home):
    training = of_onetrainer(home)
    told, usual = training.recipe.told, training.recipe.usual
    images = (home / "mine-images.toml").as_posix()
    assert told == {
        **{"base": "xl.safetensors", "precision": "bf16", "gradient_checkpointing": False, "rank": 32, "alpha": 16.0},
        **{"learning_rate": 1e-4, "optimizer": "prodigy", "weight_decay": 0.01, "epochs": 10, "batch": 2},
        **{"optimizer_args": ["use_bias_correction=False", "safeguard_warmup=False", "d_coef=2.0"], "accumulate": 2},
        **{"resolution": 768, "schedule": "cosine", "warmup": 50, "min_snr": 5.0, "noise_offset": 0.05, "ema": 0.99},
        **{"max_timestep": 900, "name": "dog", "sample_prompts": ["a dog --w 512 --l 7.0 --d 7"], "images": images},
    }
    assert usual == {"targets": "transformers"}
    assert training.images.sources == 1
    assert tomllib.loads(training.images.text)["source"][0]["resolution"] == [768, 1024]
    assert training.notes == (
        "resolution = 768,1024: each image is learned at each of these, so that an epoch is 2 of OneTrainer's",
        "ema_update_step_interval = 5: the mean is updated at each step, so it is shorter",
    )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "LOKR", "lokr_dim": 8, "lokr_decompose_factor": 4}, {"algo": "lokr", "rank": 8, "factor": 4}),
        ({"peft_type": "OFT_2", "oft_block_size": 16}, {"algo": "oft", "rank": 16, "alpha": None, "dora": None}),
        ({"lora_decompose": True}, {"dora": True}),
        ({"loss_weight_fn": "DEBIASED_ESTIMATION"}, {"debiased": True, "min_snr": None}),
        ({"clip_grad_norm": None}, {"clip": 0.0}),
        ({"optimizer": {"optimizer": "ADAFACTOR"}}, {"optimizer": "adafactor", "optimizer_args": None}),
        ({"attention_mechanism": "XFORMERS"}, {"attention": "xformers"}),
        ({"learning_rate_scheduler": "COSINE_WITH_HARD_RESTARTS", "learning_rate_cycles": 3.0}, {"cycles": 3}),
        ({"force_v_prediction": True}, {"prediction_type": "v_prediction"}),
        ({"samples": None, "sample_definition_file_name": "samples.json"}, {"sample_prompts": ["a fox"]}),
        ({"save_every": 100, "save_every_unit": "STEP"}, {"save_every": 100}),
        ({"text_encoder": {"train": True, "learning_rate": 1e-5}}, {"text_learning_rate": 1e-5}),
        ({"text_encoder": {"train": True}}, {"text_learning_rate": 3e-4}),
        ({"text_encoder": {"train": False, "dropout_probability": 0.1}}, {"caption_dropout": 0.1}),
        (
            {"additional_embeddings": [{"placeholder": "<Fox>", "token_count": 3, "initial_embedding_text": "fox"}]},
            {"train_words": ["<fox>"], "word_vectors": 3, "initial_words": ["fox"]},
        ),
    ],
)
def test_a_setting_of_onetrainer_means_here(changes, told, home):
    (home / "samples.json").write_text(json.dumps([{"prompt": "a fox"}, {"prompt": "a cat", "enabled": False}]))
    found = of_onetrainer(home, **changes).recipe.told
    assert {key: found.get(key) for key in told} == told


@pytest.mark.parametrize(
    ("changes", "ours", "note"),
    [
        ({"unet": {"weight_dtype": "NFLOAT_4"}}, "nf4", None),
        ({"unet": {"weight_dtype": "INT_8"}}, "int8", None),
        ({"unet": {"weight_dtype": "FLOAT_8"}}, "int8", "unet.weight_dtype = FLOAT_8: int8 takes its place"),
        (
            {"unet": {"weight_dtype": "INT_W8A8_COMPRESSED"}},
            "int8",
            "unet.weight_dtype = INT_W8A8_COMPRESSED: int8 takes its place",
        ),
        ({"unet": {"weight_dtype": "NONE"}, "weight_dtype": "NFLOAT_4"}, "nf4", None),  # of older versions
        ({"unet": {"weight_dtype": "BFLOAT_16"}, "weight_dtype": "NFLOAT_4"}, None, None),
        ({"vae": {"weight_dtype": "NFLOAT_4"}}, None, None),
        ({"unet": {"weight_dtype": "INT_8"}, "training_method": "EMBEDDING"}, "int8", None),
        ({"unet": {"weight_dtype": "INT_8"}, "training_method": "FINE_TUNE"}, None, None),  # where all weights learn
    ],
)
def test_the_format_of_onetrainer_s_frozen_u_net(changes, ours, note, home):
    training = of_onetrainer(home, **changes)
    assert training.recipe.told.get("quantize") == ours
    assert [each for each in training.notes if "weight_dtype" in each] == ([note] if note else [])


def test_what_onetrainer_s_window_saves_and_has_no_counterpart_is_named_where_it_does_something(home):
    notes = of_onetrainer(home, huber_strength=0.5, timestep_distribution="SIGMOID", mse_strength=1.0).notes
    assert notes[2:] == (
        "huber_strength = 0.5: has no counterpart here and is left out",
        "timestep_distribution = SIGMOID: has no counterpart here and is left out",
    )
    for changes, said in (
        ({"model_type": "FLUX_DEV_1"}, "model_type is FLUX_DEV_1; wanted SD 1.5, 2.x or SDXL."),
        (
            {"model_type": "STABLE_DIFFUSION_20_DEPTH"},
            "model_type is STABLE_DIFFUSION_20_DEPTH; wanted SD 1.5, 2.x or SDXL.",
        ),
        ({"training_method": "FINE_TUNE_VAE"}, "training_method is FINE_TUNE_VAE; wanted LORA, EMBEDDING, FINE_TUNE."),
        ({"peft_type": "HRA"}, "peft_type HRA has no counterpart; LORA, LOHA, LOKR and OFT_2 have."),
        ({"unet": {"train": False}}, "its U-Net does not learn (unet.train), which `lora` always does."),
    ):
        with pytest.raises(ConfigError) as refused:
            of_onetrainer(home, **changes)
        assert str(refused.value) == f"one.json: {said}"


def test_what_else_of_onetrainer_has_no_counterpart_is_named(home):
    changes = {"peft_type": "LOKR", "lokr_full_matrix": True, "text_encoder_2_layer_skip": 1}
    unet = {"stop_training_after": 3, "stop_training_after_unit": "EPOCH"}
    assert set(of_onetrainer(home, **changes, unet=unet).notes) >= {
        "lokr_full_matrix = True: has no counterpart here and is left out",
        "text_encoder_2_layer_skip = 1: has no counterpart here and is left out",
        "unet.stop_training_after = 3: the U-Net learns to the end",
    }
    assert "lokr" not in str(of_onetrainer(home, lokr_full_matrix=True).notes)
    assert "oft_scaled" not in str(of_onetrainer(home, oft_scaled=True).notes)
    assert set(of_onetrainer(home, peft_type="OFT_2", oft_scaled=True).notes) >= {
        "oft_scaled = True: has no counterpart here and is left out",
        "peft_type OFT_2: rotates the inputs of layers, and here their outputs are rotated",
    }
    recipe = of_onetrainer(home, training_method="EMBEDDING", embedding={"model_name": "a.pt"}).recipe
    assert "embedding.model_name = a.pt: it starts from --initial-words, not from a file" in recipe.notes


def test_configs_of_older_onetrainers(home):
    """TrainConfig.py there renames these settings when it loads them."""
    former = {
        "layer_filter_preset": None,
        "lora_layer_preset": "attn-only",
        "gradient_checkpointing": "OFF",
        "unet": {},
    }
    former |= {"save_after": 100, "save_after_unit": "STEP"}
    kept = {key: value for key, value in {**ONETRAINER, **former}.items() if value is not None}
    training = convert(written(home / "one.json", json.dumps(kept)), home / "i.toml")
    found = training.recipe.values
    assert (found["targets"], found["gradient_checkpointing"], found["save_every"]) == ("attention", False, 100)
    for old in ({"optimizer": "PRODIGY"}, {"train_text_encoder": False}):
        with pytest.raises(ConfigError) as refused:
            of_onetrainer(home, **old)
        assert str(refused.value).startswith("one.json: was saved by an old OneTrainer; load it in a new one")


def test_words_and_whole_models_of_onetrainer(home):
    word = {"placeholder": "<fox>", "token_count": 4, "initial_embedding_text": "fox"}
    recipe = of_onetrainer(home, training_method="EMBEDDING", embedding=word, preserve_embedding_norm=True).recipe
    assert recipe.program == "textual_inversion"
    found = recipe.values
    assert (found["placeholder"], found["initial_words"], found["vectors"]) == (["<fox>"], ["fox"], 4)
    assert (found["keep_scale"], found["learning_rate"]) == (True, 3e-4)
    recipe = of_onetrainer(home, training_method="FINE_TUNE", ema="CPU").recipe
    assert (recipe.program, recipe.ask, recipe.values["ema_on_cpu"]) == ("finetune", (), True)
    assert not {"method", "prior", "rank", "targets"} & recipe.values.keys()


@pytest.mark.usefixtures("quick")
def test_a_training_of_onetrainer_trains(home, pocket_folder, capsys):
    changes = {
        "base_model_name": str(pocket_folder),
        "model_type": "STABLE_DIFFUSION_15",
        "resolution": "64",
        "epochs": 1,
    }
    of_onetrainer(home, **changes, optimizer={"optimizer": "ADAMW"}, samples=None)
    assert cli.main(["recipe", "one.json", "-o", "mine.toml"]) == 0
    command = capsys.readouterr().out.split()
    quiet = ["--sample-every", "0", "--measure-every", "0", "--device", "cpu", "--precision", "fp32", "--warmup", "0"]
    assert cli.main([*command[1:], *quiet]) == 0
    assert (home / "runs/mine/dog.safetensors").is_file()
