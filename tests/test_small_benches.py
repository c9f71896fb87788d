"""The benches that learn and draw, whole, on a tiny base and plain squares: their figures mean nothing, they add up."""

import ast
import dataclasses
import importlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from bench import (
    adapter_kinds,
    beside_others,
    dreambooth_memory,
    emoji_data,
    forecast,
    forecast_time,
    full_size,
    new_words,
    optimizer_steps,
    pocket_data,
    pocket_drawing,
    pocket_export,
    prior,
    reconstruction,
    style_fidelity,
    style_runs,
    style_sheet,
    vs_diffusers,
)
from bench.mutation import NOT_PLACED, Loop, Mutant, scored, together, wilson
from bench.real import BASE_CONCEPTS, cells_of, known_concepts, print_report, styles_of
from sfumato.config import parse
from sfumato.errors import ConfigError, DataError
from sfumato.models.loading import POCKET_FOLDER
from sfumato.training import finish

CONCEPTS = list(json.loads(BASE_CONCEPTS.read_text()))[:6]


@pytest.fixture
def data(tmp_path):
    """Six of the base's concepts and one that it does not know, in three styles."""
    for s, style in enumerate(("flat", "noto", "twemoji")):
        (tmp_path / "data" / style).mkdir(parents=True)
        for c, concept in enumerate([*CONCEPTS, "zither"]):
            picture = Image.new("RGB", (64, 64), "white")
            picture.paste((s * 40, c * 30, 99), (10, 10, 50, 50))
            picture.save(tmp_path / "data" / style / f"{concept.replace(' ', '-')}.png")
    return tmp_path / "data"


@pytest.fixture
def made(monkeypatch):
    """Forbids learning and drawing, once it is called."""

    def forbid():
        def fail(*args, **kwargs):
            raise AssertionError("made again")

        monkeypatch.setattr(style_runs.cli, "main", fail)
        monkeypatch.setattr(style_runs, "draw_against", fail)

    return forbid


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_prior_bench_runs_and_makes_nothing_twice(method, data, pocket_folder, made, tmp_path):
    config = prior.Config(
        data=data, method=method, options=("steps=1", "batch=1", "class-count=1"), subjects=1, styles=("flat",),
        hands=("noto", "twemoji"), unrelated=2, seeds=1, base=str(pocket_folder), work=tmp_path / "work", judge_steps=1,
        cache=tmp_path / "judge", sheet=tmp_path / "sheet.png",
    )  # fmt: skip
    report = prior.measure(config)
    assert [report[kind]["pictures"] for kind in ("class", "unrelated", "both")] == [2, 2, 4]
    assert report["runs"][0].keys() == {"subject", "base", "with", "without"}
    assert report["judge_alike_on_withheld_real"]["pictures"] == 3 * len(CONCEPTS) // 10
    assert config.sheet.exists()
    made()
    assert prior.measure(config) == report


def test_what_the_prior_keeps_is_told_of_both_kinds_together_and_over_subjects():
    """One subject loses half of its class without the prior, the other half of what is unrelated."""
    right, half = torch.ones(2), torch.tensor([1.0, 0.0])
    kept = {"class": right, "unrelated": torch.ones(4)}
    first = {"base": kept, "with": kept, "without": {**kept, "class": half}}
    second = {"base": kept, "with": kept, "without": {**kept, "unrelated": torch.cat([half, half])}}
    report = prior.summary([first, second])
    assert report["class"]["with_minus_without_95"] == [0.0, 0.5]
    assert report["both"]["without"] == 0.75
    assert report["both"]["with_minus_without_95"] == pytest.approx([1 / 6, 1 / 3], abs=1e-4)
    assert report["goals"] == {
        "at most 0.05 under the base": {"class": True, "unrelated": True, "both": True},
        "above the run without, beyond the interval": {"class": False, "unrelated": False, "both": True},
    }


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_the_style_bench_runs_and_makes_nothing_twice(data, pocket_folder, made, tmp_path):
    config = style_fidelity.Config(
        data=data, styles=("flat",), seeds=1, concepts=2, images=2, base=str(pocket_folder), judge_steps=1,
        style_options=("steps=1", "batch=1"), cache=tmp_path / "judge", work=tmp_path / "work",
    )  # fmt: skip
    report = style_fidelity.measure(config)
    assert report["concepts"] == len(CONCEPTS)
    assert report["all"]["pictures"] == 2
    (run,) = report["styles"]["flat"]
    assert report["all"]["style_of_real"] == run["real"]["style"]
    assert report["all"]["style_of_reconstruction"] == run["reconstruction"]["style"]
    made()
    assert style_fidelity.measure(config) == report
    sheet = style_sheet.Config(
        data=data, styles=("flat",), columns=1, concepts=2, images=2, base=str(pocket_folder), work=tmp_path / "work",
        style_options=("steps=1", "batch=1"), out=tmp_path / "styles.png",
    )  # fmt: skip
    with Image.open(style_sheet.make_sheet(sheet)) as drawn:
        assert drawn.height > 3 * 128  # the base, what was learned, what is true


