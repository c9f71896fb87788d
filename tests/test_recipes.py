"""`sfumato recipe`: trainings of sd-scripts and of diffusers' scripts as configs of ours."""

import json
import shutil
import tomllib
from pathlib import Path

import pytest

from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.recipes import convert
from sfumato.recipes.reading import read

ROOT = Path(__file__).resolve().parents[1]
TEDDY = ROOT / "datasets/teddy-bear"
BASE = "--pretrained_model_name_or_path"
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


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TEDDY, tmp_path / "img/10_sks bear")
    (tmp_path / "prompts.txt").write_text("# of a dog\nsks dog --w 512 --d 7\n\nsks dog's house\n")
    return tmp_path


def converted(home, text, name="train.sh"):
    """(told, usual, notes) of a file with this text: the options of its two parts."""
    (home / name).write_text(text)
    training = convert(home / name, home / "mine-images.toml")
    return training.recipe.told, training.recipe.usual, training.notes


def test_a_command_of_sd_scripts_is_a_config_of_lora(home):
    told, usual, notes = converted(home, NETWORK)
    assert told == {
        **{"base": "runwayml/stable-diffusion-v1-5", "clip_skip": 1, "precision": "bf16", "attention": "xformers"},
        **{"seed": 42, "steps": 1000, "batch": 2, "resolution": 512, "rank": 16, "alpha": 8.0, "min_snr": 5.0},
        **{"learning_rate": 1e-4, "text_learning_rate": 5e-5, "optimizer": "adamw8bit", "name": "dog"},
        **{"optimizer_args": ["betas=0.9,0.999"], "schedule": "cosine", "cycles": 3, "warmup": 0.1},
        **{"sample_prompts": ["sks dog --w 512 --d 7", "sks dog's house"]},
        "images": (home / "mine-images.toml").as_posix(),
    }
    assert {key: usual[key] for key in ("targets", "train_text_encoder")} == {
        "targets": "transformers",
        "train_text_encoder": True,
    }
    assert notes == (
        "save_every_n_epochs = 1: --save-every of sfumato train lora counts steps",
        "fp8_base = True: there is no counterpart; sfumato memory tells what fits",
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
        ("--logging_dir logs", {"tensorboard": True}, {}),
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
        ("--network_args use_tucker=True", "network_args use_tucker=True: has no counterpart here and is left out"),
        (
            "--network_module lycoris.kohya --network_args rank_dropout=0.1",
            "network_args rank_dropout=0.1: LyCORIS drops rows and scales nothing up; here the rest is scaled up, and",
        ),
        ("--optimizer_args amsgrad=True", "optimizer_args amsgrad=True: has no counterpart here and is left out"),
        ("--optimizer_args foo=1", "optimizer_args foo=1: has no counterpart here and is left out"),
        ("--loss_type smooth_l1", "loss_type = smooth_l1: has no counterpart; the errors are squared"),
        ("--sample_prompts none.txt", "sample_prompts = none.txt: no .txt with prompts is there; give them as"),
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


def test_no_note_has_a_secret(home):
    _, _, notes = converted(home, f"{NETWORK.rstrip()} --wandb_api_key=secret --huggingface_token=secret")
    assert "secret" not in str(notes)


def written(path, text):
    path.write_text(text)
    return path


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
    told, _, _ = converted(home, DOG.format(script="train_dreambooth.py", more=more))
    assert (told["class_images"], "class_count" in told) == ("class", False)
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
    ],
)
def test_the_size_of_diffusers_scripts_for_sdxl(line, side, home):
    assert converted(home, f"{line} {BASE}=a")[1]["resolution"] == side


def test_scripts_of_windows_are_read(home):
    text = "set MODEL=C:\\my models\\a.safetensors\r\npython train_network.py ^\r\n --network_dim=8 ^\r\n"
    text += ' --pretrained_model_name_or_path="%MODEL%" --output_name="it\'s"\r\n'
    (home / "train.bat").write_bytes(text.encode())
    assert read(home / "train.bat").values == {
        "network_dim": "8",
        "pretrained_model_name_or_path": "C:\\my models\\a.safetensors",
        "output_name": "it's",
    }
    text = '$model = "a"\npython train_network.py `\n  --pretrained_model_name_or_path $model'
    assert read(written(home / "train.ps1", text)).values == {"pretrained_model_name_or_path": "a"}


