"""Which picture is shown with which caption, and what is asked for."""

import torch
from torch.testing import assert_close

from sfumato.models.diffusion import add_noise, crossing_noise, prediction_target
from sfumato.training.pretrain.batches import FARTHEST, PretrainBatches, Shares, hand_name
from sfumato.training.pretrain.dataset import VARIANTS, Move, Pictures, batch_indices, find_partners


def test_an_epoch_shows_every_picture_once():
    assert sorted(i for step in range(5) for i in batch_indices(step, 4, 20, seed=0)) == list(range(20))


NAMES = [("crab", "noto"), ("crab", "flat"), ("key", "noto"), ("heart", "flat"), ("heart", "noto")]


def lessons(**given):
    usual = dict.fromkeys(("flip", "group", "plain", "empty", "others", "varied", "crossed", "moved", "hands"), 0.0)
    shares = Shares(**{**usual, "crossed_from": 300, "moved_below": 600, **given})
    partners = find_partners(Pictures(torch.zeros(5, 3, 8, 8, dtype=torch.uint8), NAMES))
    return PretrainBatches(NAMES, 3, {"crab": "an animal", "key": "a tool"}, shares, 0, partners)


def test_a_name_alone_is_said_of_the_drawing_in_the_plain_style_or_of_the_first_where_that_is_withheld():
    steps = [lessons(plain=0.5, plain_style="flat", others=0.4).at(step, torch.zeros(5)) for step in range(20)]
    shown = {(text, asked) for step in steps for text, asked in zip(step.captions, step.asked, strict=True)}
    assert {(text, asked) for text, asked in shown if text in ("crab", "key")} == {("crab", 1), ("key", 2)}
    assert {("crab, noto style", 0), ("crab, flat style", 1), ("heart, flat style", 3)} <= shown
    assert all(step.seen == step.asked for step in steps)


def test_partners_show_the_thing_in_another_style_where_it_lies():
    pixels = torch.full((5, 3, 8, 8), 255, dtype=torch.uint8)
    for index, (first, last) in enumerate([(0, 4), (0, 5), (0, 4), (0, 3), (4, 8)]):
        pixels[index, index % 3, first:last] = 200
    pictures = Pictures(pixels, NAMES)
    assert find_partners(pictures) == [[1], [0], [], [4], [3]]
    assert find_partners(pictures, 0.8) == [[1], [0], [], [], []]
    assert find_partners(pictures, 0.81) == [[], [], [], [], []]


def test_a_crossed_picture_is_asked_for_where_another_style_shows_the_thing():
    steps = [lessons(crossed=1.0, others=0.4).at(step, torch.tensor([999, 999, 300, 299, 999])) for step in range(20)]
    texts = set()
    for step in steps:
        for place, (asked, seen, text) in enumerate(zip(step.asked, step.seen, step.captions, strict=True)):
            (what, style), (there, other) = NAMES[asked], NAMES[seen]
            if place == 3 or what == "key":  # too little noise, and a thing in one style alone
                assert seen == asked
            else:
                assert there == what
                assert other != style
                texts.add(text.replace(what, "THING").replace(style, "STYLE"))
    assert texts == {"THING, STYLE style", "STYLE style"}


def test_a_varied_picture_says_so_and_a_plain_one_says_nothing():
    lesson = lessons(varied=0.5).at(0, torch.zeros(64))
    said = {text.removeprefix("crab, ").removeprefix("key, ") for text in lesson.captions}
    assert len(set(lesson.variants)) > 6
    for variant, text in zip(lesson.variants, lesson.captions, strict=True):
        words = VARIANTS[variant].words
        assert text.endswith(words) if words else not text.endswith(("colors", "mirrored"))
    assert any("bgr colors, mirrored" in text for text in said)
    assert {*lessons(varied=1.0, empty=1.0).at(0, torch.zeros(64)).captions} <= {v.words for v in VARIANTS[1:]}


def test_a_picture_by_another_hand_names_it_and_shows_the_same_thing():
    plain, by_hand = (lessons(hands=share, empty=0.2).at(0, torch.zeros(400)) for share in (0.0, 0.6))
    assert plain.hands == {}
    assert by_hand.asked == by_hand.seen == plain.asked
    assert 0.5 < len(by_hand.hands) / 400 < 0.7
    assert len(set(by_hand.hands.values())) > 60
    for place, (before, text) in enumerate(zip(plain.captions, by_hand.captions, strict=True)):
        name = f"hand {hand_name(by_hand.hands[place])}" if place in by_hand.hands else ""
        assert text == ", ".join(part for part in (before, name) if part)


def test_pictures_are_moved_at_little_noise_alone_and_captions_do_not_tell():
    timesteps = torch.tensor([0, 599, 600, 999] * 16)
    still, moved = (lessons(moved=share).at(0, timesteps) for share in (0.0, 1.0))
    assert still.moves == {}
    assert sorted(moved.moves) == [place for place in range(64) if place % 4 < 2]
    assert (moved.asked, moved.captions) == (still.asked, still.captions)
    assert {move.turns for move in moved.moves.values()} == {0, 1, 2, 3}
    assert max(abs(move.down) for move in moved.moves.values()) <= FARTHEST
    assert lessons(moved=0.5).at(0, timesteps).moves.keys() < moved.moves.keys()


def test_a_move_turns_and_shifts_and_fills_with_white():
    picture = torch.arange(12, dtype=torch.uint8).view(1, 3, 4).expand(3, 3, 4)
    assert torch.equal(Move(0, 0, 0).of(picture), picture)
    assert Move(0, 1, -2).of(picture)[0].tolist() == [[255] * 4, [2, 3, 255, 255], [6, 7, 255, 255]]
    assert Move(1, 0, 0).of(picture)[0].tolist() == [[3, 7, 11], [2, 6, 10], [1, 5, 9], [0, 4, 8]]
    assert Move(2, 0, 9).of(picture).eq(255).all()


def test_crossing_noise_makes_others_of_what_is_asked_for():
    generator = torch.Generator().manual_seed(0)
    asked, seen, noise = (torch.randn(3, 4, 8, 8, generator=generator) for _ in range(3))
    alpha_bar = torch.tensor([0.1, 0.5, 0.9])
    crossing = crossing_noise(asked, seen, noise, alpha_bar)
    noisy = add_noise(asked, crossing, alpha_bar)
    assert_close(noisy, add_noise(seen, noise, alpha_bar))
    # Whoever predicts the target, of either type, has predicted what is asked for.
    a = alpha_bar.view(-1, 1, 1, 1)
    assert_close(
        a.sqrt() * noisy - (1 - a).sqrt() * prediction_target("v_prediction", asked, crossing, alpha_bar), asked
    )
    assert_close((noisy - (1 - a).sqrt() * prediction_target("epsilon", asked, crossing, alpha_bar)) / a.sqrt(), asked)
