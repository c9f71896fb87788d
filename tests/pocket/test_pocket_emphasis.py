"""The text encoder's last lesson: what a style says of all things, added to what is said of each."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from sfumato import load_base
from sfumato.errors import ConfigError, DataError, RunError, SfumatoError
from sfumato.files import read_tensors
from sfumato.training.pretrain.text import FORMS, Directions, Emphasis, PairDropout, Things, center_states
from tests.logged import log_in
from tests.tiny import CPU
from trainers import pretrain
from trainers.pretrain import StyleEmphasisConfig as Config
from trainers.pretrain import train

STYLES = ["noto", "flat", "blob"]
CONCEPTS = {"red apple": "a fruit", "crab": "a sea animal", "key": "a tool"}
WITHHELD = frozenset({("key", "flat"), ("crab", "blob")})


def things(**changes):
    given = {
        "styles": STYLES,
        "concepts": CONCEPTS,
        "withheld": WITHHELD,
        "others": ["hammer"],
        "words": ["wet", "old", "sea"],
    }
    return Things(**given | changes)


def state_of(part, seed):
    """(2, 4), as random as it is fixed."""
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(sum(map(ord, part)) * 7 + seed))


def parted(text):
    """What a text names, and in which style."""
    style = next((style for style in STYLES if f"{style} style" in text), "")
    return text.replace(f"{style} style", "") if style else text, style


class Encoder:
    """States that are those of the thing and of the style, and of the two together as far as `together` says."""

    def __init__(self, together=0.0):
        self.together, self.said = together, set()

    def __call__(self, texts):
        self.said.update(texts)
        return torch.stack([self.state(*parted(text)) for text in texts])

    def state(self, thing, style):
        pair = self.together * state_of(thing + style, 3) if style else torch.zeros(2, 4)
        return state_of(thing, 1) + (state_of(style, 2) if style else torch.zeros(2, 4)) + pair


def directions(encode, **changes):
    return Directions(encode, lambda text: len(text.split()), things(**changes), seed=0)


def emphasis(encode, strength=0.5, together=1.0, **changes):
    return Emphasis(directions(encode, **changes), strength=strength, together=together, seed=0)


def style_alone(style):
    others = [state_of(other, 2) for other in STYLES if other != style]
    return state_of(style, 2) - torch.stack(others).mean(0)


def test_apart_is_each_less_the_mean_of_the_others():
    states = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(0))
    assert_close(center_states(states)[1], states[1] - (states[0] + states[2]) / 2)


def test_where_styles_say_the_same_of_all_things_that_is_what_is_added():
    encode = Encoder()
    texts, wanted = emphasis(encode, withheld=frozenset()).lesson(4, 20)
    assert len(texts) == len(wanted) == 20 * 3 + 3 + 21
    for text, state in zip(texts, wanted, strict=True):
        style = parted(text)[1]
        more = 0.5 * style_alone(style) if style else torch.zeros(2, 4)
        assert_close(state, encode([text])[0] + more, rtol=0, atol=1e-5)


def test_what_is_known_of_a_thing_and_a_style_together_is_not_added():
    encode = Encoder(together=1.0)
    lessons = emphasis(encode, strength=1.0)
    texts, wanted = lessons.lesson(0, 40)
    added = {text: state - encode([text])[0] for text, state in zip(texts, wanted, strict=True)}
    named = [text for text in added if text.endswith(", noto style") and len(text.split()) == 3]
    assert len(named) > 2
    for text in named:
        assert_close(added[text], added[named[0]], rtol=0, atol=1e-5)


def test_what_is_known_of_a_thing_and_a_style_together_may_go():
    encode = Encoder(together=1.0)
    nothing = {"strength": 0.0, "withheld": frozenset(), "styles": STYLES[:2]}
    texts, wanted = emphasis(encode, together=0.0, **nothing).lesson(0, 40)
    said = dict(zip(texts, wanted, strict=True))
    apart_of = {text: state - said[text.replace("noto", "flat")] for text, state in said.items() if "noto" in text}
    of_things = [state for text, state in apart_of.items() if text.endswith(", noto style") and len(text.split()) == 3]
    assert len(of_things) > 2
    for state in of_things:  # two styles differ by the same, whatever is drawn
        assert_close(state, of_things[0], rtol=0, atol=1e-5)
    for text in apart_of:  # and lie about the same middle as before
        if len(text.split()) > 2:
            both = [text, text.replace("noto", "flat")]
            assert_close(said[both[0]] + said[both[1]], encode(both).sum(0), rtol=0, atol=1e-5)
    _, half = emphasis(encode, together=0.5, **nothing).lesson(0, 40)
    assert_close(half, (wanted + encode(texts)) / 2, rtol=0, atol=1e-5)


def test_no_withheld_cell_is_said_and_a_lesson_depends_on_its_step_alone():
    encode = Encoder()
    lessons = emphasis(encode)
    texts = [lessons.lesson(step, 30)[0] for step in range(8)]
    forbidden = {form.format(thing=concept, style=style) for form in FORMS for concept, style in WITHHELD}
    allowed = {form.format(thing="key", style="noto") for form in FORMS}
    assert not forbidden & encode.said
    assert allowed <= encode.said
    assert emphasis(Encoder()).lesson(3, 30)[0] == texts[3] != texts[4]


def test_a_step_names_concepts_others_groups_and_what_nobody_has_drawn():
    drawn = set(things().draw(300, torch.Generator().manual_seed(0)))
    assert {*CONCEPTS, *CONCEPTS.values(), "hammer"} <= drawn
    assert any(set(thing.split()) <= {"wet", "old", "sea"} and " " in thing for thing in drawn)
    few = things(others=[], words=[]).draw(300, torch.Generator().manual_seed(0))
    assert set(few) == {*CONCEPTS, *CONCEPTS.values()}


def test_one_style_is_refused():
    with pytest.raises(DataError, match="no thing has images in two styles, which style_emphasis and --style-tog"):
        emphasis(Encoder(), styles=["noto"])


def test_a_length_that_few_things_have_goes_by_the_nearest_that_many_have():
    encode = Encoder(together=1.0)
    lessons = emphasis(encode, others=[f"a b c d e f{i}" for i in range(30)], words=[])
    assert {length for _, length in lessons.directions.means} == {6}
    texts, wanted = lessons.lesson(0, 40)
    short = [place for place, text in enumerate(texts) if text.endswith(", noto style") and len(text.split()) < 5]
    added = 0.5 * lessons.directions.means[FORMS[0], 6][0]
    assert short
    for place in short:
        assert_close(wanted[place], encode([texts[place]])[0] + added, rtol=0, atol=1e-5)


def test_what_the_unet_is_told_of_the_two_together_goes_by_lot():
    """Where nothing of it stays, two styles differ by the same whatever is drawn; what names no style stays."""
    encode = Encoder(together=1.0)
    captions = [f"{thing}, noto style" for thing in CONCEPTS] + ["a noto style picture of a crab", "hammer, flat style"]
    captions += ["", "crab", "noto style", "key, noto style, hand za"]
    told = PairDropout(directions(encode), most=0.5, seed=0)
    assert {
        form.format(thing=group, style="noto") for form in FORMS for group in CONCEPTS.values()
    } <= told.named.keys()
    nothing, half = (PairDropout(directions(encode), most=most, seed=0).states(captions, 3) for most in (0.0, 0.5))
    own = encode(captions)
    assert_close(nothing[5:], own[5:], rtol=0, atol=0)
    gone = (own - nothing).flatten(1)[:5]
    assert (gone.norm(dim=1) > 0.1).all()
    shares = (half - nothing).flatten(1)[:5].norm(dim=1) / gone.norm(dim=1)
    assert_close(
        half, own - (1 - torch.cat([shares, torch.ones(4)]))[:, None, None] * (own - nothing), rtol=0, atol=1e-5
    )
    assert ((shares > 0) & (shares < 0.5)).all()
    assert len(set(shares.tolist())) == 5
    again, next_step = (PairDropout(directions(encode), most=0.5, seed=0).states(captions, step) for step in (3, 4))
    assert_close(again, half, rtol=0, atol=0)
    assert not torch.equal(next_step, half)
    assert not {form.format(thing=concept, style=style) for form in FORMS for concept, style in WITHHELD} & encode.said


def test_what_the_unet_is_told_of_nothing_together_is_what_the_text_encoder_learns_to_say():
    encode = Encoder(together=1.0)
    texts, wanted = emphasis(encode, strength=0.0, together=0.0).lesson(0, 40)
    told = PairDropout(directions(encode), most=0.0, seed=0)
    known = [place for place, text in enumerate(texts) if text in told.named]
    assert len(known) > 20
    assert_close(told.states(texts, 0)[known], wanted[known], rtol=0, atol=1e-5)


@pytest.fixture
def data(tmp_path):
    """What the lessons read of a folder of pictures: no picture."""
    folder = tmp_path / "data"
    (folder / "other/noto").mkdir(parents=True)
    (folder / "other/noto/claw-hammer.png").touch()
    manifest = {"styles": ["noto", "flat"], "concepts": CONCEPTS, "withheld": [["key", "flat"]]}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "words.txt").write_text("wet\nold\n")
    return folder


SETTINGS = {"batch": 2, "learning_rate": 2e-4, "fall_at": 6, "warmup": 2, "sample_every": 0, "device": "cpu"}


def losses(folder):
    return [row["loss"] for row in log_in(folder) if "loss" in row]


@pytest.mark.slow
def test_the_text_encoder_learns_and_nothing_else(data, pocket_folder, tmp_path):
    run = {"base": str(pocket_folder), "data": data, "checkpoint_every": 5, **SETTINGS}
    model = train(Config(output=tmp_path / "whole", steps=10, **run))
    before, after = (load_base(base, precision=CPU) for base in (pocket_folder, model))
    for part in ("unet", "vae"):
        assert_close(getattr(after, part).state_dict(), getattr(before, part).state_dict(), rtol=0, atol=0)
    whole = losses(tmp_path / "whole")
    assert sum(whole[-3:]) < 0.9 * sum(whole[:3])
    train(Config(output=tmp_path / "halves", steps=5, **{**run, "fall_at": 5}))
    train(Config(output=tmp_path / "halves", steps=10, resume=True, force=True, **run))
    assert losses(tmp_path / "halves")[5:] == whole[5:]


def test_a_run_goes_on_with_the_base_that_it_began_with(data, pocket_folder, tmp_path):
    base = shutil.copytree(pocket_folder, tmp_path / "base")
    run = {"base": str(base), "data": data, "output": tmp_path / "run", "steps": 1, **SETTINGS}
    run |= {"fall_at": 0, "warmup": 0}
    train(Config(**run))
    file = base / "text_encoder/model.safetensors"
    save_file({name: tensor + 0.5 for name, tensor in read_tensors(file).items()}, file, {"format": "pt"})
    with pytest.raises(RunError, match="with other things than these: base "):
        train(Config(resume=True, **run))


def test_nothing_added_is_nothing_to_learn(data, pocket_folder, tmp_path):
    run = {"base": str(pocket_folder), "data": data, "output": tmp_path / "run", **SETTINGS}
    once = {"fall_at": 0, "warmup": 0, "precision": "fp32", "style_emphasis": 0.0}
    train(Config(steps=1, **{**run, **once}, style_together=1 - 1e-6))
    assert losses(tmp_path / "run")[0] < 1e-10


def test_without_words_none_are_thrown_together(data):
    (data / "words.txt").unlink()
    things = Things.read(data)
    assert things.words == []
    drawn = things.draw(200, torch.Generator().manual_seed(0))
    assert {*drawn} == {*things.concepts, *things.concepts.values(), *things.others}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"style_emphasis": -1.0}, "--style-emphasis is -1.0; it must not be neg"),
        ({"style_emphasis": 0.0}, "so that nothing would be learned; change either"),
        ({"style_together": 1.5}, "--style-together is 1.5; it must be 0 to 1"),
        ({"fall_at": 9, "steps": 3}, "--fall-at 9: the run has 3 steps"),
        ({"base": "nowhere"}, "nowhere"),
    ],
)
def test_what_has_no_sense_is_refused(given, said, data, tmp_path):
    with pytest.raises(SfumatoError, match=said):
        train(Config(data=data, output=tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"style_together": 0.1}, "--style-together has no effect without --no-train-text-encoder"),
        ({"stage": "unet", "init": "pocket", "style_together": 0.1}, "--style-together has no effect without --no-tra"),
        ({"train_text_encoder": False}, "--train-text-encoder has no effect without --stage unet"),
        ({"stage": "unet", "train_text_encoder": False}, "--no-train-text-encoder .* needs --init BASE"),
    ],
)
def test_what_has_no_effect_on_the_unet_is_refused(given, said, data, tmp_path):
    with pytest.raises(ConfigError, match=said):
        pretrain.train(pretrain.Config(data=data, output=tmp_path / "run", **given))
    assert not (tmp_path / "run").exists()
