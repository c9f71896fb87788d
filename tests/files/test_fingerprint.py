"""Whether two adapters are one, told from a few numbers a module."""

from dataclasses import replace

import pytest
import torch

from sfumato.errors import FileError
from sfumato.files.adapter_file import read_lora
from sfumato.files.fingerprint import (
    FINGERPRINT_KEY,
    PROBES,
    Comparison,
    check_rows,
    compare,
    fingerprint,
    probe_rows,
    verify,
)
from sfumato.files.header import read_header
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from sfumato.files.writing.peft import write_diffusers
from tests.files.said import TO_K, said


@pytest.fixture
def modules(tiny, lora):
    return lora(tiny("sd1").layers())


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 6e-3)])
@pytest.mark.parametrize("write", [write_lora, write_diffusers])
def test_it_survives_dtypes_and_dialects(dtype, error, write, modules, tmp_path):
    found = read_lora(write(tmp_path / "a.safetensors", modules, family="sd1", dtype=dtype))
    comparison = check_rows(found.metadata[FINGERPRINT_KEY], probe_rows(found.modules), "a")
    assert comparison.same()
    assert comparison.rms < error


@pytest.mark.parametrize("half", ["down", "up"])
@pytest.mark.parametrize("write", [write_lora, write_diffusers])
def test_a_few_steps_survive_fp16(write, half, modules, tmp_path):
    """Prodigy's first steps leave 1e-6 and less in B, which fp16 would round by a hundredth and more, or to nothing."""
    small = {key: replace(module, **{half: getattr(module, half) * 1e-8}) for key, module in modules.items()}
    small |= {key: replace(module, up=module.up * 0) for key, module in list(small.items())[:1]}  # not trained at all
    found = read_lora(write(tmp_path / "a.safetensors", small, family="sd1", dtype=torch.float16))
    comparison = check_rows(found.metadata[FINGERPRINT_KEY], probe_rows(found.modules), "a")
    assert comparison.same()
    assert comparison.rms < 1e-3


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_it_takes_little_of_the_metadata(family, tiny, lora):
    modules = lora(tiny(family).layers())
    assert len(fingerprint(modules)) < 20 + 4 / 3 * 4 * (1 + PROBES) * len(modules) + 4 < 25_000


def test_a_change_that_fp32_cannot_hold_has_none():
    module = LoraModule(torch.full((1, 2), 1e38), torch.full((2, 1), 1e38), 1.0)
    with pytest.raises(FileError, match=r"unet\.conv_in: its change has the norm 2e\+76, more than fp32 holds"):
        fingerprint({("unet", "conv_in"): module})


def test_one_module_in_a_thousand_that_differs_is_named(modules):
    target = list(modules)[100]
    changed = modules | {target: replace(modules[target], up=-modules[target].up)}
    comparison = check_rows(fingerprint(modules), probe_rows(changed), "a")
    assert not comparison.same()
    assert comparison.module.endswith(target[1].removeprefix("text_model."))


def test_a_few_hundredths_more_are_another_adapter(modules):
    stronger = {target: replace(module, alpha=1.03 * module.alpha) for target, module in modules.items()}
    comparison = compare(probe_rows(modules), probe_rows(stronger))
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
    assert compare(probe_rows(modules), probe_rows(noisy)).rms == pytest.approx(true, rel=0.2)


def test_another_split_of_the_same_delta_is_the_same(two_modules):
    turn = torch.tensor([[0.0, 2.0], [-1.0, 0.0]])
    other = {
        target: replace(module, up=module.up @ turn, down=torch.linalg.inv(turn) @ module.down)
        for target, module in two_modules.items()
    }
    assert compare(probe_rows(two_modules), probe_rows(other)).rms < 1e-6


def test_a_delta_is_seen_as_its_factors_are(two_modules):
    dense = {target: module.delta() for target, module in two_modules.items()}
    assert compare(probe_rows(two_modules), probe_rows(dense)).rms < 1e-6


def test_missing_and_new_modules_are_counted(two_modules):
    first, second = two_modules
    comparison = compare(probe_rows({first: two_modules[first]}), probe_rows({second: two_modules[second]}))
    assert (len(comparison.missing), len(comparison.extra)) == (1, 1)
    assert "1 module missing and 1 new" in comparison.reason()
    with pytest.raises(FileError, match="is of 2 modules, the file has 1"):
        check_rows(fingerprint(two_modules), probe_rows({first: two_modules[first]}), "a")


@pytest.mark.parametrize("text", ["", "1:abc", "2:0:AAAA", "1:00:!!!", "1:00:AAAA", "1:00:" + "AADAfw" * 4])
def test_a_broken_fingerprint_is_an_error(text, two_modules):
    with pytest.raises(FileError, match="fingerprint is not readable"):
        check_rows(text, probe_rows(two_modules), "a")