def test_cells_are_all_pictures_or_those_of_the_named_styles(data):
    (data / "other" / "flat").mkdir(parents=True)
    assert styles_of(cells_of(data)) == ("flat", "noto", "twemoji")
    assert styles_of(cells_of(data, ("noto",))) == ("noto",)
    assert known_concepts(cells_of(data)) == CONCEPTS
    (data / "noto" / f"{CONCEPTS[0].replace(' ', '-')}.png").unlink()
    assert known_concepts(cells_of(data)) == CONCEPTS[1:]


def test_a_folder_of_odds_and_ends_takes_no_concept_from_the_styles(data):
    config = style_fidelity.Config(data=data, styles=("flat",), images=2, concepts=2)
    before, _ = style_fidelity.read_real(config)
    (data / "sketch").mkdir()
    shutil.copy(data / "flat" / f"{CONCEPTS[0].replace(' ', '-')}.png", data / "sketch")
    found, _ = style_fidelity.read_real(config)
    assert (found.concepts, found.styles) == (before.concepts, before.styles)
    asked, _ = style_fidelity.read_real(dataclasses.replace(config, styles=("flat", "sketch")))
    assert asked.concepts == (CONCEPTS[0],)


def test_a_style_without_pictures_is_named(data, tmp_path):
    with pytest.raises(DataError, match="blob holds no"):
        cells_of(data, ("noto", "blob"))
    with pytest.raises(DataError, match="holds no folder of pictures"):
        cells_of(tmp_path / "nowhere")


def test_the_report_is_printed_and_written(tmp_path, capsys, data):
    words = ["--data", str(data), "--out", str(tmp_path / "report.json")]
    print_report(prior.Config, lambda config: {"data": config.data.name}, words, "prior")
    assert json.loads(capsys.readouterr().out) == {"data": "data"}
    assert json.loads((tmp_path / "report.json").read_text()) == {"data": "data"}


def test_a_mutant_stands_in_the_function_s_place_and_shows_its_lines():
    def original(a, b=1):
        return a + b

    before, after = (
        ast.parse(text).body[0]
        for text in ("def f(a, b=1):\n return a + b", "def x_f__mutmut_1(a, b=2):\n return a - b")
    )
    mutant = Mutant("f", original, before, after)
    assert original(5) == 6
    mutant.put_in_place()
    assert original(5) == 3
    assert mutant.lines() == ["-a, b=1", "-return a + b", "+a, b=2", "+return a - b"]


def test_a_mutant_that_cannot_take_the_function_s_place_is_no_killed_one():
    found = scored(["killed", "timeout", "survived", "not tested", NOT_PLACED, NOT_PLACED])
    assert (found["sampled"], found["killed"], found[NOT_PLACED], found["score"]) == (6, 1, 2, 0.5)
    assert found["interval"] == wilson(2, 4)
    assert scored([NOT_PLACED])["score"] == 0