@pytest.mark.parametrize(
    ("name", "text", "base"),
    [
        ("a.sh", f"args=(\n  {BASE} 'a b' # (the base)\n)\nargs+=(--seed 3)\n$RUN \"${{args[@]}}\"", "a b"),
        ("a.sh", f"CUDA_VISIBLE_DEVICES=0 $RUN {BASE}=a --seed 3 2>&1 | tee log", "a"),
        ("a.sh", f'M=${{M:-a b}}\nN=$M\nS="${{1:-3}}"\n$RUN {BASE}="$N" --seed $S && echo done', "a b"),
        ("a.sh", f"export M=a S=3; (cd x && $RUN {BASE}=$M --seed $S)", "a"),
        ("a.sh", f"M=a # the base\n$RUN {BASE}=$M \\\n  --seed 3 \\\n  # --v2 \\\n", "a"),
        ("a.sh", f"wget https://x/train_network.py\n$RUN {BASE}=a\\ b --seed=3", "a b"),
        ("a.txt", f'export M="a b"\n$RUN \n  {BASE}="$M"\n  --seed 3\n', "a b"),
        ("a.ps1", f'$M = "a b" # the base\n$RUN {BASE}=$m --seed 3', "a b"),
        ("a.bat", f"set M=a b\nset MORE=--seed 3 {BASE}\n$RUN %more% \"%m%\"", "a b"),
    ],
)  # fmt: skip
def test_variables_comments_and_pipes_of_scripts_are_as_the_shell_has_them(name, text, base, home):
    found = read(written(home / name, text.replace("$RUN", "python train_network.py"))).values
    assert found == {"pretrained_model_name_or_path": base, "seed": "3"}


@pytest.mark.parametrize(
    ("name", "text", "unset"),
    [
        ("a.sh", "python train_network.py --seed $NOWHERE_SET", "NOWHERE_SET"),
        ("a.sh", "for S in 1 2; do\n  python train_network.py --seed $S\ndone", "S"),
        ("a.sh", "S=1\nif [ x ]; then\n  S=2\nfi\npython train_network.py --seed $S", "S"),
        ("a.sh", "S=1\nif [ x ]; then S=2; fi\npython train_network.py --seed $S", "S"),
        ("a.sh", "python train_network.py --seed $(date +%s)", "$(date +%s)"),
        ("a.bat", "set S=1\nif x==y set S=2\npython train_network.py --seed %S%", "S"),
        ("a.ps1", "$S = [Collections.ArrayList]::new()\npython train_network.py --seed $S", "S"),
    ],
)
def test_what_only_a_running_shell_knows_is_refused(name, text, unset, home):
    with pytest.raises(ConfigError) as refused:
        read(written(home / name, text))
    assert str(refused.value).startswith(f"{name}: {unset} of its command has no value that can be read without")


def test_of_several_trainings_the_first_is_converted_and_a_note_says_so(home):
    _, _, notes = converted(home, f"train_network.py {BASE}=a\ntrain_network.py {BASE}=b\n")
    assert notes == ("train.sh: the first of its 2 trainings; the others need files of their own",)


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


def test_what_onetrainer_s_window_saves_and_has_no_counterpart_is_named_where_it_does_something(home):
    notes = of_onetrainer(home, huber_strength=0.5, timestep_distribution="SIGMOID", mse_strength=1.0).notes
    assert notes[2:] == (
        "huber_strength = 0.5: has no counterpart here and is left out",
        "timestep_distribution = SIGMOID: has no counterpart here and is left out",
    )
    for changes, said in (
        ({"model_type": "FLUX_DEV_1"}, "model_type is FLUX_DEV_1; wanted SD 1.5, 2.x or SDXL, without inpainting."),
        ({"training_method": "FINE_TUNE_VAE"}, "training_method is FINE_TUNE_VAE; wanted LORA, EMBEDDING, FINE_TUNE."),
        ({"peft_type": "OFT_2"}, "peft_type OFT_2 has no counterpart; LORA, LOHA and LOKR have."),
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
    assert (recipe.program, recipe.values["method"], recipe.values["prior"]) == ("dreambooth", "full", "none")
    assert (recipe.ask, recipe.values["ema_on_cpu"]) == (("class_name",), True)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        (
            "a.json",
            "{}",
            "a.json: neither config.process of ai-toolkit, model_family of SimpleTuner, training_",
        ),
        ("a.json", "{", "a.json: cannot be parsed (Expecting property name"),
        ("a.yaml", "", "a.yaml: neither config.process of ai-toolkit"),
        ("a.yaml", "a: *b", "a.yaml: cannot be parsed (it has aliases, *name). Mend it."),
        ("a.ini", "", "a.ini: wanted a .toml of sd-scripts, a .yaml of ai-toolkit, a .json of OneTrainer or"),
        ("a.toml", "steps = 1", "a.toml: no pretrained_model_name_or_path in it, so it is no training of sd-scripts."),
        (
            "a.toml",
            "[[datasets]]",
            "a.toml: a config of data sets; `sfumato dataset` converts it.",
        ),
        ("a.toml", "a = ", "a.toml: not readable as TOML"),
        (
            "a.sh",
            "python flux_train_network.py --a",
            "a.sh: no command in it that is known; wanted one that runs train_",
        ),
        (
            "a.sh",
            "train_network.py --config_file=no",
            "a.sh: its --config_file no is neither beside it nor in this folder.",
        ),
        (
            "a.sh",
            "train_network.py --dataset_config=no.toml",
            "a.sh: its dataset_config no.toml is neither beside it nor",
        ),
        (
            "a.sh",
            f"train_network.py {BASE}=a --network_module=networks.oft",
            "a.sh: networks.oft has no counterpart; networks.lora",
        ),
        ("a.sh", f"train_network.py {BASE}=a --network_dim=many", "a.sh: network_dim is 'many'; wanted a number."),
        ("a.sh", f"train_network.py {BASE}=a --network_dim", "a.sh: network_dim is True; wanted a number."),
        ("a.sh", f"train_network.py {BASE}=a b", "a.sh: pretrained_model_name_or_path is ['a', 'b']; wanted a text."),
        ("a.json", '{"training_method": [1]}', "a.json: training_method is [1]; wanted a text."),
        (
            "a.json",
            '{"training_method": "LORA", "additional_embeddings": true, "epochs": []}',
            "a.json: epochs is []; wanted a number.",
        ),
        ("a.sh", f"train_network.py {BASE}=a --network_dim=1.5", "a.sh: network_dim is 1.5; wanted a whole number."),
        ("a.sh", f"train_network.py {BASE}=a --resolution=big", "a.sh: resolution is 'big'; wanted a number."),
        ("a.sh", f"train_network.py {BASE}=a --network_train_text_encoder_only", "a.sh: trains no U-Net"),
        ("a.sh", "train_network.py --seed 1", "a.sh: no pretrained_model_name_or_path, the base model; give it one."),
        ("a.sh", f"train_textual_inversion.py {BASE}=a --seed 1", "a.sh: no token_string, the new word; give it one."),
        (
            "a.sh",
            "train_text_to_image_lora.py --dataset_name=x/y",
            "a.sh: its images are the hub's x/y; save them in a",
        ),
    ],
)
def test_what_is_no_training_that_can_be_had_is_refused(name, text, said, home):
    with pytest.raises(ConfigError) as refused:
        converted(home, text, name)
    assert str(refused.value).startswith(said)


