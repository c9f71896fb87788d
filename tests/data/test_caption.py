"""`sfumato caption` with tiny models of random weights, built from their configs."""

import errno
import json
import os
import shutil
import string
from pathlib import Path

import numpy as np
import pytest
import torch
from made_up import noise_picture
from PIL import Image
from sfumato.pipelines.caption import Config, captions, main, pictures_without, write_new

from sfumato.data.captioners import CaptionSettings, clean, load_captioner
from sfumato.errors import ConfigError, DataError, FileError
from sfumato.precision import decide

CPU = decide("fp32", device="cpu")
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "crab", "on", "beach", "the", "house", "picture"]


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    folder = tmp_path_factory.mktemp("models") / "blip"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 32, "max_position_embeddings": 64, "projection_dim": 32}
    ends = {"bos_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {"image_size": 32, "patch_size": 16, "projection_dim": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = BlipConfig(text_config=text | sizes | ends, vision_config=vision | sizes, image_text_hidden_size=32)
        BlipForConditionalGeneration(config).save_pretrained(folder)
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(WORDS)})
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def florence(tmp_path_factory) -> Path:
    from transformers import Florence2Config, Florence2ForConditionalGeneration, Florence2Processor, RobertaTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("models") / "florence"
    # Letters only, since random weights would say bytes that nobody can print.
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", "<image>", *string.ascii_letters]
    vocabulary = {token: place for place, token in enumerate(tokens)}
    tokenizer = RobertaTokenizer(vocab=vocabulary, merges=[], extra_special_tokens={"image_token": "<image>"})
    text = {"model_type": "bart", "vocab_size": len(vocabulary), "d_model": 32, "max_position_embeddings": 128}
    text |= {f"{half}_{what}": n for half in ("encoder", "decoder") for what, n in (("layers", 1), ("ffn_dim", 64))}
    text |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "bos_token_id": 0, "pad_token_id": 1}
    text |= {"eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
    vision = {"depths": (1, 1, 1, 1), "embed_dim": (8, 16, 16, 32), "num_heads": (2,) * 4, "num_groups": (2,) * 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Florence2Config(
            text_config=text, vision_config=vision | {"window_size": 2, "projection_dim": 32}, image_token_id=5
        )
        Florence2ForConditionalGeneration(config).save_pretrained(folder)
    pictures = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False, resample=3)
    pictures.image_seq_length = 5
    Florence2Processor(pictures, tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tagger(tmp_path_factory) -> Path:
    """Gives each of six tags the mean of one colour, of 0 to 1: blue, green, red, and the same again."""
    pytest.importorskip("onnxruntime")
    onnx = pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("models") / "tagger"
    folder.mkdir()
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [
        helper.make_node("ReduceMean", ["pixels", "axes"], ["means"], keepdims=0),
        helper.make_node("Div", ["means", "white"], ["shares"]),
        helper.make_node("Concat", ["shares", "shares"], ["tags"], axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "tagger",
        [helper.make_tensor_value_info("pixels", kind, [1, 8, 8, 3])],
        [helper.make_tensor_value_info("tags", kind, [1, 6])],
        [
            helper.make_tensor("axes", onnx.TensorProto.INT64, [2], [1, 2]),
            helper.make_tensor("white", kind, [1], [255.0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    rows = ["1,general,9,0", "2,green_hair,0,0", "3,>_<,0,0", "4,blue_man,4,0", "5,grass,0,0", "6,red_man,4,0"]
    (folder / "selected_tags.csv").write_text("tag_id,name,category,count\n" + "\n".join(rows))
    return folder


@pytest.fixture
def bare(tmp_path) -> Path:
    folder = tmp_path / "bare"
    folder.mkdir()
    for number in range(3):
        noise_picture(seed=number).save(folder / f"{number}.png")
    (folder / "0.txt").write_text("mine")
    return folder


def files(folder):
    return {path.name: path.read_text() for path in folder.glob("*.txt")}


@pytest.mark.parametrize("model", ["blip", "florence"])
def test_a_model_says_something_printable_of_each_picture(model, request, bare):
    captioner = load_captioner(str(request.getfixturevalue(model)), CPU, CaptionSettings(longest=8))
    captions = captioner([noise_picture(seed=number) for number in range(3)])
    assert len(captions) == 3
    assert all(caption and caption.isprintable() for caption in captions)
    assert captions == captioner([noise_picture(seed=number) for number in range(3)])


def test_nothing_is_written_unless_asked(blip, bare, capsys):
    assert main([str(bare), str(blip), "--longest", "6"]) == 0
    assert files(bare) == {"0.txt": "mine"}
    shown = capsys.readouterr()
    assert [line.partition(":")[0] for line in shown.out.splitlines()] == ["1.png", "2.png"]
    assert "--write writes them; 1 image had one already" in shown.err


def test_captions_are_written_beside_and_never_over_existing_ones(blip, bare):
    assert main([str(bare), str(blip), "--longest", "6", "--write", "--prefix", "zwx, "]) == 0
    written = files(bare)
    assert written.keys() == {"0.txt", "1.txt", "2.txt"}
    assert written["0.txt"] == "mine"
    assert written["1.txt"].startswith("zwx, ")
    assert main([str(bare), str(blip), "--write"]) == 0
    assert files(bare) == written


@pytest.mark.parametrize("name", ["1.caption", "1.txt"])
def test_an_empty_caption_file_stays_and_is_named(blip, bare, name, capsys):
    (bare / name).write_text("")
    main([str(bare), str(blip), "--longest", "6", "--write"])
    assert (bare / name).read_text() == ""
    assert "2.txt" in files(bare)
    said = capsys.readouterr().err
    assert f"{name}: empty or unreadable, and nothing is written over" in said
    assert "1 image had one already" in said
    assert main([str(bare), str(blip), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"written": False, "captions": {}, "failed": [], "empty": [name]}
    assert "2 images had one already" in printed.err


def test_an_unreadable_caption_stays_the_caption_where_its_ending_is_in_capitals(bare):
    (bare / "1.TXT").write_bytes(b" " * 1_000_001)
    wanted, captioned, silent = pictures_without(bare)
    assert ([file.name for file in wanted], captioned) == (["2.txt"], 1)
    assert [name.lower() for name in silent] == ["1.txt"]


def test_a_bad_picture_is_named_and_the_others_are_done(blip, bare, capsys):
    (bare / "1.png").write_bytes(b"nothing")
    assert main([str(bare), str(blip), "--longest", "6", "--write", "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert [Path(name).name for name in printed["captions"]] == ["2.png"]
    assert printed["failed"][0].startswith("1.png: ")


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_a_pictures_name_does_not_command_the_terminal(blip, bare, capsys):
    for number, name in ((1, "1\x1b[2J.png"), (2, "2\x1b[2J.png"), (0, "3\x1b[2J.png")):
        (bare / f"{number}.png").rename(bare / name)
    (bare / "2\x1b[2J.png").write_bytes(b"no picture")
    (bare / "3\x1b[2J.txt").touch()
    assert main([str(bare), str(blip), "--longest", "6"]) == 1
    shown = capsys.readouterr()
    assert "1\\x1b[2J.png: " in shown.out
    assert "2\\x1b[2J.png: " in shown.err
    assert "3\\x1b[2J.txt: empty" in shown.err
    assert "\x1b" not in shown.out + shown.err


def test_a_caption_that_appeared_meanwhile_is_kept(bare):
    with pytest.raises(DataError, match=r"0\.txt: a caption appeared meanwhile"):
        write_new(bare / "0.txt", "new")
    assert files(bare) == {"0.txt": "mine"}


def test_a_caption_for_which_there_is_no_room_leaves_no_empty_file(bare, monkeypatch):
    opened = Path.open

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def on_a_full_disk(path, *args, **options):
        file = opened(path, *args, **options)
        file.write = full
        return file

    monkeypatch.setattr(Path, "open", on_a_full_disk)
    with pytest.raises(DataError, match=r"1\.txt: the caption cannot be written \(No space left on device\)"):
        write_new(bare / "1.txt", "new")
    assert files(bare) == {"0.txt": "mine"}


def test_a_caption_is_there_whole_or_not_at_all(bare, monkeypatch):
    def cut_off(file):
        assert file.read_text() == "new\n"
        assert not (bare / "1.txt").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr("sfumato.pipelines.caption.fsync_path", cut_off)
    with pytest.raises(KeyboardInterrupt):
        write_new(bare / "1.txt", "new")
    assert files(bare) == {"0.txt": "mine"}


def test_captions_are_written_where_a_file_system_has_no_links(bare, monkeypatch):
    def no_links(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    write_new(bare / "1.txt", "new")
    with pytest.raises(DataError, match=r"0\.txt: a caption appeared meanwhile"):
        write_new(bare / "0.txt", "new")
    assert files(bare) == {"0.txt": "mine", "1.txt": "new\n"}


def test_where_a_link_leads_nowhere_nothing_is_written(bare):
    (bare / "1.txt").symlink_to("elsewhere.txt")
    wanted, captioned, silent = pictures_without(bare)
    assert ([file.name for file in wanted], captioned, silent) == (["2.txt"], 1, ["1.txt"])


def test_of_pictures_that_share_a_caption_the_first_is_described(bare):
    noise_picture(seed=5).save(bare / "1.jpg")
    wanted, _, _ = pictures_without(bare)
    assert {file.name: found.path.name for file, found in wanted.items()} == {"1.txt": "1.jpg", "2.txt": "2.png"}


def test_the_words_of_a_folder_are_no_caption(bare):
    bare.rename(bare.with_name("10_sks dog"))
    wanted, captioned, silent = pictures_without(bare.parent)
    assert ([file.name for file in wanted], captioned, silent) == (["1.txt", "2.txt"], 1, [])


def test_a_data_set_is_named_as_a_folder_is_and_few_are_shown(blip, bare, capsys):
    data = bare.parent / "dataset.toml"
    data.write_text('[[source]]\npath = "bare"\n')
    assert main([str(data), str(blip), "--longest", "6", "--preview", "1"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("1.png: ")
    assert shown.out.count("\n") == 1
    assert "1 of 2 captions shown; --write writes them" in shown.err


def test_pictures_that_several_sources_name_count_once(bare):
    (bare / "2.txt").touch()
    data = bare.parent / "dataset.toml"
    ways = ("bare", "./bare", f"../{bare.parent.name}/bare")
    data.write_text("".join(f'[[source]]\npath = "{way}"\n' for way in ways))
    wanted, captioned, silent = pictures_without(data)
    assert ([file.name for file in wanted], captioned, silent) == (["1.txt"], 1, ["2.txt"])


def test_pictures_of_which_nothing_can_be_said_are_named_batch_by_batch(bare):
    (bare / "1.png").write_bytes(b"nothing")
    wanted, _, _ = pictures_without(bare)
    config, failed = Config(bare, "no model", batch=1, suffix="!"), []
    given = list(captions(list(wanted.values()), lambda pictures: ["a crab"] * len(pictures), config, failed))
    assert [(found.path.name, caption) for found, caption in given] == [("2.png", "a crab!")]
    assert [text.partition(":")[0] for text in failed] == ["1.png"]
    silent: list[str] = []
    assert not list(captions(list(wanted.values()), lambda pictures: [""] * len(pictures), config, silent))
    assert silent[1] == "2.png: the model said nothing about it."


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "0"], "--batch is 0; it must be at least 1."),
        (["--threshold", "0"], "--threshold is 0.0; it must be above 0 and at most 1."),
        (
            ["--write", "--preview", "2"],
            "--preview has no effect beside --write, which writes all captions; leave one out.",
        ),
        (["--character-threshold", "1.5"], "--character-threshold is 1.5; it must be above 0 and at most 1."),
    ],
)
def test_numbers_that_make_no_sense_are_one_line(words, said, bare):
    with pytest.raises(ConfigError) as caught:
        main([str(bare), "no model", *words])
    assert str(caught.value) == said


def test_a_folder_without_pictures_has_none_to_describe(tmp_path):
    with pytest.raises(DataError, match="no images in it"):
        main([str(tmp_path), "no model"])


def test_a_tagger_lists_characters_then_tags_by_certainty(tagger):
    green, red = (Image.new("RGB", (30, 20), colour) for colour in ((0, 255, 0), (255, 200, 100)))
    captioner = load_captioner(str(tagger), CPU, CaptionSettings())
    # A picture of 30 x 20 is a third white, as the tagger pads it.
    assert captioner([green])[0].split(", ") == ["green hair", "grass"]
    assert captioner([red]) == ["red man, >_<, green hair, grass"]
    assert load_captioner(str(tagger), CPU, CaptionSettings(without=("grass",)))([green]) == ["green hair"]
    assert load_captioner(str(tagger), CPU, CaptionSettings(threshold=0.9))([red]) == ["red man, >_<"]


def test_the_list_of_another_tagger_s_tags_is_refused(tagger, tmp_path):
    shutil.copytree(tagger, tmp_path / "tagger")
    with (tmp_path / "tagger/selected_tags.csv").open("a") as file:
        file.write("\n7,sea,0,0")
    with pytest.raises(FileError, match=r"selected_tags\.csv has 7 tags, model\.onnx gives 6;"):
        load_captioner(str(tmp_path / "tagger"), CPU, CaptionSettings())([noise_picture(seed=0)])
    (tmp_path / "tagger/selected_tags.csv").write_text("tag_id,name,category,count\n1")
    with pytest.raises(FileError, match=r"selected_tags\.csv: missing, or without the columns name and category"):
        load_captioner(str(tmp_path / "tagger"), CPU, CaptionSettings())


def test_a_tag_to_leave_out_may_be_spelt_as_danbooru_spells_it(tagger):
    red = Image.new("RGB", (30, 20), (255, 200, 100))
    captioner = load_captioner(str(tagger), CPU, CaptionSettings(without=("green_hair", ">_<")))
    assert captioner([red]) == ["red man, grass"]
    with pytest.raises(ConfigError, match=r"--without 'green hare': the tagger knows no such tag; .* 'green hair'\?"):
        load_captioner(str(tagger), CPU, CaptionSettings(without=("green hare",)))


def test_a_wish_of_no_effect_is_refused(tagger, blip, florence):
    with pytest.raises(ConfigError, match="--detail has no effect on a tagger; it is for florence2"):
        load_captioner(str(tagger), CPU, CaptionSettings(detail="short"))
    with pytest.raises(ConfigError, match="--longest has no effect on a tagger; it is for blip and florence2"):
        load_captioner(str(tagger), CPU, CaptionSettings(longest=20))
    with pytest.raises(ConfigError, match="--precision has no effect on a tagger; it is for blip and florence2"):
        load_captioner(str(tagger), CPU, CaptionSettings(precision="bf16"))
    with pytest.raises(ConfigError, match="--detail has no effect on blip"):
        load_captioner(str(blip), CPU, CaptionSettings(detail="short"))
    with pytest.raises(ConfigError, match="--without has no effect on florence2; it is for a tagger"):
        load_captioner(str(florence), CPU, CaptionSettings(without=("grass",)))


def test_a_tagger_computes_where_it_is_told(tagger):
    from sfumato.data.captioners import _providers

    there = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    assert _providers("auto", there) == there
    assert _providers("cpu", there) == there[1:]
    assert _providers("cuda:1", there) == [(there[0], {"device_id": "1"}), there[1]]
    assert load_captioner(str(tagger), CPU, CaptionSettings(device="cpu")).session.get_providers() == there[1:]
    with pytest.raises(ConfigError, match="--device mps: this onnxruntime has no CoreMLExecutionProvider"):
        _providers("mps", there)


def test_a_tagger_pads_to_a_white_square_in_bgr(tagger):
    captioner = load_captioner(str(tagger), CPU, CaptionSettings())
    pixels = captioner._pixels(Image.new("RGB", (16, 8), (255, 0, 0)))
    assert pixels.shape == (1, 8, 8, 3)
    assert pixels[0, 0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 4, 4].tolist() == [0, 0, 255]
    assert pixels.dtype == np.float32


def test_what_is_no_known_model_is_one_line(tmp_path, blip):
    with pytest.raises(ConfigError, match="neither a folder here nor a hub id"):
        load_captioner("no such place at all", CPU, CaptionSettings())
    with pytest.raises(ConfigError, match="hf download somebody/something"):
        load_captioner("somebody/something", CPU, CaptionSettings())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(FileError, match="'llama'; blip, florence2 and WD taggers"):
        load_captioner(str(tmp_path), CPU, CaptionSettings())
    (tmp_path / "config.json").write_text((blip / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(FileError, match="pickled weights are never opened"):
        load_captioner(str(tmp_path), CPU, CaptionSettings())


def test_a_sentence_becomes_a_caption():
    assert clean("A crab  on\na beach.</s>") == "A crab on a beach"
    assert clean("a crab<loc_3>on a beach") == "a crab on a beach"
    assert clean("One. Two.") == "One. Two."
    assert clean("\x03\x00 ") == ""


def test_a_folder_with_an_adapter_beside_the_model_is_refused(tmp_path, blip):
    """transformers would load the adapter, too, and from adapter_model.bin, a pickle, where there is nothing else."""
    shutil.copytree(blip, tmp_path / "blip")
    (tmp_path / "blip/adapter_config.json").write_text("{}")
    with pytest.raises(FileError, match=r"blip: holds a peft adapter \(adapter_config\.json\); name a folder without"):
        load_captioner(str(tmp_path / "blip"), CPU, CaptionSettings())


def test_no_program_of_a_models_folder_is_run(blip, monkeypatch):
    import transformers

    asked = []

    def refuse(*_, **options):
        asked.append(options["trust_remote_code"])
        raise ValueError("seen")

    for name in ("AutoProcessor", "AutoModelForImageTextToText"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
        with pytest.raises(FileError, match="seen"):
            load_captioner(str(blip), decide("fp32", device="cpu"), CaptionSettings())
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", lambda *_, **__: None)
    assert asked == [False, False]


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
def test_a_models_config_gets_no_program_from_the_hub(name, blip, tmp_path):
    model = changed(blip, tmp_path, {name: "someone/kernel"})
    captioner = load_captioner(str(model), CPU, CaptionSettings())
    assert captioner.model.config._attn_implementation in ("eager", "sdpa")


def test_a_model_that_wants_another_library_is_one_line(blip, tmp_path):
    model = changed(blip, tmp_path, {"quantization_config": {"quant_method": "aqlm"}})
    with pytest.raises(FileError, match=r"blip: the model cannot be loaded \(.*aqlm"):
        load_captioner(str(model), CPU, CaptionSettings())


def test_a_model_that_lacks_weights_is_refused_instead_of_filled_with_random_ones(blip, tmp_path):
    from safetensors.torch import load_file, save_file

    model = changed(blip, tmp_path, {})
    weights = load_file(model / "model.safetensors")
    first, second, *_ = sorted(weights)
    weights[second] = weights[second][:-1]
    save_file({name: weight for name, weight in weights.items() if name != first}, model / "model.safetensors")
    with pytest.raises(FileError, match=rf"blip: 2 weights of blip missing or of another shape, first {first}\. Down"):
        load_captioner(str(model), CPU, CaptionSettings())


def test_microsofts_own_florence_is_told_from_that_of_transformers(florence, tmp_path):
    model = changed(florence, tmp_path, {"text_config": {"model_type": "florence2_language"}})
    with pytest.raises(FileError, match=r"cannot be loaded .* knows is florence-community/Florence-2-base\.$"):
        load_captioner(str(model), CPU, CaptionSettings())


def test_a_caption_without_end_stops_where_the_model_has_no_more_positions(florence):
    (caption,) = load_captioner(str(florence), CPU, CaptionSettings(longest=200))([noise_picture(seed=0)])
    assert caption  # the positions are 128, and random weights say no end


def changed(model, tmp_path, settings):
    """A copy of the model, with these settings in its config."""
    folder = Path(shutil.copytree(model, tmp_path / "blip"))
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | settings))
    return folder


def test_a_models_config_nested_without_end_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("[" * 5000)
    with pytest.raises(FileError, match="missing or no JSON"):
        load_captioner(str(tmp_path), None, CaptionSettings())
