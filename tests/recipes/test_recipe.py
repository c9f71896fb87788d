"""`sfumato recipe`: how files are read, and what is refused."""

import pytest
from converting import BASE, converted, written

from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.interop.read_training import read_training


def test_scripts_of_windows_are_read(home):
    text = "set MODEL=C:\\my models\\a.safetensors\r\npython train_network.py ^\r\n --network_dim=8 ^\r\n"
    text += ' --pretrained_model_name_or_path="%MODEL%" --output_name="it\'s"\r\n'
    (home / "train.bat").write_bytes(text.encode())
    assert read_training(home / "train.bat").values == {
        "network_dim": "8",
        "pretrained_model_name_or_path": "C:\\my models\\a.safetensors",
        "output_name": "it's",
    }
    text = '$model = "a"\npython train_network.py `\n  --pretrained_model_name_or_path $model'
    assert read_training(written(home / "train.ps1", text)).values == {"pretrained_model_name_or_path": "a"}


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
    found = read_training(written(home / name, text.replace("$RUN", "python train_network.py"))).values
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
        read_training(written(home / name, text))
    assert str(refused.value).startswith(f"{name}: {unset} of its command has no value that can be read without")


def test_of_several_trainings_the_first_is_converted_and_a_note_says_so(home):
    _, _, notes = converted(home, f"train_network.py {BASE}=a\ntrain_network.py {BASE}=b\n")
    assert notes == ("train.sh: the first of its 2 trainings; the others need files of their own",)


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
        (
            "a.sh",
            f"train_network.py {BASE}=a b",
            "a.sh: pretrained_model_name_or_path is ['a', 'b']; wanted a text. Put a name with",
        ),
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
        read_training(home / "trian.sh")
    with pytest.raises(ConfigError, match=r"job\.yaml: cannot be read \(No such file or directory\)\. Name the config"):
        read_training(home / "job.yaml")


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


@pytest.mark.parametrize(
    ("base", "is_told"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", False),
        ("here.safetensors", False),
        ("gone.safetensors", True),
        ("models/gone.ckpt", True),
        ("/workspace/model", True),
        ("./model", True),
        (".", False),
        ("C:\\models\\sdxl", True),
    ],
)
def test_a_base_that_is_not_on_this_machine_is_told(base, is_told, home, capsys):
    written(home / "here.safetensors", "")
    written(home / "a.sh", f"train_network.py {BASE}='{base}'")
    assert cli.main(["recipe", "a.sh", "-o", "mine.toml"]) == 0
    line = f"the base {base} is not on this machine; name one that is by --base, or in mine.toml\n"
    assert (line in capsys.readouterr().err) == is_told


def test_a_trainer_that_is_given_a_config_of_sd_scripts_says_who_converts_it(home, capsys):
    written(home / "kohya.toml", '[model]\npretrained_model_name_or_path = "a"\n[run]\noutput_dir = "out"\n')
    assert cli.main(["train", "lora", "kohya.toml", "--output", "run"]) == 2
    said = "kohya.toml: a training of sd-scripts; sfumato recipe kohya.toml -o mine.toml converts it."
    assert capsys.readouterr().err == f"sfumato: {said}\n"
    for words in (["job.yaml"], ["--config", "job.yaml"]):
        assert cli.main(["train", "lora", *words, "--output", "run"]) == 2
        said = "a config is a .toml here; sfumato recipe job.yaml -o mine.toml converts a training of another tool."
        assert capsys.readouterr().err == f"sfumato: job.yaml: {said}\n"