def test_a_file_that_is_not_there_is_named(home):
    with pytest.raises(ConfigError, match=r"trian\.sh: cannot be read \(No such file or directory\)\. Name another"):
        read(home / "trian.sh")


def test_files_that_are_no_text_are_refused(home):
    (home / "prompts.txt").write_bytes(b"a dog \xe9")
    (home / "config.toml").write_bytes(b'seed = "\xe9"')
    for line, name in (
        (f"{BASE}=a --sample_prompts=prompts.txt", "prompts.txt"),
        ("--config_file=config", "config.toml"),
    ):
        with pytest.raises(ConfigError) as refused:
            converted(home, f"train_network.py {line}")
        assert str(refused.value) == f"{home / name}: not readable as text (not UTF-8). Save it as UTF-8."
    with pytest.raises(ConfigError) as refused:
        converted(home, f"seed = {'[' * 9999}{']' * 9999}", "deep.toml")
    assert str(refused.value).startswith("deep.toml: not readable as TOML (maximum recursion depth exceeded")


def test_what_the_trainer_would_refuse_is_refused_and_nothing_is_written(home, capsys):
    (home / "a.sh").write_text(
        "train_network.py --pretrained_model_name_or_path=a --train_data_dir=img --ip_noise_gamma=-1"
    )
    before = sorted(home.iterdir())
    assert cli.main(["recipe", "a.sh", "-o", "mine.toml"]) == 2
    said = capsys.readouterr().err
    assert (
        said == "sfumato: a.sh: lora refuses what it asks for: --input-perturbation is -1.0; it must not be negative.\n"
    )
    assert sorted(home.iterdir()) == before


def test_neither_file_is_written_over(home, capsys):
    (home / "a.sh").write_text("train_network.py --pretrained_model_name_or_path=a")
    (home / "mine-images.toml").write_text("")
    assert cli.main(["recipe", "a.sh", "-o", "mine.toml"]) == 2
    assert "mine-images.toml exists and is not written over" in capsys.readouterr().err
    assert not (home / "mine.toml").exists()
    assert cli.main(["recipe", "a.sh", "-o", "mine.txt"]) == 2


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


def test_a_trainer_that_is_given_a_config_of_sd_scripts_says_who_converts_it(home, capsys):
    written(home / "kohya.toml", '[model]\npretrained_model_name_or_path = "a"\n[run]\noutput_dir = "out"\n')
    assert cli.main(["train", "lora", "kohya.toml", "--output", "run"]) == 2
    said = "kohya.toml: a training of sd-scripts; sfumato recipe kohya.toml -o mine.toml converts it."
    assert capsys.readouterr().err == f"sfumato: {said}\n"
    for words in (["job.yaml"], ["--config", "job.yaml"]):
        assert cli.main(["train", "lora", *words, "--output", "run"]) == 2
        said = "a config is a .toml here; sfumato recipe job.yaml -o mine.toml converts a training of another tool."
        assert capsys.readouterr().err == f"sfumato: job.yaml: {said}\n"
