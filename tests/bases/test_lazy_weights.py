"""Parts of a base that rest: no memory, and the same results when something needs them again."""

import pytest
import torch

from sfumato.errors import FileError
from sfumato.models import load_base
from sfumato.models.folder import load_unet, load_vae
from sfumato.models.weights import LazyWeights
from tests.tiny import CPU, tiny_pipeline, tiny_pocket_folder, write_single_file


@pytest.fixture(params=["folder", "file"])
def base(request, sd1):
    return load_base(sd1.folder if request.param == "folder" else sd1.file, precision=CPU)


def meta(module):
    return {parameter.is_meta for parameter in module.parameters()}


def predict(base):
    text = base.encode_text(["a cat"])
    latents = base.encode_pixels(torch.linspace(-1, 1, 3 * 64 * 64).view(1, 3, 64, 64))[0]
    return base.predict(latents, torch.tensor([5]), text), base.decode(latents)


def test_what_rests_has_no_memory_and_comes_back_as_it_was(base):
    before = predict(base)
    base.lazy_weights.load_only()
    assert meta(base.unet) == meta(base.vae) == meta(base.text_encoders[0]) == {True}
    assert all(torch.equal(a, b) for a, b in zip(predict(base), before, strict=True))
    assert not any(p.requires_grad for module in (base.unet, base.vae) for p in module.parameters())


def test_a_base_without_its_unet_reads_it_for_the_first_prediction(base, sd1):
    shell = load_base(sd1.folder, precision=CPU, unet=False)
    assert (meta(shell.unet), meta(shell.vae)) == ({True}, {False})
    assert all(torch.equal(a, b) for a, b in zip(predict(shell), predict(base), strict=True))


def test_the_others_stay_and_hooks_too(base):
    seen = []
    base.text_encoders[0].get_input_embeddings().register_forward_hook(lambda *_: seen.append(1))
    base.lazy_weights.load_only("unet")
    assert (meta(base.unet), meta(base.text_encoders[0])) == ({False}, {True})
    base.encode_text(["a cat"])
    assert (seen, meta(base.text_encoders[0]), meta(base.vae)) == ([1], {False}, {True})


def test_an_interrupted_rest_goes_on(base):
    base.lazy_weights.load_only("unet")
    with base.lazy_weights.restored_after():
        base.encode_text(["a cat"])
        assert meta(base.text_encoders[0]) == {False}
    assert (meta(base.text_encoders[0]), meta(base.unet)) == ({True}, {False})


def test_a_pipeline_has_all_parts(base):
    base.lazy_weights.load_only()
    pipe = base.pipeline()
    assert meta(pipe.unet) == meta(pipe.vae) == meta(pipe.text_encoder) == {False}


def test_a_base_of_loose_modules_never_rests(tmp_path):
    import dataclasses

    whole = load_base(tiny_pocket_folder(tmp_path / "pocket"), precision=CPU)
    loose = dataclasses.replace(whole, files=(), lazy_weights=LazyWeights({}, lambda *_: None))
    loose.lazy_weights.load_only()
    assert meta(loose.vae) == {False}


def test_a_file_that_changed_meanwhile_is_refused(sd1, tmp_path):
    file = write_single_file(sd1.pipe, tmp_path / "a.safetensors")
    base = load_base(file, precision=CPU)
    base.lazy_weights.load_only("unet")
    write_single_file(sd1.pipe, file, metadata={"another": "training"})
    with pytest.raises(FileError, match="the file was replaced or written over while it was in use"):
        base.encode_text(["a cat"])


def test_another_fine_tune_with_the_same_header_is_refused(sd1, tmp_path):
    file = write_single_file(sd1.pipe, tmp_path / "a.safetensors")
    base = load_base(file, precision=CPU)
    base.lazy_weights.load_only("unet")
    other = write_single_file(tiny_pipeline("sd1", seed=1), tmp_path / "b.safetensors")
    assert file.read_bytes()[:1000] == other.read_bytes()[:1000]
    assert file.stat().st_size == other.stat().st_size
    other.replace(file)
    with pytest.raises(FileError, match=r"a\.safetensors: the file was replaced or written over while it was in use"):
        base.encode_text(["a cat"])


def test_each_part_is_placed_as_what_it_is(sd1):
    shells = {"unet": [load_unet(sd1.folder, torch.float32)], "vae": [load_vae(sd1.folder / "vae", torch.float32)]}
    placed = []
    lazy_weights = LazyWeights(shells, lambda module, part: placed.append((type(module).__name__, part)))
    lazy_weights.load("vae")
    lazy_weights.load("unet", "vae")
    assert placed == [("AutoencoderKL", "vae"), ("UNet2DConditionModel", "unet")]


def test_a_file_that_is_gone_is_named(sd1, tmp_path):
    file = write_single_file(sd1.pipe, tmp_path / "a.safetensors")
    base = load_base(file, precision=CPU)
    base.lazy_weights.load_only("unet")
    file.unlink()
    for ask in (base.lazy_weights.check_files, lambda: base.encode_text(["a cat"])):
        with pytest.raises(FileError, match=r"a\.safetensors: the file .* be read \(No such file or directory\)"):
            ask()
