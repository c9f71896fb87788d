"""What of its captions DreamBooth embeds before the loop: exactly those that the loop will draw, for every prior."""

import shutil
from dataclasses import dataclass, field

import pytest
import torch

from sfumato import cli, data
from sfumato.data import Dataset
from sfumato.data.preparation.texts import CaptionEmbeddings
from sfumato.models import load_base
from sfumato.runs.processes import MicroBatch
from sfumato.training.loss.prior import BasePrediction
from tests.logged import log_in
from tests.tiny import CPU

pytestmark = pytest.mark.usefixtures("quick")
STEPS, BATCH = 5, 2
TAGS = "red, large, old, wet"


@dataclass
class Seen:
    """Of one data set: captions embedded beforehand, captions whose embeddings batches hold, all captions drawn."""

    embedded: set[str] = field(default_factory=set)
    given: set[str] = field(default_factory=set)
    drawn: set[str] = field(default_factory=set)


@pytest.fixture
def seen(monkeypatch):
    """Watches every data set, in the order in which they were prepared."""
    found: dict[int, Seen] = {}
    kept = []  # so that no number of an object comes twice
    batch, embed = Dataset.batch, CaptionEmbeddings.compute

    def look(data_set, *place, embed_text=True):
        made = batch(data_set, *place, embed_text=embed_text)
        of = found.setdefault(id(data_set._texts), Seen()) if data_set._texts else found.setdefault(0, Seen())
        of.drawn.update(made.captions)
        of.given.update(made.captions if made.text is not None else [])
        return made

    def note(texts, prompts, *others, **how):
        kept.append(texts)
        prompts = list(prompts)
        found.setdefault(id(texts), Seen()).embedded.update(prompts)
        return embed(texts, prompts, *others, **how)

    monkeypatch.setattr(Dataset, "batch", look)
    monkeypatch.setattr(CaptionEmbeddings, "compute", note)
    return found


@pytest.fixture
def train(pocket_folder, pictures, tmp_path):
    """Train an adapter on pictures whose captions are tags that are dropped and change places, and so for the class."""
    for name, first in (("subject", "zwx square"), ("class", "square")):
        shutil.copytree(pictures, tmp_path / name)
        for file in (tmp_path / name).glob("*.png"):
            file.with_suffix(".txt").write_text(f"{first}, {TAGS}")

    def run(*options):
        words = ["--images", tmp_path / "subject", "--class-name", "square"]
        words += ["--output", tmp_path / "run", "--base", pocket_folder]
        words += ["--identifier", "zwx", "--method", "lora", "--rank", "2", "--steps", STEPS, "--batch", BATCH]
        words += ["--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "0"]
        words += ["--shuffle-tags", "--keep-tags", "1", "--tag-dropout", "0.4", "--caption-dropout", "0.3", *options]
        assert cli.main(["train", "dreambooth", "--prior-prompts", "", *map(str, words)]) == 0

    return run


def exactly(one: Seen) -> None:
    """ "" is always there; guidance needs it."""
    assert one.embedded - {""} == one.given - {""}
    assert len(one.embedded) > 2


def test_without_a_prior_the_subjects_captions_are_embedded(train, seen):
    train("--prior", "none")
    (subject,) = seen.values()
    exactly(subject)
    assert "" in subject.given


@pytest.mark.slow
def test_with_pictures_both_sets_have_theirs_by_their_own_seeds(train, seen, tmp_path):
    train("--prior", "pictures", "--class-images", tmp_path / "class")
    subject, of_class = seen.values()
    exactly(subject)
    exactly(of_class)
    assert all("zwx" not in caption for caption in of_class.embedded)
    assert "" not in of_class.given


@pytest.mark.slow
def test_beside_the_base_s_predictions_nothing_is_embedded_but_the_subjects_own_captions(train, seen):
    train("--prior", "base")
    (subject,) = seen.values()
    exactly(subject)
    assert subject.drawn == subject.given, "the class half noises the subject's own draws"


def test_pictures_that_are_only_noised_need_no_captions(train, seen, tmp_path):
    train("--prior", "base", "--class-images", tmp_path / "class")
    assert 0 in seen, "the class set has no embeddings"
    assert seen.pop(0).given == set()
    (subject,) = seen.values()
    exactly(subject)


@pytest.mark.slow
@pytest.mark.parametrize("prior", ["none", "pictures", "base"])
def test_captions_that_an_encoder_learns_from_are_not_embedded(prior, train, seen, tmp_path):
    given = () if prior == "none" else ("--class-images", tmp_path / "class")
    train("--prior", prior, "--train-text-encoder", *given)
    assert all(not one.embedded and not one.given for one in seen.values())


def test_the_class_half_holds_its_prompts_embeddings_if_asked(pocket_folder, pictures):
    base = load_base(str(pocket_folder), precision=CPU)
    bare = data.prepare(data.read_folder(pictures, caption_template="x"), base, resolution=64, embed_text=False)
    half = BasePrediction(base, bare, ["cat", "red"], 0, pristine=torch.no_grad).draw(MicroBatch(0, 2, 0, 2))
    assert torch.equal(half.batch.text.hidden, base.encode_text(half.batch.captions).hidden)
    without = BasePrediction(base, bare, ["cat", "red"], 0, pristine=torch.no_grad, embed_text=False)
    again = without.draw(MicroBatch(0, 2, 0, 2))
    assert again.batch.text is None
    assert torch.equal(again.target, half.target)


@pytest.mark.slow
def test_sdxls_zeros_for_no_prompt_are_learned_with_and_without_the_text_encoders(pictures, family_folder, tmp_path):
    """Nothing has been learned before the first step, so that its loss says what a dropped caption was encoded as."""
    losses = []
    for name, more in (("cached", []), ("encoded", ["--train-text-encoder"])):
        words = ["--images", pictures, "--output", tmp_path / name, "--base", family_folder("sdxl")]
        words += ["--class-name", "square"]
        words += ["--prior", "none", "--method", "lora", "--rank", "1", "--targets", "cross-attention", "--steps", "1"]
        words += ["--batch", "2", "--resolution", "64", "--caption-dropout", "0.99", "--sample-every", "0"]
        words += ["--measure-every", "0", "--checkpoint-every", "0", "--precision", "fp32", *more]
        assert cli.main(["train", "dreambooth", "--prior-prompts", "", *map(str, words)]) == 0
        losses.append(log_in(tmp_path / name)[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