def test_a_function_with_names_of_its_surroundings_is_judged_by_no_test():
    outer = 1

    def original():
        return outer

    node = ast.parse("def f():\n return 2").body[0]
    loop = object.__new__(Loop)
    loop._calls = {original.__code__: [(0.0, None)]}
    assert loop._try(Mutant("f", original, node, node)) == NOT_PLACED


def test_wilson_s_interval_is_the_published_one():
    """Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662, 15 of 148 is 0.0624 to 0.1605, 0 of 20 to 0.1611."""
    assert wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=6e-4)
    assert wilson(15, 148) == pytest.approx([0.0624, 0.1605], abs=6e-4)
    assert wilson(0, 20) == pytest.approx([0.0, 0.1611], abs=6e-4)
    assert wilson(0, 0) == [0, 1]


def test_packages_weigh_as_much_as_they_have_mutants():
    assert together({"a": {"score": 1.0, "mutants": 300}, "b": {"score": 0.6, "mutants": 100}}) == 0.9


def test_the_reconstruction_bench_measures_every_set_with_every_vae(data, tmp_path):
    vaes = (POCKET_FOLDER / "vae",) * 2
    config = reconstruction.Config(folders=(data, data / "flat"), vaes=vaes, pictures=8)
    of_all, of_flat = reconstruction.measure(config)["sets"].values()
    assert (of_all["pictures"], of_flat["pictures"]) == (8, 7)
    assert of_flat["psnr_db"][0] == of_flat["psnr_db"][1] > 15
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty holds no picture; give --folders"):
        reconstruction.measure(reconstruction.Config(folders=(tmp_path / "empty",), vaes=vaes))
    with pytest.raises(ConfigError, match="nothing to reconstruct; give --folders or --packages"):
        reconstruction.measure(reconstruction.Config())


def test_sides_take_turns_at_being_first_after_a_round_that_is_not_measured():
    calls = []
    sides = {name: lambda name=name: calls.append(name) or len(calls) for name in "ab"}
    seconds, made = pocket_drawing.in_turns(sides, 2)
    assert "".join(calls) == "abbaab"
    assert (set(seconds), made) == ({"a", "b"}, {"a": 5, "b": 6})


def test_the_kinds_are_beside_a_lora_of_the_same_round():
    """A machine that is half as fast in the second round changes no ratio."""
    loras, others = ([{"numbers": 3, "step_s": s, "kept_gib": 1, "fall": f} for s in (1.0, 2.0)] for f in (2.0, 1.0))
    slower = [row | {"step_s": 1.5 * row["step_s"]} for row in others]
    assert adapter_kinds.together(loras, loras)["step_ratio"] == 1
    found = adapter_kinds.together(slower, loras)
    assert (found["step_s"], found["step_ratio"], found["fall"]) == (2.25, 1.5, 0.5)


def test_what_writes_a_trainer_s_result_is_left_out_of_what_is_watched(monkeypatch):
    for trainer in ("lora", "textual_inversion", "dreambooth", "finetune"):
        module = importlib.import_module(f"sfumato.trainers.{trainer}")
        writer, name = (finish, "finish_adapter") if trainer == "lora" else (module, "save")
        monkeypatch.setattr(writer, name, getattr(writer, name))  # put back afterwards
        assert full_size._ours(trainer) is module.main
        assert getattr(writer, name)("anything", anything=1) is None
    monkeypatch.delattr(module, "save")
    with pytest.raises(AssertionError, match="has no save"):
        full_size._ours("finetune")


def test_rows_are_unclipped_where_their_name_says_so():
    for name, chosen in dreambooth_memory.COMBINATIONS.items():
        assert ("unclipped" in name) == (chosen.get("clip") == 0)
        assert ("fused" in name) == bool(chosen.get("fused"))


def test_every_way_of_dreambooth_is_one_that_the_trainer_takes(tmp_path):
    from sfumato.trainers.dreambooth import Config, check

    shared = {"images": tmp_path, "output": tmp_path / "run", "class-name": "thing", "prior": "none"}
    for chosen in dreambooth_memory.COMBINATIONS.values():
        config = parse(Config, full_size.options({**shared, "precision": "fp32", **chosen}), program="train dreambooth")
        assert config.precision == "fp32"
        check(config)


