"""Whether two adapters are one, told from a few numbers a module."""

from dataclasses import replace

import pytest
import torch

from sfumato.errors import FileError
from sfumato.files.changes import LoraModule
from sfumato.files.fingerprint import KEY, PROBES, check, compare, fingerprint, rows
from sfumato.files.header import read_header
from sfumato.files.lora_file import read_lora
from sfumato.files.write import write_lora
from sfumato.files.write_dotted import write_diffusers


@pytest.fixture
def modules(tiny, lora):
    return lora(tiny("sd1").layers())


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("write", [write_lora, write_diffusers])
def test_it_survives_dtypes_and_dialects(dtype, error, write, modules, tmp_path):
    found = read_lora(write(tmp_path / "a.safetensors", modules, family="sd1", dtype=dtype))
    comparison = check(found.metadata[KEY], found.modules, "a")
    assert comparison.same()
    assert comparison.rms < error


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_it_takes_little_of_the_metadata(family, tiny, lora):
    modules = lora(tiny(family).layers())
    assert len(fingerprint(modules)) < 20 + 4 / 3 * 4 * (1 + PROBES) * len(modules) + 4 < 25_000


def test_one_module_in_a_thousand_that_differs_is_named(modules):
    target = list(modules)[100]
    changed = modules | {target: replace(modules[target], up=-modules[target].up)}
    comparison = check(fingerprint(modules), changed, "a")
    assert not comparison.same()
    assert comparison.module.endswith(target[1].removeprefix("text_model."))


def test_a_few_hundredths_more_are_another_adapter(modules):
    stronger = {target: replace(module, alpha=1.03 * module.alpha) for target, module in modules.items()}
    comparison = compare(rows(modules), rows(stronger))
    assert comparison.rms == pytest.approx(0.03 / 1.03, rel=0.3)
    assert not comparison.same()


def test_the_probes_see_the_size_of_an_error(modules):
    draws = torch.Generator().manual_seed(3)
    noisy = {
        target: replace(module, down=module.down + 0.1 * torch.randn(module.down.shape, generator=draws))
        for target, module in modules.items()
    }
    error = [float((noisy[t].delta() - modules[t].delta()).norm() / modules[t].delta().norm()) ** 2 for t in modules]
    true = (sum(error) / len(error)) ** 0.5
    assert compare(rows(modules), rows(noisy)).rms == pytest.approx(true, rel=0.2)


def test_another_split_of_the_same_delta_is_the_same(two_modules):
    turn = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
    other = {
        target: replace(module, up=module.up @ turn, down=torch.linalg.inv(turn) @ module.down)
        for target, module in two_modules.items()
    }
    assert compare(rows(two_modules), rows(other)).rms < 1e-6


def test_a_delta_is_seen_as_its_factors_are(two_modules):
    dense = {target: module.delta() for target, module in two_modules.items()}
    assert compare(rows(two_modules), rows(dense)).rms < 1e-6


def test_missing_and_new_modules_are_counted(two_modules):
    first, second = two_modules
    comparison = compare(rows({first: two_modules[first]}), rows({second: two_modules[second]}))
    assert (len(comparison.missing), len(comparison.extra)) == (1, 1)
    assert "1 modules are missing and 1 are new" in comparison.reason()
    with pytest.raises(FileError, match="is of 2 modules, the file has 1"):
        check(fingerprint(two_modules), {first: two_modules[first]}, "a")


@pytest.mark.parametrize("text", ["", "1:abc", "2:0:AAAA", "1:00:!!!", "1:00:AAAA", "1:00:" + "AADAfw" * 4])
def test_a_broken_fingerprint_is_an_error(text, two_modules):
    with pytest.raises(FileError, match="fingerprint is not readable"):
        check(text, two_modules, "a")


def test_a_module_of_nothing_is_the_same_as_itself(two_modules):
    target = next(iter(two_modules))
    nothing = two_modules | {target: LoraModule(torch.zeros(2, 768), torch.zeros(4, 2), 2.0)}
    assert compare(rows(nothing), rows(nothing)).rms == 0
    assert not compare(rows(nothing), rows(two_modules)).same()


def test_it_is_of_what_was_trained_and_not_of_the_rounded_file(two_modules, tmp_path):
    path = write_lora(tmp_path / "a.safetensors", two_modules, family="sd1", dtype=torch.bfloat16)
    assert read_header(path).metadata[KEY] == fingerprint(two_modules)
