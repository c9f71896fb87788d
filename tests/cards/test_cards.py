"""The model card is read back by huggingface_hub, and uploading says what went wrong."""

import dataclasses
import re
import shlex
from dataclasses import replace

import pytest
from PIL import Image
from sfumato.trainers import dpo, dreambooth, finetune, lcm, lora, slider, textual_inversion

from sfumato.errors import ConfigError
from sfumato.files import Description, Sampling
from sfumato.training import recipe_defaults
from sfumato.training.cards.adapter import _USUAL, code, training_table, write_card
from sfumato.training.cards.methods import add_words_section, write_embedding_card, write_fast_card, write_model_card
from sfumato.training.finish import push
from sfumato.training.options import RunOptions
from sfumato.utils.formatting import quote_argument

ABOUT = Description(
    title="line",
    family="sd1",
    base="some/base",
    images=16,
    trigger=["zwx"],
    config={"rank": 16, "steps": 300, "images": "line-style"},
    dataset_sha256="ab" * 32,
)


@pytest.fixture
def card(tmp_path):
    row = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    return write_card(tmp_path, tmp_path / "line.safetensors", ABOUT, ["a crab", "a house"], [row, row])


def test_the_head_is_what_the_hub_reads(card):
    from huggingface_hub import ModelCard

    data = ModelCard.load(card).data
    assert data.base_model == "some/base"
    assert {"text-to-image", "diffusers", "lora", "template:sd-lora"} <= set(data.tags)
    assert data.instance_prompt == "zwx"
    assert [entry["output"]["url"] for entry in data.widget] == ["images/image_0.png", "images/image_1.png"]


def test_what_is_unusual_of_a_training_is_told(tmp_path):
    config = {"rank": 16, "optimizer": "adamw", "huber": 0.1, "accumulate": 4, "loraplus_ratio": 1.0}
    text = write_card(tmp_path, tmp_path / "line.safetensors", replace(ABOUT, config=config), [], []).read_text("utf-8")
    assert "| rank | 16 |\n| accumulate | 4 |\n| huber | 0.1 |\n| images | 16 |" in text


@pytest.mark.parametrize(
    ("config", "title", "diffusers"),
    [
        ({"algo": "lokr", "factor": 8}, "A LoKr for", "diffusers refuses it"),
        ({"algo": "loha", "dora": True}, "A LoHa with weight decomposition (DoRA) for", "diffusers refuses it"),
        (
            {"algo": "lora", "dora": True},
            "A LoRA with weight decomposition (DoRA) for",
            "diffusers draws with the LoRA alone",
        ),
    ],
)
def test_which_programs_read_another_kind_is_told(config, title, diffusers, tmp_path):
    about = replace(ABOUT, config={"rank": 16, **config})
    text = write_card(tmp_path, tmp_path / "line.safetensors", about, [], []).read_text(encoding="utf-8")
    assert title in text
    assert diffusers in text
    assert (
        "`sfumato convert line.safetensors --bake lora --keep-energy 0.99 --base some/base --output NAME.safetensors`"
        in text
    )
    assert "load_lora_weights" not in text
    assert "template:sd-lora" not in text
    shown = [f"| {name} | {value} |" for name, value in config.items() if value != "lora"]
    assert all(line in text for line in shown)


def test_adapter_guidance_is_told_where_the_file_asks_for_it(card, tmp_path):
    assert "adapter guidance" not in card.read_text(encoding="utf-8")
    about = replace(ABOUT, adapter_guidance=2.0)
    text = write_card(tmp_path, tmp_path / "line.safetensors", about, [], []).read_text(encoding="utf-8")
    assert "line.safetensors:1.0`, under the adapter guidance 2 that its file asks for. Diffusers and other " in text


def test_the_steps_are_told_that_the_file_asks_for(card, tmp_path):
    assert "in the steps" not in card.read_text(encoding="utf-8")
    about = replace(ABOUT, over_steps=(0.0, 0.8))
    text = write_card(tmp_path, tmp_path / "otter.safetensors", about, [], []).read_text(encoding="utf-8")
    assert "otter.safetensors:1.0`, in the steps from 0 to 0.8 of the way from noise to image, as" in text


