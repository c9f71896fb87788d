"""The same with a real base's classes, and in other processes."""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sfumato.adapters.embeddings import embedding
from sfumato.data import concat_batches, prepare, read_folder
from sfumato.data.preparation.cache import Cache
from sfumato.data.preparation.texts import CaptionEmbeddings

PROGRAM = """
import hashlib, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from made_up import FakeBase
from sfumato.data import prepare, read_folder
data = prepare(
    read_folder(Path(sys.argv[2]), caption_template="{caption}, tall, red"), FakeBase(deviation=1.0), resolution=64,
    flip=True, crop="random", shuffle_tags=True, tag_dropout=0.2, caption_dropout=0.2,
)
first, count = int(sys.argv[3]), int(sys.argv[4])
for step in range(4):
    batch = data.batch(7, step, 8, first, count)
    for row in range(count):
        parts = (batch.latents[row].numpy().tobytes(), batch.captions[row].encode(), batch.crops[row].numpy().tobytes())
        print(step, first + row, hashlib.sha256(b"".join(parts)).hexdigest())
"""


@pytest.fixture(scope="module")
def real(pocket_folder):
    from sfumato.models import load_base
    from tests.tiny import CPU

    return load_base(str(pocket_folder), precision=CPU)


def test_a_cache_gives_a_real_base_s_batches_bit_by_bit(real, pictures, tmp_path):
    examples = read_folder(pictures, caption_template="{caption}, red, cat")
    options = {"resolution": 64, "flip": True, "shuffle_tags": True, "caption_dropout": 0.2, "will_draw": (0, 6, 3)}
    first, second, plain = (
        prepare(examples, real, **options, cache=cache) for cache in (tmp_path / "c", tmp_path / "c", None)
    )
    for step in range(6):
        for other in (second, plain):
            one, two = first.batch(0, step, 3), other.batch(0, step, 3)
            assert one.captions == two.captions
            assert torch.equal(one.latents, two.latents)
            assert torch.equal(one.text.hidden, two.text.hidden)


def test_a_changed_weight_of_a_real_text_encoder_is_seen(real, pictures, tmp_path):
    examples = read_folder(pictures, caption_template="{caption}")
    before = prepare(examples, real, resolution=64, cache=tmp_path / "c").batch(0, 0, 2)
    weight = real.text_encoders[0].get_input_embeddings().weight
    with torch.no_grad():
        weight += 0.1
    after = prepare(examples, real, resolution=64, cache=tmp_path / "c").batch(0, 0, 2)
    with torch.no_grad():
        weight -= 0.1
    assert torch.equal(before.latents, after.latents)
    assert not torch.equal(before.text.hidden, after.text.hidden)


def test_a_cache_tells_another_pad_token_and_another_word_of_one_name(real, tmp_path):
    cache, plain = Cache(tmp_path), real.tokenizers
    width = real.text_encoders[0].get_input_embeddings().weight.shape[1]

    def is_direct(prompt):
        texts = CaptionEmbeddings(real, cache)
        texts.compute([prompt])
        return torch.equal(texts[[prompt]].hidden, real.encode_text([prompt]).hidden)

    assert is_direct("a cat")
    real.tokenizers = (copy.deepcopy(plain[0]),)
    real.tokenizers[0].pad_token = "!"
    try:
        assert is_direct("a cat")
    finally:
        real.tokenizers = plain
    for value in (0.1, 0.2):
        with embedding.Words(real, {"<otter>": {"text_encoder": torch.full((2, width), value)}}), torch.no_grad():
            assert is_direct("a <otter>")
            assert is_direct("a cat")
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4


def test_real_embeddings_are_joined(real, pictures):
    examples = read_folder(pictures, caption_template="{caption}")
    batch = prepare(examples, real, resolution=64).batch(0, 0, 2)
    both = concat_batches(batch, batch)
    assert both.text.hidden.shape[0] == both.latents.shape[0] == 4


@pytest.mark.slow
def test_two_processes_and_one_give_the_same_global_batches(pictures, monkeypatch, capsys):
    here = str(Path(__file__).parent)

    def start(first, count, hash_seed):
        command = [sys.executable, "-c", PROGRAM, here, str(pictures), str(first), str(count)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={"PYTHONHASHSEED": hash_seed})

    halves = [start(0, 4, "2"), start(4, 4, "3")]
    monkeypatch.setattr(sys, "argv", ["-c", here, str(pictures), "0", "8"])
    exec(compile(PROGRAM, "PROGRAM", "exec"), {})
    whole = capsys.readouterr().out.splitlines()
    assert len(whole) == 32
    assert sorted(whole) == sorted("".join(half.communicate(timeout=600)[0] for half in halves).splitlines())