def test_a_combination_that_there_is_not_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match="--only 'full,fused': wanted one of full; full, checkpointing; "):
        dreambooth_memory.measure(dreambooth_memory.Config(work=tmp_path / "work", only=("full,fused",)))
    assert not (tmp_path / "work").exists()


@pytest.mark.slow
def test_a_training_that_fails_is_in_the_report_of_the_forecast(monkeypatch, pocket_folder, tmp_path):
    monkeypatch.setattr(forecast, "build", lambda folder: pocket_folder)
    monkeypatch.setattr(forecast, "run", lambda name, *_: {"name": name, "error": "no room"})
    report = forecast.measure(forecast.Config(work=tmp_path, only=("lora --targets cross-attention",), resolution=64))
    assert report["rows"]["lora --targets cross-attention"]["error"] == "no room"
    assert report["rows"]["lora --targets cross-attention"].keys() == {"told_gib", "error"}


@pytest.mark.parametrize("method", vs_diffusers.SCRIPTS)
def test_both_sides_of_every_method_have_options_a_goal_and_a_floor(method):
    places = (Path("base"), Path("pictures"), Path("out"), 256, 3)
    precomputed = "--pre_compute_text_embeddings" in vs_diffusers.theirs(method, *places)
    assert precomputed == (method == vs_diffusers.PRECOMPUTED)
    assert "--images" in vs_diffusers.ours(method, "base", *places[1:])
    assert vs_diffusers.GOALS.keys() == vs_diffusers.FLOPS.keys() == vs_diffusers.SCRIPTS.keys()


def test_a_prompt_encoded_beforehand_is_beside_the_plain_dreambooth():
    places = (Path("pictures"), Path("out"), 256, 3)
    plain, beside = (vs_diffusers.ours(name, "base", *places) for name in ("dreambooth", vs_diffusers.PRECOMPUTED))
    assert plain == beside


def test_the_floor_is_taken_on_as_many_threads_as_the_trainings():
    before = torch.get_num_threads()
    with vs_diffusers.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before


def test_their_figures_are_told_in_multiples_of_ours():
    theirs, ours = ({"state_bytes": b, "optimizer_cpu_ms": t} for b, t in ((3000, 2.5), (10, 0.01)))
    assert new_words.over(theirs, {**ours, "file_bytes": 5}) == {"state_bytes": 300, "optimizer_cpu_ms": 250}


def test_an_optimizers_part_of_a_step_is_its_time_beside_the_unets(pocket_folder, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)  # which would stay
    report = optimizer_steps.measure(optimizer_steps.Config(base=str(pocket_folder), steps=1))
    assert report["optimizers"]["adamw"]["state_bytes"] == 8 * report["trained"]
    assert report["optimizers"]["muon"]["state_bytes"] == 4 * report["trained"]
    for each in report["optimizers"].values():
        assert each["share_of_step"] == pytest.approx(
            each["cpu_ms"] / (each["cpu_ms"] + report["unet_cpu_ms"]), abs=0.1
        )


@pytest.mark.slow
def test_torchs_fake_tensors_tell_what_ours_tell(pocket_folder):
    report = forecast_time.measure(forecast_time.Config(base=str(pocket_folder), rank=4))
    assert len(report["ways"]) == 7  # each once, whatever optimizer
    for each in report["ways"].values():
        assert each["bytes"] == pytest.approx(each["fake_bytes"], rel=1e-2)  # a small base's mask is no small part
        assert each["ratio"] == pytest.approx(each["cpu_s"] / each["fake_cpu_s"], rel=0.1)
    assert report["ratio"] > 0


@pytest.mark.slow
def test_the_drawing_bench_draws_what_diffusers_draws():
    report = pocket_drawing.measure(pocket_drawing.Config(steps=(2,), at_once=(2,), rounds=1))
    assert report["loading"].keys() == {"sfumato", "diffusers", "ratio"}
    assert report["2 steps, 2 at once"]["levels"] <= 1
    with pytest.raises(ConfigError, match="--at-once"):
        pocket_drawing.measure(pocket_drawing.Config(at_once=(0,)))
    with pytest.raises(ConfigError, match="--steps"):
        pocket_drawing.measure(pocket_drawing.Config(steps=()))


