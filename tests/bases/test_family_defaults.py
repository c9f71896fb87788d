"""What each family of bases is drawn and learned with, unless something else is asked for."""

import pytest

from sfumato.models.family import FAMILIES


@pytest.mark.parametrize(
    ("family", "learned", "drawn"),
    [
        ("pocket", (6e-4, 0.0, 16, 240, 8), (64, "dpm++", 12)),
        ("sd1", (1e-4, 5.0, 16, 800, 4), (512, "dpm++", 30)),
        ("sd2", (1e-4, 5.0, 16, 800, 4), (512, "dpm++", 30)),
        ("sdxl", (1e-4, 5.0, 16, 800, 2), (1024, "euler", 30)),
    ],
)
def test_each_family_has_its_own_defaults(family, learned, drawn):
    own = FAMILIES[family].defaults
    assert (own.learning_rate, own.min_snr, own.rank, own.steps, own.batch) == learned
    assert (own.resolution, own.sampler, own.sampling_steps) == drawn


@pytest.mark.parametrize(("family", "guidance"), [("sd1", 7.5), ("sd2", 7.5), ("sdxl", 6.0)])
def test_guidance_is_that_of_the_published_pipelines(family, guidance):
    assert FAMILIES[family].defaults.guidance == guidance
