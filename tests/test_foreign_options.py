"""Whoever types an option's name from another tool is told ours; docs/names.md has the same names."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest

from sfumato import cli
from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.utils.option_names import OPTIONS, UNASKED, suggest_option

TABLE = (Path(__file__).parents[1] / "docs/names.md").read_text(encoding="utf-8")
ROWS = [
    [re.findall(r"`([^`]+)`", cell) for cell in line.split(" | ")[:2]] for line in TABLE.splitlines() if "| " in line
]
NEEDED = ("--images", "d", "--output", "o")
MODULES = [*(f"sfumato.trainers.{name}" for name in cli.TRAINERS), *(module for module, _ in cli.PIPELINES.values())]


def fields(module):
    return {field.name for field in dataclasses.fields(importlib.import_module(module).Config)}


def test_the_table_has_the_names_that_commands_know():
    written = {(ours[0] if ours else "", name) for ours, names in ROWS for name in names}
    known = {(option, name) for option, names in OPTIONS.items() for name in names.split()}
    assert written == known | {("", name) for names in UNASKED for name in names.split()}


def test_every_name_leads_to_an_option_of_some_program_that_does_not_have_that_name_itself():
    programs = [fields(module) for module in MODULES]
    for option, names in OPTIONS.items():
        field = option.split()[0].removeprefix("--").replace("-", "_")
        having = [program for program in programs if field in program]
        for name in names.split():
            said = [suggest_option(name, program) for program in having if name not in program]
            assert any(option in re.split(" is | or |\\.$", each or "") for each in said), (option, name)


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        ("train lora", [*NEEDED, "--network_dim", "16"], "--network_dim. Here it is --rank. "),
        ("generate", ["a crab", "-n", "4"], "-n. Here it is --count. "),
        ("convert", ["a.safetensors", "-o", "b", "--to", "ComfyUI"], "--to ComfyUI: it reads --to kohya, in which "),
        ("train lora", [*NEEDED, "--lr=1e-4"], "--lr. Here it is --learning-rate. See"),
        ("train lora", [*NEEDED, "--enable-bucket"], "It needs none: images keep their sh"),
        ("train lora", ["--train_data_dir", "d"], "--train_data_dir is no option. Here it is --images. See"),
        ("train lora", [*NEEDED, "--placeholder_token", "x"], "Here it is --train-words."),
        ("train textual_inversion", ["--images", "d", "--token_string", "x"], "Here it is --placeholder."),
        ("train lora", [*NEEDED, "--learning_rate_te1", "1e-5"], "Here it is --text-learning-rate."),
        ("train lora", [*NEEDED, "--network_args", "conv_dim=4"], "--network_args. Its conv_dim is --conv-rank"),
        ("train dreambooth", [*NEEDED, "--network_args", "x=4"], "rank_dropout --rank-dropout, module_dropout"),
        ("train lora", [*NEEDED, "--caption_extension", ".cap"], "A dataset.toml has it as caption_suffix."),
        ("train lora", [*NEEDED, "--loss_type", "huber"], "--huber 0.1 is sd-scripts' huber with its schedule snr."),
        ("train lora", [*NEEDED, "--multires_noise_discount", "0.3"], "Here it is --pyramid-noise."),
        ("train textual_inversion", ["--loraplus_text_encoder_lr_ratio", "2"], "There is no counterpart."),
        ("train lora", [*NEEDED, "--debiased_estimation_loss"], "Here it is --debiased."),
        ("train lora", [*NEEDED, "--log_with", "wandb"], "--log_with. Here it is --tensorboard or --wandb. "),
        ("train lora", [*NEEDED, "--wandb_run_name", "a"], "Here it is --wandb-name."),
        ("train lora", [*NEEDED, "--v_pred_like_loss", "1"], "--min-snr weighs the timesteps."),
        ("train lora", [*NEEDED, "--schedule", "COSINE_WITH_HARD_RESTARTS"], "here it is --schedule cosine with --cyc"),
        ("train lora", [*NEEDED, "--scale_weight_norms", "1"], "Here it is --max-norm."),
        ("train lora", [*NEEDED, "--vae_batch_size", "4"], "It needs none: images are read ahead, and encoded as many"),
        ("generate", ["a crab", "--cfg_scale", "7"], "--cfg_scale. Here it is --guidance. See"),
        ("generate", ["a crab", "--enable_bucket"], "--enable_bucket. See"),
        ("train lora", [*NEEDED, "--schedule", "constant_with_warmup"], "here it is --schedule constant with --warmup"),
        ("train lora", [*NEEDED, "--resolution=512,768"], "--resolution 512,768: it is one number"),
        ("train lora", ["--resume", "runs/x"], "--resume runs/x: it is the run in --output that goes on;"),
        ("train lora", [*NEEDED, "--resume", "runs/x"], "sfumato resume runs/x needs no option."),
    ],
)  # fmt: skip
def test_an_option_of_another_tool_is_told_by_its_name_here(program, words, said):
    name = program.removeprefix("train ")
    module = f"sfumato.trainers.{name}" if name in cli.TRAINERS else cli.PIPELINES[name][0]
    with pytest.raises(ConfigError) as error:
        parse(importlib.import_module(module).Config, words, program=program)
    assert said in str(error.value)


def test_a_key_of_another_tool_is_told_by_its_name_here(tmp_path):
    (tmp_path / "c.toml").write_text("network_alpha = 8")
    config_type = importlib.import_module("sfumato.trainers.lora").Config
    with pytest.raises(ConfigError, match=r"unknown key 'network_alpha'; here it is --alpha\."):
        parse(config_type, [str(tmp_path / "c.toml")], program="train lora")
    (tmp_path / "c.toml").write_text("schedule = 'constant_with_warmup'")
    with pytest.raises(ConfigError, match=r'schedule is "constant_with_warmup"; here it is --schedule constant with'):
        parse(config_type, [str(tmp_path / "c.toml")], program="train lora")
