"""The family of a file, as its metadata say it and as its text widths tell it."""

import pytest

from sfumato.files.metadata import family_from_metadata, family_from_widths


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({}, None),
        ({"ss_base_model_version": "sd_v1"}, "sd1"),
        ({"ss_base_model_version": "sd_v2_v"}, "sd2"),
        ({"ss_base_model_version": "sdxl_base_v0-9"}, "sdxl"),
        ({"ss_base_model_version": "sd_v2_other"}, "sd2"),
        ({"ss_base_model_version": "sd_v1_other"}, "sd1"),
        ({"ss_base_model_version": "sfumato_pocket"}, "pocket"),
        ({"ss_base_model_version": "flux"}, None),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "sd2"),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/textual-inversion"}, "sdxl"),
        ({"modelspec.architecture": "flux"}, None),
        ({"ss_v2": "True"}, "sd2"),
        ({"ss_v2": "False"}, None),
    ],
)
def test_the_family_that_the_metadata_say(metadata, family):
    assert family_from_metadata(metadata) == family


def test_the_family_that_the_widths_tell():
    assert [family_from_widths([width, width]) for width in (768, 1024, 2048, 96)] == ["sd1", "sd2", "sdxl", None]
    assert family_from_widths([768, 2048]) is None
    assert family_from_widths([]) is None
    assert family_from_widths([], second_encoder=True) == "sdxl"
    assert family_from_widths([96], second_encoder=True) is None