def test_the_negative_prompt_is_told_that_the_file_asks_for(card, tmp_path):
    assert "negative" not in card.read_text(encoding="utf-8")
    about = replace(ABOUT, trigger=["zwx"], captions=["zwx, flat style"], negatives=["zwx"])
    text = write_card(tmp_path, tmp_path / "otter.safetensors", about, [], []).read_text(encoding="utf-8")
    assert "give `zwx` as the negative prompt" in text
    assert "pipe('zwx, flat style', negative_prompt='zwx'" in text


def test_the_card_of_few_steps_says_how_each_program_draws_with_it(tmp_path):
    config = {"rank": 64, "guidance": 7.5, "solver_steps": 50, "prompts": ["a secret"], "steps": 1000}
    about = replace(ABOUT, trigger=[], images=None, sampling=Sampling("lcm", 4, 1.0), config=config)
    path = write_fast_card(tmp_path, tmp_path / "fast.safetensors", about, ["a crab", "a house"], [])
    text = path.read_text(encoding="utf-8")
    assert "learned from images that the base model drew," in text
    assert "pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)\n" in text
    assert "image = pipe('a house', num_inference_steps=4, guidance_scale=1.0).images[0]" in text
    assert 'where no option does: `sfumato generate "a house" --base some/base --lora fast.safetensors:1.0`\n' in text
    assert "--lora style.safetensors:1 --lora fast.safetensors:1.0`" in text
    assert "sampler `lcm`, scheduler `sgm_uniform`, 4 steps and cfg 1;" in text
    assert "the sampling method LCM, 4 steps and a CFG scale of 1." in text
    assert "| guidance | 7.5 |\n| solver_steps | 50 |\n| rank | 64 |" in text
    assert "secret" not in text
    pocket = replace(about, family="pocket", base="pocket", images=3)
    text = write_fast_card(tmp_path, tmp_path / "fast.safetensors", pocket, [], []).read_text(encoding="utf-8")
    assert "learned from 3 images," in text
    assert "ComfyUI" not in text


@pytest.mark.parametrize("name", ["line.safetensors", "line"])
def test_each_of_several_triggers_has_a_line_and_an_example(tmp_path, name):
    from huggingface_hub import ModelCard

    captions = ["a crab, zwx style", "a scrabs otter", "an abs otter"]
    about = replace(ABOUT, trigger=["zwx", "abs", "none"], captions=captions)
    write = write_model_card if name == "line" else write_card
    path = write(tmp_path, tmp_path / name, about, ["abs on a table"], [])
    lines = ["- `zwx`, as in `a crab, zwx style`", "- `abs`, as in `abs on a table`", "- `none`, as in `none`"]
    assert "\n".join(["", *lines, ""]) in path.read_text(encoding="utf-8")
    assert "instance_prompt" not in ModelCard.load(path).data.to_dict()  # the hub would tell to write all of it
    write(tmp_path, tmp_path / name, about, [], [])
    assert 'sfumato generate "a crab, zwx style"' in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("captions", "said"),
    [
        (["a sks dog"] * 3, "None was named; all captions were `a sks dog`, so write that in the prompt."),
        (["a crab, zwx style", "a dog, zwx style"], "None was named; the captions are such as `a crab, zwx style`."),
        ([], "None was named."),
    ],
)
def test_without_a_trigger_the_card_says_what_the_captions_are(captions, said, tmp_path):
    about = replace(ABOUT, trigger=[], captions=captions)
    text = write_card(tmp_path, tmp_path / "a.safetensors", about, [], []).read_text(encoding="utf-8")
    assert f"## Trigger words\n\n{said}\n" in text


@pytest.mark.parametrize("name", ["otter.safetensors", "otter"])
def test_what_to_type_asks_for_what_was_learned_and_not_for_another_sample(name, tmp_path):
    about = replace(ABOUT, trigger=["sks otter"])
    write = write_model_card if name == "otter" else write_card
    prompts = ["a sks otter", "a sks otter on a table", "otter", "a ball"]
    text = write(tmp_path, tmp_path / name, about, prompts, []).read_text(encoding="utf-8")
    assert "pipe('a sks otter on a table')" in text
    assert 'sfumato generate "a sks otter on a table"' in text


