"""`DiffusionPipeline.from_pretrained(..., custom_pipeline=FILE)`: an existing script whose prompts name adapters."""

import importlib
import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from PIL import Image

from sfumato import Adapter, cli, compose
from sfumato.adapters.embeddings import embedding
from sfumato.compose.per_image import per_picture
from sfumato.compose.regions import Region, regions
from sfumato.errors import AdapterError, ConfigError
from sfumato.files.adapter_file import read_adapter
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.embedding import write_embedding
from sfumato.files.writing.kohya import write_lora
from sfumato.files.writing.peft import write_peft
from sfumato.generation.draw import Start, draw
from tests.bundles import add_words

FILES = cli.source("sfumato.pipelines.custom").parent


@pytest.fixture(scope="module", params=["sd1", pytest.param("sdxl", marks=pytest.mark.slow)])
def pipe(request, family_folder, tmp_path_factory):
    """A pipeline of the family, loaded as a script would, with line.safetensors in its folder of adapters."""
    family = request.param
    folder = family_folder(family)
    file = FILES / ("stable_diffusion_xl.py" if family == "sdxl" else "stable_diffusion.py")
    loaded = DiffusionPipeline.from_pretrained(folder, custom_pipeline=str(file), trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    loaded.came_from = folder
    loaded.lora_folder = tmp_path_factory.mktemp("loras")
    generator = torch.Generator().manual_seed(0)
    for name, layer in loaded.unet.named_modules():
        if name.endswith("attn2.to_v"):
            out, inner = layer.weight.shape
            down, up = torch.randn(2, inner, generator=generator), torch.randn(out, 2, generator=generator)
            write_lora(
                loaded.lora_folder / "line.safetensors", {("unet", name): LoraModule(down, up, 20.0)}, family=family
            )
            break
    return loaded


def drawn(pipe, prompt, **options):
    noise = torch.Generator().manual_seed(3)
    return np.asarray(pipe(prompt, num_inference_steps=2, generator=noise, **options).images[0], dtype=int)


def test_a_tag_applies_an_adapter_for_one_call(pipe):
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    plain = drawn(pipe, "a crab")
    tagged = drawn(pipe, "a crab <lora:line:1>")
    assert abs(plain - tagged).max() > 0
    assert np.array_equal(tagged, drawn(pipe, "a crab", adapters={"line": 1.0}))
    assert all(torch.equal(value, before[name]) for name, value in pipe.unet.state_dict().items())


def test_a_folder_of_pefts_is_found_by_tag_and_by_path(pipe):
    line = read_adapter(pipe.lora_folder / "line.safetensors")
    modules = {target: change for target, change in line.changes.items() if isinstance(change, LoraModule)}
    family = "sdxl" if hasattr(pipe, "text_encoder_2") else "sd1"
    folder = write_peft(pipe.lora_folder / "folder", modules, family=family)
    wanted = drawn(pipe, "a crab <lora:line:1>")
    assert abs(drawn(pipe, "a crab <lora:folder:1>") - wanted).max() <= 1
    assert abs(drawn(pipe, "a crab", adapters={str(folder): 1.0}) - wanted).max() <= 1
    shutil.rmtree(folder)


def test_a_tags_own_weight_goes_before_that_of_the_call(pipe):
    wanted = drawn(pipe, "a crab <lora:line:1>")
    assert np.array_equal(drawn(pipe, "a crab <lora:line:1>", adapters={"line": 0.0}), wanted)
    assert not np.array_equal(drawn(pipe, "a crab", adapters={"line": 0.0}), wanted)


def test_a_whole_model_is_an_adapter_of_a_call(pipe):
    """A share of the pipeline's own folder is the pipeline."""
    shared = drawn(pipe, "a crab", adapters={str(pipe.came_from): 0.5})
    assert np.array_equal(shared, drawn(pipe, "a crab"))


def test_a_mix_stays_and_tags_are_added_to_it_for_the_call(pipe):
    wanted = drawn(pipe, "a crab <lora:line:1>")
    with compose(pipe, Adapter(pipe.lora_folder / "line.safetensors", 0.75, name="mine")) as mix:
        before = drawn(pipe, "a crab")
        assert abs(drawn(pipe, "a crab <lora:line:0.25>") - wanted).max() <= 1
        assert mix.weights == {"mine": 0.75}
        assert np.array_equal(drawn(pipe, "a crab"), before)
    assert not np.array_equal(before, wanted)


def test_a_file_from_a_mac_is_found_by_its_name(pipe):
    apart = pipe.lora_folder / "cafe\u0301.safetensors"
    shutil.copy(pipe.lora_folder / "line.safetensors", apart)
    composed = drawn(pipe, "a crab <lora:caf\u00e9:1>")
    apart.unlink()
    assert np.array_equal(composed, drawn(pipe, "a crab <lora:line:1>"))


def test_without_tags_it_is_the_pipeline_it_was(pipe):
    assert np.array_equal(drawn(pipe, "a crab"), drawn(pipe, ["a crab"]))


def test_prompts_of_one_call_may_name_different_adapters(pipe):
    prompts = ["a crab <lora:line:1>", "an owl", "a crab <lora:line:0.5>"]
    noise = [torch.Generator().manual_seed(3) for _ in prompts]
    together = pipe(prompts, num_inference_steps=2, generator=noise).images
    for prompt, picture in zip(prompts, together, strict=True):
        assert abs(np.asarray(picture, dtype=int) - drawn(pipe, prompt)).max() <= 1
    with pytest.raises(AdapterError, match="one image each"):
        pipe(prompts, num_inference_steps=1, num_images_per_prompt=2, generator=noise[0])


def test_the_class_itself_takes_no_argument_more(pipe):
    """For those who would not write trust_remote_code=True: an import, and the class's own from_pretrained."""
    xl, suffix = ("XL", "_xl") if "XL" in type(pipe).__name__ else ("", "")
    module = importlib.import_module(f"sfumato.pipelines.custom.stable_diffusion{suffix}")
    own = getattr(module, f"MixingStableDiffusion{xl}Pipeline").from_pretrained(pipe.came_from)
    own.set_progress_bar_config(disable=True)
    own.lora_folder = pipe.lora_folder
    assert np.array_equal(drawn(own, "a crab <lora:line:1>"), drawn(pipe, "a crab <lora:line:1>"))


@pytest.mark.parametrize("mask", [None, Image.new("L", (64, 64), 255)])
def test_tags_are_read_where_a_picture_is_begun_from_too(pipe, mask):
    """The tagged prompt draws what the adapter composed into the same weights draws."""
    start = Start(Image.new("RGB", (64, 64), "red"), 0.8, mask)
    plain, tagged = draw(pipe, ["a crab", "a crab <lora:line:1>"], 3, steps=2, start=start)
    with compose(pipe, Adapter(pipe.lora_folder / "line.safetensors", 1.0)):
        composed = draw(pipe, "a crab", 3, steps=2, start=start)[0]
    assert abs(np.asarray(tagged, dtype=int) - np.asarray(composed, dtype=int)).max() <= 1
    assert plain.tobytes() != tagged.tobytes()


def test_words_that_an_adapter_brings_are_known_for_the_call(pipe, capsys):
    """Those of one of weight 0 are not; with adapters by picture as well. Where they are not known, it is told."""
    widths = {part: getattr(pipe, part).config.hidden_size for part in ("text_encoder", "text_encoder_2")
              if getattr(pipe, part, None) is not None}  # fmt: skip
    rows = {part: torch.randn(2, width, generator=torch.Generator().manual_seed(1)) for part, width in widths.items()}
    fox = pipe.lora_folder / "fox.safetensors"
    shutil.copy(pipe.lora_folder / "line.safetensors", fox)
    add_words(fox, {"<fox>": rows})
    word = write_embedding(pipe.lora_folder.parent / "word.safetensors", "<fox>", rows)
    with embedding.load(pipe, word):
        known = drawn(pipe, "a <fox> <lora:line:1>")
    assert np.array_equal(drawn(pipe, "a <fox> <lora:fox:1>"), known)
    assert not np.array_equal(drawn(pipe, "a <fox> <lora:fox:0> <lora:line:1>"), known)
    noise = [torch.Generator().manual_seed(3) for _ in range(2)]
    both = pipe(["a crab", "a <fox> <lora:fox:1>"], num_inference_steps=2, generator=noise).images
    assert abs(np.asarray(both[1], dtype=int) - known).max() <= 1
    adapter = Adapter(fox, (1.0, 0.0))
    for loaded, count in ((nullcontext, 2), (lambda: embedding.load(pipe, word), 0)):
        capsys.readouterr()
        with loaded(), per_picture(pipe, [[adapter], []]), regions(pipe, Region((0, 0, 1, 1), adapter)):
            assert capsys.readouterr().err.count("fox: brings the words <fox>, which are left out") == count
    fox.unlink()
    word.unlink()


def test_a_saved_one_is_plain_diffusers_own_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    plain = DiffusionPipeline.from_pretrained(tmp_path)
    plain.set_progress_bar_config(disable=True)
    assert type(plain).__module__.startswith("diffusers.pipelines.")
    assert np.array_equal(drawn(plain, "a crab"), drawn(pipe, "a crab"))
    assert "Img2Img" in type(AutoPipelineForImage2Image.from_pipe(pipe)).__name__


@pytest.mark.parametrize("negative", ["blurry <lora:line:1>", ["blurry <lora:line:1>"]])
def test_a_tag_in_another_text_than_the_prompt_is_refused(pipe, negative):
    prompt = "a crab" if isinstance(negative, str) else ["a crab"]
    with pytest.raises(ConfigError, match=r"<lora:line:\.\.\.> is read in `prompt` alone"):
        pipe(prompt, negative_prompt=negative, num_inference_steps=1)


def test_adapters_of_a_call_have_weights(pipe):
    with pytest.raises(ConfigError, match=r"adapters=\['line'\]: wanted weights by file or name"):
        pipe("a crab", adapters=["line"], num_inference_steps=1)


def test_an_adapter_that_is_not_there_is_said(pipe):
    with pytest.raises(ConfigError, match="<lora:otter>"):
        pipe("a crab <lora:otter:1>", num_inference_steps=1)
    with pytest.raises(ConfigError, match=r"<lora:x+>: no file is called that"):
        pipe(f"a crab <lora:{'x' * 300}:1>", num_inference_steps=1)
