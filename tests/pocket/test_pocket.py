"""The pocket base as shipped: what it has seen, how it loads, that it repeats itself."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sfumato.models.base import public_config
from sfumato.training.pretrain.model import build_scheduler, build_text_encoder, build_unet, build_vae

POCKET = Path(__file__).parents[2] / "src" / "sfumato" / "models" / "pocket"
SUBJECTS = {
    *("accordion", "badger", "broccoli", "bubble-tea", "cupcake", "dodo", "donkey", "flamingo", "garlic", "giraffe"),
    *("hedgehog", "kangaroo", "kite", "llama", "magnet", "mango", "moose", "otter", "teddy-bear"),
}


@pytest.fixture(scope="module")
def manifest():
    return json.loads((POCKET / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def concepts():
    return json.loads((POCKET / "concepts.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pipeline():
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(POCKET, safety_checker=None, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_it_has_seen_four_styles_and_no_other(manifest):
    assert manifest["styles"] == ["noto", "twemoji", "flat", "blob"]
    assert list(manifest["sources"]) == manifest["styles"]


def test_its_named_pictures_are_its_concepts_in_its_styles(manifest, concepts):
    files = {f"{style}/{concept.replace(' ', '-')}.png" for style in manifest["styles"] for concept in concepts}
    assert manifest["sha256"].keys() == files


def test_its_other_drawings_are_in_its_styles_and_of_no_subject_or_withheld_picture(manifest):
    from bench.pocket_data import is_kept_for_subjects

    text = (POCKET / "others.txt").read_text(encoding="utf-8")
    found = dict(line.split() for line in text.splitlines())
    told = {"pictures": len(found), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    assert manifest["others"] == told
    assert {tuple(Path(name).parts[:2]) for name in found} == {("other", style) for style in manifest["styles"]}
    assert not [name for name in found if is_kept_for_subjects(Path(name).stem)]
    withheld = [f"{style}/{concept.replace(' ', '-')}.png" for concept, style in manifest["withheld"]]
    assert not {manifest["sha256"][name] for name in withheld} & set(found.values())


def test_it_knows_at_least_250_concepts_each_in_a_group(concepts):
    assert len(concepts) >= 250
    assert all(group.startswith(("a ", "an ")) for group in concepts.values())


def test_no_subject_kept_for_later_was_seen(manifest, concepts):
    assert set(manifest["kept_for_subjects"]) == SUBJECTS
    assert not SUBJECTS & {concept.replace(" ", "-") for concept in concepts}
    assert not SUBJECTS & {Path(name).stem for name in manifest["sha256"]}


def test_one_cell_in_ten_is_withheld_and_never_two_of_a_concept(manifest, concepts):
    withheld = [tuple(cell) for cell in manifest["withheld"]]
    assert len(withheld) == round(len(concepts) * 4 / 10)
    assert len({concept for concept, _ in withheld}) == len(withheld)


def test_the_withheld_cells_are_what_the_seed_says(manifest, concepts):
    from bench.pocket_data import withheld_cells

    expected = withheld_cells(list(concepts), manifest["styles"], manifest["seed"])
    assert {tuple(cell) for cell in manifest["withheld"]} == expected


def test_every_licence_is_permissive(manifest):
    licences = {style: source["licence"] for style, source in manifest["sources"].items()}
    assert licences == {"noto": "Apache-2.0", "twemoji": "CC-BY-4.0", "flat": "MIT", "blob": "Apache-2.0"}
    assert all(source["package"] in (POCKET / "ATTRIBUTION.md").read_text() for source in manifest["sources"].values())


def test_the_weights_are_half_precision_safetensors_of_at_most_32_mb():
    weights = [path for path in POCKET.rglob("*") if path.suffix in (".safetensors", ".bin", ".pt", ".ckpt")]
    assert {path.suffix for path in weights} == {".safetensors"}
    assert sum(path.stat().st_size for path in weights) <= 32_000_000
    for path in weights:
        with safe_open(path, "pt") as file:
            dtypes = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
        assert dtypes == {"F16"}, path.name


def test_no_config_says_where_it_was_made():
    assert not [path for path in POCKET.rglob("*.json") if "_name_or_path" in path.read_text(encoding="utf-8")]


def test_it_is_an_ordinary_stable_diffusion(pipeline):
    assert type(pipeline.unet).__name__ == "UNet2DConditionModel"
    assert type(pipeline.text_encoder).__name__ == "CLIPTextModel"
    assert pipeline.tokenizer.model_max_length == 77
    assert all("CrossAttn" in block for block in pipeline.unet.config.down_block_types)


def test_its_parts_are_those_that_its_trainer_builds(pipeline):
    built = {"vae": build_vae(), "unet": build_unet(), "scheduler": build_scheduler()}
    built["text_encoder"] = build_text_encoder(pipeline.tokenizer)
    for name, part in built.items():
        shipped, own = (json.loads(public_config(each)) for each in (getattr(pipeline, name), part))
        learned_or_told = {"scaling_factor", "dtype", "architectures"}
        assert {key for key in shipped.keys() | own.keys() if shipped.get(key) != own.get(key)} <= learned_or_told


def test_any_text_tokenizes_and_comes_back(pipeline):
    tokens = pipeline.tokenizer("Ünïcode 🙂 zwx").input_ids
    assert pipeline.tokenizer.decode(tokens, skip_special_tokens=True).strip() == "ünïcode 🙂 zwx"


def test_a_prompt_and_a_seed_give_the_same_bytes_twice(pipeline):
    def draw():
        return pipeline(
            "a crab, noto style", num_inference_steps=4, generator=torch.Generator().manual_seed(7), output_type="np"
        ).images

    first, second = (hashlib.sha256(draw().tobytes()).hexdigest() for _ in range(2))
    assert first == second
    assert draw().shape == (1, 64, 64, 3)


def test_the_class_of_a_concept_can_be_asked_for_by_a_word_the_tokenizer_knows(pipeline, concepts):
    words = {word for text in (*concepts, *concepts.values()) for word in text.split()}
    split = {word for word in words if len(pipeline.tokenizer(word).input_ids) != 3}
    assert split == set()