@pytest.mark.parametrize("kind", ["line.safetensors", "line"])
def test_the_line_to_draw_with_says_of_the_base_what_the_base_itself_does_not(kind, tmp_path):
    """A whole model has its VAE, and its folder says what it predicts; how a prompt is read is said nowhere in it."""
    loaded = {"clip_skip": 1, "max_tokens": 150, "vae": "some/vae", "prediction_type": "v_prediction"}
    about = replace(ABOUT, config={**loaded, "zero_terminal_snr": True})
    text = write_model_card(tmp_path, tmp_path / kind, about, [], []).read_text(encoding="utf-8")
    whole = "sfumato generate zwx --base line --clip-skip 1 --max-tokens 150`"
    change = (
        "sfumato generate zwx --base some/base --prediction-type v_prediction --clip-skip 1 --max-tokens 150 "
        "--vae some/vae --zero-terminal-snr --lora line.safetensors:1.0`"
    )
    assert (whole if kind == "line" else change) in text


@pytest.mark.parametrize(("saved", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16")])
def test_a_model_in_half_precision_is_read_in_it(saved, dtype, tmp_path):
    about = replace(ABOUT, config={"save_precision": saved})
    text = write_model_card(tmp_path, tmp_path / "line", about, [], []).read_text(encoding="utf-8")
    assert "import torch\nfrom diffusers import DiffusionPipeline\n\npipe = " in text
    assert f'.from_pretrained("line", torch_dtype=torch.{dtype})' in text


def test_the_line_to_draw_with_has_what_the_base_was_loaded_with(tmp_path):
    about = replace(ABOUT, config={"rank": 16, "clip_skip": 1, "prediction_type": "epsilon", "vae": None})
    text = write_card(tmp_path, tmp_path / "line.safetensors", about, [], []).read_text(encoding="utf-8")
    assert "--base some/base --prediction-type epsilon --clip-skip 1 --lora line.safetensors:1.0`" in text
    assert "image = pipe('zwx', clip_skip=1).images[0]" in text


def test_every_card_tells_diffusers_of_the_layers_that_were_skipped(tmp_path, card):
    about = replace(ABOUT, config={"clip_skip": 2})
    word = {"<x>": tmp_path / "x.safetensors"}
    add_words_section(card, word, about, inside=None)
    add_words_section(card, word, about, inside=tmp_path / "line.safetensors")
    assert card.read_text(encoding="utf-8").count('pipe("a <x>", clip_skip=2)') == 3
    (tmp_path / "whole").mkdir()
    whole = write_model_card(tmp_path / "whole", tmp_path / "whole/model", about, [], [])
    assert ", clip_skip=2).images[0]" in whole.read_text(encoding="utf-8")
    assert "from diffusers import DiffusionPipeline\n\npipe = Diff" in whole.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("base", "line"),
    [
        ("some/base", 'pipe = DiffusionPipeline.from_pretrained("some/base")'),
        ("pocket", 'pipe = load_base("pocket").pipeline()'),
        ("my base.safetensors", "# pipe: a diffusers pipeline of my base.safetensors"),
    ],
)
def test_lines_of_python_say_what_pipe_is_and_the_head_names_bases_of_the_hub_alone(base, line, tmp_path):
    from huggingface_hub import ModelCard

    about, words = replace(ABOUT, base=base), {"<x>": tmp_path / "x.safetensors"}
    path = write_embedding_card(tmp_path, words, about, [], [], [])
    assert f'{line}\npipe.load_textual_inversion("x.safetensors")' in path.read_text(encoding="utf-8")
    assert f'sfumato generate "<x>" --base {quote_argument(base)} --embedding x.safetensors`' in path.read_text("utf-8")
    path = write_card(tmp_path, tmp_path / "line.safetensors", about, [], [])
    add_words_section(path, words, about, inside=None)
    assert f'{line}\npipe.load_lora_weights("line.safetensors")' in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").count(line) == 1  # another pipe would not have the adapter
    # The hub refuses a card whose base_model is no model id, after the training.
    assert ModelCard.load(path).data.base_model == (base if base == "some/base" else None)


def test_of_pocket_no_other_program_is_told(tmp_path):
    about = replace(ABOUT, family="pocket", base="pocket")
    word, learned = {"<x>": tmp_path / "x.safetensors"}, tmp_path / "line.safetensors"
    cards = [
        write(tmp_path / str(place), learned, about, [], [])
        for place, write in enumerate((write_card, write_model_card))
    ]
    add_words_section(cards[0], word, about, inside=learned)
    cards.append(write_embedding_card(tmp_path, word, about, [], [], []))
    for card in cards:
        text = card.read_text(encoding="utf-8")
        asked = text.count(", num_inference_steps=12, guidance_scale=2.5).images[0]")
        assert asked == text.count("pipe(") - text.count("# pipe(")  # its own guidance is too much for pocket
        assert "Other programs do not know bases of the family pocket." in text
        assert not re.search("ComfyUI|AUTOMATIC1111|InvokeAI", text)


def test_all_lines_draw_in_the_size_that_was_learned_where_it_is_not_the_bases(tmp_path):
    about, words = replace(ABOUT, drawn_at=(768, 768)), {"<cat>": tmp_path / "cat.safetensors"}
    cards = [write_card(tmp_path, tmp_path / "x.safetensors", about, [], [])]
    add_words_section(cards[0], words, about, inside=None)
    texts = [cards[0].read_text(encoding="utf-8")]
    texts += [write_model_card(tmp_path, tmp_path / name, about, [], []).read_text(encoding="utf-8") for name in "x"]
    texts.append(write_embedding_card(tmp_path, words, about, [], [], []).read_text(encoding="utf-8"))
    for text in texts:
        calls = text.count("pipe(") - text.count("# pipe(")
        assert calls == text.count(", width=768, height=768)") > 0
        assert text.count('sfumato generate "') <= text.count(" --size 768x768") == 1


@pytest.mark.parametrize("text", [False, True])
def test_the_card_of_a_difference_says_who_reads_it(text, tmp_path):
    about = replace(ABOUT, config={"train_text_encoder": text})
    said = write_model_card(tmp_path, tmp_path / "x.safetensors", about, [], []).read_text(encoding="utf-8")
    assert "ComfyUI, AUTOMATIC1111, Forge and InvokeAI read the file as it is" in said
    assert ("the text encoders' norms" in said) is text


@pytest.mark.parametrize(
    ("family", "config", "said"),
    [
        (
            "sd1",
            {"algo": "lora", "dora": True},
            "Forge and InvokeAI read the file as it is. diffusers draws with the LoRA",
        ),
        (
            "sd1",
            {"algo": "oft"},
            "ComfyUI (which counts any weight but 1 twice) and AUTOMATIC1111 read the file as it is. diffusers refuses "
            "it, Forge leaves it out, InvokeAI refuses it, and sd-scripts does not know the kind",
        ),
        ("sdxl", {"algo": "lokr"}, "Forge and InvokeAI read the file as it is. diffusers refuses it, and sd-scripts"),
        (
            "sd1",
            {"algo": "lokr"},
            "AUTOMATIC1111 and Forge read the file as it is. diffusers refuses it, InvokeAI recog",
        ),
        (
            "sdxl",
            {"algo": "loha", "dora": True},
            "and Forge read the file as it is. diffusers refuses it, InvokeAI refuses",
        ),
    ],
)
def test_the_card_says_which_programs_read_the_kind(family, config, said, tmp_path):
    about = replace(ABOUT, family=family, config=config)
    assert said in write_card(tmp_path, tmp_path / "x.safetensors", about, [], []).read_text(encoding="utf-8")


def test_the_card_of_an_extracted_lora_names_no_targets(tmp_path):
    config = {"method": "full", "rank": 16, "targets": "everything"}
    text = write_card(tmp_path, tmp_path / "x.safetensors", replace(ABOUT, config=config), [], []).read_text()
    assert "| method | full |\n| rank | 16 |\n| images |" in text


def test_a_setting_with_a_bar_in_it_is_one_cell(tmp_path):
    about = replace(ABOUT, config={"targets": "to_q|to_k"})
    text = write_card(tmp_path, tmp_path / "x.safetensors", about, [], []).read_text()
    assert r"| targets | to_q\|to_k |" in text


def test_every_program_is_told_how_it_calls_a_word(card, tmp_path):
    """ComfyUI and InvokeAI have a spelling of their own; what Forge and diffusers do not find is not promised."""
    add_words_section(card, {"<x>": tmp_path / "my-x.safetensors"}, ABOUT, inside=None)
    text = card.read_text(encoding="utf-8")
    assert "`my-x` in AUTOMATIC1111 and Forge, `embedding:my-x` in ComfyUI." in text
    add_words_section(card, {"<x>": tmp_path / "line-x.safetensors"}, ABOUT, inside=tmp_path / "line.safetensors")
    text = card.read_text(encoding="utf-8")
    assert "`embedding:line` in a prompt" in text
    assert "Forge draws without them" in text
    assert "\n- `<x>` in `my-x.safetensors`\n" in text
    assert "\n- `<x>`\n" in text  # inside the adapter's file


def test_the_card_of_several_words_has_them_all(tmp_path):
    words = {token: tmp_path / f"{token.strip('<>')}.safetensors" for token in ("<x>", "<y>")}
    text = write_embedding_card(tmp_path, words, ABOUT, [], [], []).read_text(encoding="utf-8")
    assert "\n2 words for `some/base`" in text
    assert "--embedding x.safetensors --embedding y.safetensors`" in text


def test_every_picture_of_the_card_is_there(card):
    text = card.read_text(encoding="utf-8")
    linked = re.findall(r"images/\w+\.png", text)
    assert {"images/before.png", "images/after.png"} <= set(linked)
    assert all((card.parent / name).is_file() for name in linked)


def test_pictures_of_one_time_alone_have_no_before(tmp_path):
    row = [Image.new("RGB", (8, 8), "red")]
    for write in (write_card, write_model_card):
        text = write(tmp_path, tmp_path / "line.safetensors", ABOUT, ["a crab"], [row]).read_text(encoding="utf-8")
        assert "images/image_0.png" in text
        assert "before" not in text.lower()
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["image_0.png"]


def test_the_base_is_shown_before_and_what_was_learned_after_and_in_the_gallery(tmp_path):
    widths = (8, 16, 8)
    rows = [[Image.new("RGB", (width, 8), colour) for width in widths] for colour in ("red", "lime", "blue")]
    write_card(tmp_path, tmp_path / "line.safetensors", ABOUT, ["a crab", "a house", "a dog"], rows)
    shown = {path.stem: Image.open(path) for path in (tmp_path / "images").iterdir()}
    strips = {name: shown.pop(name).getcolors() for name in ("before", "after")}
    assert strips == {"before": [(32 * 8, (255, 0, 0))], "after": [(32 * 8, (0, 0, 255))]}
    assert [shown[f"image_{place}"].getcolors() for place in range(3)] == [
        [(width * 8, (0, 0, 255))] for width in widths
    ]
    told = ["a crab"], [rows[0][:1], rows[2][:1]]
    for write, made in (
        (write_model_card, (tmp_path / "line", ABOUT)),
        (write_embedding_card, ({"<x>": tmp_path / "x.safetensors"}, ABOUT, [])),
    ):
        write(tmp_path, *made, *told)
        sheet = Image.open(tmp_path / "images/before_after.png")
        column = [sheet.getpixel((sheet.width - 40, y)) for y in range(sheet.height)]
        assert column.index((255, 0, 0)) < column.index((0, 0, 255))


def test_the_license_is_in_the_head(tmp_path):
    from huggingface_hub import ModelCard

    path = write_card(tmp_path, tmp_path / "line.safetensors", replace(ABOUT, license="mit"), [], [])
    assert ModelCard.load(path).data.license == "mit"


def test_a_base_of_the_family_pocket_is_one_that_other_programs_do_not_know(tmp_path):
    about = replace(ABOUT, family="pocket", base="my-pocket")
    text = write_card(tmp_path, tmp_path / "line.safetensors", about, [], []).read_text(encoding="utf-8")
    assert "Other programs do not know bases of the family pocket." in text


def test_the_table_has_the_steps_that_were_made():
    assert "| steps | 120 |" in training_table(replace(ABOUT, steps=120), ["steps"])
    assert "| steps | 300 |" in training_table(ABOUT, ["steps"])


def test_the_card_says_how_it_was_made(card):
    text = card.read_text(encoding="utf-8")
    assert "| rank | 16 |" in text
    assert "| images | 16 |" in text
    assert "`" + "ab" * 32 + "`" in text


@pytest.fixture
def asked(monkeypatch):
    """What the hub was asked for, which is not reached."""
    import huggingface_hub

    found = {}

    class Api:
        def create_repo(self, repository, exist_ok):
            found["repository"] = repository

        def upload_folder(self, **options):
            found.update(options)
            return type("Commit", (), {"commit_url": "address"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return found


def test_pushing_uploads_adapter_card_and_pictures_and_nothing_else(card, asked):
    (card.parent / "images/of-mine.png").write_bytes(b"")
    assert push(card.parent, card.parent / "line.safetensors", "me/line") == "address"
    assert asked["repository"] == asked["repo_id"] == "me/line"
    assert asked["allow_patterns"][:2] == ["line.safetensors", "README.md"]
    shown = set(asked["allow_patterns"][2:])
    assert shown == {f"images/{path.name}" for path in (card.parent / "images").iterdir()} - {"images/of-mine.png"}


def test_a_name_with_brackets_is_uploaded(tmp_path, asked):
    from huggingface_hub.utils import filter_repo_objects

    push(tmp_path, tmp_path / "line [v2].safetensors", "me/line")
    names = ["line [v2].safetensors", "line v.safetensors", "log.jsonl"]
    assert list(filter_repo_objects(names, allow_patterns=asked["allow_patterns"])) == names[:1]


@pytest.mark.parametrize("kind", ["line v2.safetensors", "line v2"])
def test_the_line_to_draw_with_is_what_a_shell_reads(kind, tmp_path):
    about, prompt = replace(ABOUT, base="my base"), 'a dog\'s "bone" at $5'
    write = write_card if kind.endswith(".safetensors") else write_model_card
    text = write(tmp_path, tmp_path / kind, about, [prompt], []).read_text(encoding="utf-8")
    words = shlex.split(re.search("`(sfumato generate .*)`", text)[1])
    assert words[2] == prompt
    assert words[3:] == (["--base", "my base", "--lora", f"{kind}:1.0"] if write is write_card else ["--base", kind])


def test_a_models_folder_is_uploaded_and_nothing_that_begins_like_it(tmp_path, asked):
    from huggingface_hub.utils import filter_repo_objects

    (tmp_path / "c").mkdir()
    push(tmp_path, tmp_path / "c", "me/line")
    names = ["c/unet/config.json", "README.md", "config.toml", "checkpoints/000001/state.json"]
    assert list(filter_repo_objects(names, allow_patterns=asked["allow_patterns"])) == names[:2]


@pytest.mark.parametrize("error", [OSError("no route to host"), ValueError("no route to host")], ids=["os", "httpx"])
def test_a_failed_push_says_that_nothing_is_lost(error, card, monkeypatch):
    """And what it says to type uploads what the push would have uploaded."""
    import huggingface_hub

    class Api:
        def create_repo(self, repository, exist_ok):
            raise error

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(ConfigError, match=r"no route to host\. What was learned is safe in ") as refused:
        push(card.parent, card.parent / "line.safetensors", "me/line")
    words = shlex.split(re.search("`(hf upload .*)`", str(refused.value))[1])
    assert words[2:5] == ["me/line", str(card.parent), "."]
    assert words[5::2] == ["--include"] * len(words[5::2])
    assert words[6:10:2] == ["line.safetensors", "README.md"]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_use_of_words_that_were_learned_beside_it_is_told_with_it(family, tmp_path):
    config = {**ABOUT.config, "train_words": ["<otter>"]}
    about = replace(ABOUT, family=family, trigger=["<otter>"], config=config, captions=["<otter>, flat style"])
    text = write_card(tmp_path, tmp_path / "line.safetensors", about, [], []).read_text(encoding="utf-8")
    assert "--lora line.safetensors:1.0 --embedding line-otter.safetensors`" in text
    wanted = "# and the words" if family == "sdxl" else 'pipe.load_textual_inversion("line-otter.safetensors")'
    assert f'pipe.load_lora_weights("line.safetensors")\n{wanted}' in text
    bundled = replace(about, config={**config, "bundle": True})
    text = write_card(tmp_path, tmp_path / "line.safetensors", bundled, [], []).read_text(encoding="utf-8")
    assert "load_lora_weights" not in text  # which refuses a file with words in it
    assert "AUTOMATIC1111 reads the file as it is; what others make of the words" in text
    assert "--embedding" not in text


def test_without_samples_and_triggers_a_caption_is_the_example(tmp_path):
    about = replace(ABOUT, trigger=[], captions=["a red square"])
    text = write_card(tmp_path, tmp_path / "line.safetensors", about, [], []).read_text(encoding="utf-8")
    assert 'sfumato generate "a red square"' in text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("zwx", "`zwx`"),
        ("a cat` ![x](https://a.example/t.png)", "``a cat` ![x](https://a.example/t.png)``"),
        ("``", "``` `` ```"),
        ("a\n\n# b", "`a  # b`"),
    ],
)
def test_code_ends_where_its_text_does(text, shown):
    assert code(text) == shown


def test_a_caption_draws_no_picture_in_the_card(tmp_path):
    caption = "a cat` ![x](https://a.example/t.png)"
    about = replace(ABOUT, trigger=[], captions=[caption], negatives=[caption])
    text = write_card(tmp_path, tmp_path / "line.safetensors", about, [], []).read_text(encoding="utf-8")
    assert f"all captions were ``{caption}``, so" in text
    assert f"give ``{caption}`` as the negative" in text
    outside = re.sub(r"(?s)```python.*?```|(`+)(?!`).*?(?<!`)\1(?!`)", "", text.split("---")[-1])
    assert "example/t.png" not in outside


WHERE_AND_HOW = {
    *{field.name for field in dataclasses.fields(RunOptions)},
    *("images", "base", "vae", "prediction_type", "precision", "device", "attention", "gradient_checkpointing"),
    *(
        "micro_batch",
        "trigger",
        "caption",
        "cache",
        "skip_bad",
        "epochs",
        "save_precision",
        "save",
        "save_every",
        "bundle",
        "fused",
    ),
    *("ema_on_cpu", "class_images", "class_cache", "class_count", "adapter_guidance", "over_steps", "own_negative"),
    *(
        "identifier",
        "class_name",
        "instance_prompt",
        "class_prompt",
        "placeholder",
        "stands_for",
        "more_images",
        "less_images",
        "prompts",
        "drawn_steps",
        "preferred",
        "rejected",
    ),
}
"""Options that a card tells in its own words, or that say where and how a training was computed."""


@pytest.mark.parametrize("trainer", [lora, dreambooth, finetune, textual_inversion, slider, lcm, dpo])
def test_a_card_tells_every_setting_that_is_not_as_usual(trainer):
    """What is usual is the trainer's own default, or what no recipe chooses."""
    defaults = {field.name: field.default for field in dataclasses.fields(trainer.Config)}
    told = {name for name in defaults if name in _USUAL}
    always = {"steps", "batch", "learning_rate", "min_snr", "seed", "resolution", "rank", "alpha", "targets", "method"}
    always |= {"conv_rank", "conv_alpha", "prior", "vectors", "start", "templates", "guidance", "solver_steps"}
    always |= {"concept", "more", "less", "strength", "drawn", "beta"}
    assert defaults.keys() - told - WHERE_AND_HOW - always == set()
    plain = {**recipe_defaults.PLAIN, "learn": "plain"}
    for name in told:
        default = plain.get(name) if defaults[name] is None else defaults[name]
        usual = list(default) if isinstance(default, tuple) else default
        assert _USUAL[name] == (1.0 if name == "prior_weight" else usual), name


def test_what_is_not_as_usual_stands_in_the_table():
    config = {"warmup": 10, "clip": 0.0, "prior_prompts": ["a cat", "a | dog"], "weight_decay": 0.01, "steps": 5}
    table = training_table(Description("line", "sd1", config=config), ["steps"])
    assert "| warmup | 10 |" in table
    assert "| clip | 0.0 |" in table
    assert "a \\| dog" in table
    assert "weight_decay" not in table