@pytest.mark.slow
def test_the_bench_beside_other_programs_ends_them_and_measures_both_sides():
    report = beside_others.measure(beside_others.Config(pictures=1, steps=1, rounds=1))
    for where in ("alone", "beside 1 busy"):
        assert set(report[where]) == {*beside_others.SIDES, "ratio"}
        assert all(value > 0 for value in report[where].values())
    with pytest.raises(ConfigError, match="--busy is 0"):
        beside_others.measure(beside_others.Config(busy=0))


def test_busy_programs_end_with_the_block():
    with beside_others.busy_programs(1) as processes:
        assert processes[0].poll() is None
    assert processes[0].returncode is not None


def test_so_many_pictures_are_taken_evenly():
    assert reconstruction.spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert reconstruction.spread(range(3), 5) == [0, 1, 2]


def test_sets_of_one_name_stand_side_by_side(data):
    other = data.parent / "other" / "flat"
    other.mkdir(parents=True)
    Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(other / "nothing.png")  # on white, which is rebuilt well
    config = reconstruction.Config(folders=(data / "flat", other), vaes=(POCKET_FOLDER / "vae",), pictures=2)
    found = reconstruction.measure(config)["sets"]
    assert list(found) == [(data / "flat").as_posix(), other.as_posix()]
    assert [each["pictures"] for each in found.values()] == [2, 1]
    assert found[other.as_posix()]["psnr_db"][0] > 30
    with pytest.raises(ConfigError, match=r"--size 62: .*vae takes multiples of 4 px"):
        reconstruction.measure(dataclasses.replace(config, size=62))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"seeds": 0}, "--seeds is 0"),
        ({"concepts": 1}, "--concepts is 1; it must be at least 2"),
        ({"styles": ("oil",)}, "--styles oil: .* has flat, noto, twemoji"),
        ({"images": 5}, "6 of the base's concepts .* wanted --images 5 and --concepts 2 others"),
        ({"mix_with": ("otter",)}, "--mix-with names subjects of a folder"),
        ({"subjects": Path("nowhere")}, "nowhere holds no SUBJECT/STYLE.png"),
    ],
)
def test_the_style_bench_refuses_wrong_use_before_anything_is_learned(changed, said, data, made, tmp_path):
    config = style_fidelity.Config(data=data, styles=("flat",), concepts=2, images=2, work=tmp_path / "work")
    made()
    with pytest.raises((ConfigError, DataError), match=said):
        style_fidelity.measure(dataclasses.replace(config, **changed))
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("option", ["subjects", "unrelated", "seeds"])
def test_the_prior_bench_wants_something_to_draw(option, data):
    with pytest.raises(ConfigError, match=f"--{option} is 0; it must be at least 1"):
        prior.measure(prior.Config(data=data, **{option: 0}))


def test_the_package_s_base_is_not_replaced_where_the_manifest_is_another_s(data, pocket_folder, tmp_path):
    (data / "manifest.json").write_text(json.dumps({"styles": ["flat"], "concepts": {"crab": "an animal"}}))
    with pytest.raises(DataError, match='no "sources" of flat'):
        pocket_export.export(pocket_export.Config(model=pocket_folder, data=data, out=tmp_path / "pocket"))
    assert not (tmp_path / "pocket").exists()