def test_a_module_of_nothing_is_the_same_as_itself(two_modules):
    target = next(iter(two_modules))
    nothing = two_modules | {target: LoraModule(torch.zeros(2, 768), torch.zeros(4, 2), 2.0)}
    assert compare(probe_rows(nothing), probe_rows(nothing)).rms == 0
    assert not compare(probe_rows(nothing), probe_rows(two_modules)).same()


def test_it_is_of_what_was_trained_and_not_of_the_rounded_file(two_modules, tmp_path):
    path = write_lora(tmp_path / "a.safetensors", two_modules, family="sd1", dtype=torch.bfloat16)
    assert read_header(path).metadata[FINGERPRINT_KEY] == fingerprint(two_modules)


def test_what_a_fingerprint_says(two_modules):
    metadata = {"sfumato.fingerprint": fingerprint(two_modules)}
    verify(metadata, two_modules, "a")
    assert said(verify, {}, two_modules, "a") == (
        "a: it states no fingerprint, so it cannot be verified. Leave verify out for it."
    )
    half = {TO_K: two_modules[TO_K]}
    assert said(verify, metadata, half, "a") == (
        "a: its fingerprint is of 2 modules, the file has 1, not the same ones. Modules were added or taken out after "
        "it was written."
    )
    for text in ("", "1", "2" + metadata["sfumato.fingerprint"][1:], "1:x:AAAA", "1:x:" + "/" * 64):
        assert said(check_rows, text, two_modules, "a") == (
            "a: its fingerprint is not readable by this version; compare with --against the source."
        )
    twice = {target: replace(module, alpha=2 * module.alpha) for target, module in two_modules.items()}
    assert said(verify, metadata, twice, "a").startswith("a: it is not the adapter that was written: relative error 0.")


def test_how_far_apart_two_are():
    first = {"a": (3.0, 1.0, 0.0, 2.0), "b": (4.0, 0.0, 1.0, 0.0)}
    assert compare(first, first) == Comparison(0.0, 0.0, "a")
    second = {"a": (3.0, 1.0, 0.0, 2.0), "b": (4.0, 0.0, 1.0, 3.0)}
    apart = (9 / 3) / 16
    found = compare(first, second)
    assert (found.rms, found.worst, found.module) == pytest.approx((apart**0.5 / 2**0.5, apart**0.5, found.module))
    assert found.module == "b"
    assert compare({"a": (3.0, 0, 0, 0)}, {"a": (5.0, 0, 0, 0)}).rms == pytest.approx(2 / 5)
    gone = compare({"a": first["a"], "c": first["b"]}, {"a": first["a"], "d": first["b"]})
    assert (gone.missing, gone.extra, gone.rms) == (("c",), ("d",), 0.0)
    assert compare({"a": first["a"]}, {}) == Comparison(float("inf"), float("inf"), "", ("a",), ())
    tiny = compare({"a": (1e-9, 0, 0, 0), "b": (1.0, 0, 0, 0)}, {"a": (2e-9, 0, 0, 0), "b": (1.0, 0, 0, 0)})
    assert tiny.worst == pytest.approx(1e-9 / (1e-3 * 0.5**0.5), rel=1e-6)
    assert compare({"a": (0.0, 0, 0, 0)}, {"a": (0.0, 0, 0, 0)}).same()


def test_what_is_the_same_and_why_it_is_not():
    assert Comparison(0.01, 0.1, "m").same()
    assert not Comparison(0.0101, 0.1, "m").same()
    assert not Comparison(0.01, 0.101, "m").same()
    assert not Comparison(0.0, 0.0, "m", ("x",)).same()
    assert not Comparison(0.0, 0.0, "m", (), ("x",)).same()
    assert Comparison(0.05, 0.1, "m").same(0.05)
    assert Comparison(0.0123, 0.456, "m").reason() == (
        "relative error 0.012 over all modules, 0.46 in m; at most 0.01 and 0.1 are rounding"
    )
    assert Comparison(0.0, 0.0, "m", (), ("x", "y")).reason() == "0 modules missing and 2 new, first x"
    assert Comparison(0.0, 0.0, "m", ("z",), ("x",)).reason() == "1 module missing and 1 new, first z"


def test_a_fingerprint_is_of_names_in_order(two_modules):
    text = fingerprint(two_modules)
    version, digest, numbers = text.split(":")
    assert (version, len(digest), len(numbers)) == ("1", 16, 44)  # two modules of four fp32 in base64
    assert fingerprint(dict(reversed(two_modules.items()))) == text