def test_no_subject_and_no_withheld_picture_is_among_what_the_base_sees(monkeypatch, tmp_path):
    styles, concepts = list(pocket_data.SOURCES), json.loads(BASE_CONCEPTS.read_text())
    names = [concept.replace(" ", "-") for concept in concepts]
    withheld = sorted(pocket_data.withheld_cells(list(concepts), styles, 0))
    hidden = next(concept.replace(" ", "-") for concept, style in withheld if style == "flat")
    icons = {name: {} for name in [*names, "twin", "zither", "otter", "llama-face", "flag-chad"]}
    monkeypatch.setattr(pocket_data, "fetch", lambda source, _: {"icons": icons, "of": source.package})
    twins = {"twin": hidden}  # a drawing under a second name
    monkeypatch.setattr(pocket_data, "render", lambda icons, name, _: f"{icons['of']} {twins.get(name, name)}".encode())
    folder = pocket_data.build(pocket_data.Config(out=tmp_path / "built"))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    others = {f"other/{style}/zither.png" for style in styles}
    others |= {f"other/{style}/twin.png" for style in styles if style != "flat"}
    assert files == others | {f"{style}/{name}.png" for style in styles for name in names}
    words = (folder / "words.txt").read_text().split()
    assert "zither" in words
    (folder / "other/flat/own.png").write_bytes(b"somebody's own")
    pocket_data.build(pocket_data.Config(out=folder, others=False))  # what was built before is learned from no more
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*.png")}
    assert left == files - others | {"other/flat/own.png"}
    with pytest.raises(ConfigError, match="--size-px is 0; it must be at least 1"):
        pocket_data.build(pocket_data.Config(out=folder, size_px=0))
    assert not {"otter", "llama"} & {*words}


def test_benches_draw_concepts_in_every_style_that_has_them_and_subjects_apart(monkeypatch, tmp_path):
    icons = {"crab": {}, "pizza": {}, "otter": {}}
    sets = {style: {"icons": icons} for style in emoji_data.STYLES}
    sets["blob"] = {"icons": {"pizza": {}}, "aliases": {"crab": {"parent": "pizza", "hFlip": True}}}
    styles = {source.package: style for style, source in emoji_data.STYLES.items()}
    monkeypatch.setattr(emoji_data, "fetch", lambda source, _: sets[styles[source.package]])
    monkeypatch.setattr(emoji_data, "render", lambda icons, name, *_: name.encode())
    folder = emoji_data.build(emoji_data.Config(out=tmp_path / "emoji"))
    drawn = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.png")}
    cells = [(name, style) for name in ("crab", "pizza") for style in sets if (name, style) != ("crab", "blob")]
    wanted = {f"pictures/{style}/{name}.png": name for name, style in cells}
    wanted |= {f"subjects/otter/{style}.png": "otter" for style in emoji_data.OF_SUBJECTS}
    assert drawn == wanted
    monkeypatch.setattr(emoji_data, "FURTHER", {"further": emoji_data.STYLES["glossy"]})
    more = emoji_data.build(emoji_data.Config(out=tmp_path / "more", further=True))
    assert {path.name for path in (more / "pictures").iterdir()} == {*emoji_data.STYLES, "further"}
    listed = emoji_data.CONCEPTS.read_text().split()
    assert {name.replace(" ", "-") for name in json.loads(BASE_CONCEPTS.read_text())} < {*listed}
    assert not pocket_data.KEPT_FOR_SUBJECTS & {*listed}


def test_a_package_that_was_cut_short_is_named(tmp_path):
    source = pocket_data.SOURCES["noto"]
    file = tmp_path / f"{source.package.lstrip('@').replace('/', '-')}-{source.version}.tgz"
    icons = tmp_path / "icons.json"
    icons.write_text(json.dumps({"icons": {f"a{number}": {"body": "<path/>"} for number in range(999)}}))
    with tarfile.open(file, "w:gz") as archive:
        archive.add(icons, "package/icons.json")
    assert len(pocket_data.fetch(source, tmp_path)["icons"]) == 999
    whole = file.read_bytes()
    for size in (0, 10, len(whole) // 2):
        file.write_bytes(whole[:size])
        with pytest.raises(DataError, match=f"{file.name}: no whole package"):
            pocket_data.fetch(source, tmp_path)
    icons.rename(tmp_path / "others.json")
    with tarfile.open(file, "w:gz") as archive:
        archive.add(tmp_path / "others.json", "package/others.json")
    with pytest.raises(DataError, match=r"no whole package with package/icons\.json"):
        pocket_data.fetch(source, tmp_path)
