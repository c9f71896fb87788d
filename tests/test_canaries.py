"""Twelve kinds of pickle in a weight file's place, at every entry point: none is ever run."""

import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import cli

ADAPTER, BASE, VAE, PICTURE = "adapter", "base", "vae", "picture"
ENTRY_POINTS = {
    "generate --lora": (ADAPTER, ["generate", "crab", "--base", "{base}", "--lora", "{file}"]),
    "generate --base": (BASE, ["generate", "crab", "--base", "{file}"]),
    "generate --vae": (VAE, ["generate", "crab", "--base", "{base}", "--vae", "{file}"]),
    "generate --image": (PICTURE, ["generate", "crab", "--base", "{base}", "--image", "{file}"]),
    "grid": (ADAPTER, ["grid", "--x", "weight=0,1", "--prompt", "crab", "--base", "{base}", "--lora", "{file}"]),
    "inspect": (ADAPTER, ["inspect", "{file}"]),
    "merge": (ADAPTER, ["merge", "{file}:1", "{file}:1", "-o", "out.safetensors"]),
    "merge --into": (BASE, ["merge", "{lora}:1", "--into", "{file}", "-o", "out"]),
    "convert": (ADAPTER, ["convert", "{file}", "-o", "out.safetensors"]),
    "resize": (ADAPTER, ["resize", "{file}", "--rank", "1", "-o", "out.safetensors"]),
    "verify": (ADAPTER, ["verify", "{file}"]),
    "clash": (ADAPTER, ["clash", "{file}", "{file}"]),
    "extract": (BASE, ["extract", "{file}", "--base", "{base}", "-o", "out.safetensors"]),
    "train lora --init-from": (ADAPTER, ["train", "lora", "{train}", "--init-from", "{file}"]),
    "train lora --base": (BASE, ["train", "lora", "{train}", "--base", "{file}"]),
    "train lora --vae": (VAE, ["train", "lora", "{train}", "--base", "{base}", "--vae", "{file}"]),
    "train lora --images": (PICTURE, ["train", "lora", "--images", "{folder}", "--output", "run", "--base", "{base}"]),
    "train pretrain --vae": (VAE, ["train", "pretrain", "--stage", "unet", "--vae", "{folder}", "--data", "{data}"]),
}
BASE_FOLDERS = ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model")


class Canary:
    """Unpickling it makes a folder."""

    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def zipped(*members):
    blob = io.BytesIO()
    with zipfile.ZipFile(blob, "w") as archive:
        for name, content in members:
            archive.writestr(name, content)
    return blob.getvalue()


def tarred(name, content):
    blob = io.BytesIO()
    with tarfile.open(fileobj=blob, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return blob.getvalue()


def saved_by_torch(canary, *, zip_format):
    blob = io.BytesIO()
    torch.save({"state_dict": canary}, blob, _use_new_zipfile_serialization=zip_format)
    return blob.getvalue()


def saved_by_numpy(canary, *, many):
    blob = io.BytesIO()
    array = np.array([canary], dtype=object)
    if many:
        np.savez(blob, a=array)
    else:
        np.save(blob, array, allow_pickle=True)
    return blob.getvalue()


def containers(place):
    """(file name, bytes) of twelve containers."""
    canary = Canary(place)
    plain = pickle.dumps(canary, 4)
    inner = zipped(("archive/data.pkl", plain))
    return {
        "raw.pkl": pickle.dumps(canary, 2),
        "old.bin": pickle.dumps(canary, 0),
        "torch.pt": saved_by_torch(canary, zip_format=True),
        "legacy.ckpt": saved_by_torch(canary, zip_format=False),
        "named.safetensors": plain,
        "zip.safetensors": inner,
        "Case.SafeTensors": saved_by_torch(canary, zip_format=True),
        "nested.zip": zipped(("inner.zip", inner), ("inner.pt", plain)),
        "archive.tar": tarred("data.pkl", plain),
        "packed.pth.gz": gzip.compress(plain),
        "picture.png": plain,
        "array.npy": saved_by_numpy(canary, many=False),
        "arrays.npz": saved_by_numpy(canary, many=True),
    }


def test_the_canaries_sing_where_pickle_is_let_in(tmp_path):
    pickle.loads(containers(tmp_path / "sang")["raw.pkl"])
    assert (tmp_path / "sang").is_dir()


def test_there_are_twelve_at_least(tmp_path):
    assert len(containers(tmp_path)) >= 12


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory, pocket_folder):
    """An adapter that fits the tiny base."""
    from sfumato.adapters import attach, select
    from sfumato.files import LoraModule, write_lora
    from sfumato.models import load_base
    from tests.tiny import CPU

    base = load_base(str(pocket_folder), precision=CPU)
    lora = attach({"unet": select(base.unet, "cross-attention")}, rank=2, alpha=2.0, seed=0)
    modules = {key: LoraModule.from_scale(x.down.detach(), x.up.detach(), x.scale) for key, x in lora.layers.items()}
    return write_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors", modules, family="pocket")


@pytest.fixture(scope="module")
def drawings(tmp_path_factory):
    """What bench/pocket_data.py builds, of one style and one concept."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "noto").mkdir()
    Image.new("RGB", (64, 64), "red").save(folder / "noto/crab.png")
    manifest = {"styles": ["noto"], "concepts": {"crab": "a sea animal"}, "withheld": []}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    (folder / "words.txt").write_text("picture\n")
    return folder


@pytest.mark.parametrize("entry", ENTRY_POINTS)
def test_no_entry_point_runs_any(entry, tmp_path, pocket_folder, pictures, lora_file, drawings, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, words = ENTRY_POINTS[entry]
    program = words[0] if words[0] != "train" else words[1]
    assert program in (*cli.TRAINERS, *cli.PIPELINES)
    for name, content in containers(tmp_path / "sang").items():
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        (folder / name).write_bytes(content)
        if "vae" in entry:  # a folder is looked into for what its library would load
            (folder / "config.json").write_text((pocket_folder / "vae/config.json").read_text())
            (folder / "diffusion_pytorch_model.bin").write_bytes(content)
        train = ["--images", str(pictures), "--output", str(tmp_path / "run"), "--caption", "{caption}", "--steps", "1"]
        if "{base}" not in words and "--base" not in words:
            train += ["--base", str(pocket_folder)]
        given = {"file": str(folder / name), "folder": str(folder), "base": str(pocket_folder), "lora": str(lora_file)}
        given["data"] = str(drawings)
        filled = [part for word in words for part in (train if word == "{train}" else [word.format(**given)])]
        code = cli.main(filled)
        said = capsys.readouterr().err
        assert not (tmp_path / "sang").exists(), (entry, name)
        assert code == 2, (entry, name, said)
        if entry == "train pretrain --vae":
            assert "only pickled weights (diffusion_pytorch_model.bin)" in said
        assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("part", BASE_FOLDERS)
@pytest.mark.parametrize("suffix", [".bin", ".safetensors", ".pt", ".ckpt"])
def test_no_part_of_a_base_folder_is_loaded_from_one(part, suffix, tmp_path, pocket_folder, capsys, monkeypatch):
    """Beside or in place of the safetensors of a part: the pickle that diffusers and transformers fall back to."""
    import shutil

    monkeypatch.chdir(tmp_path)
    for name, content in containers(tmp_path / "sang").items():
        folder = tmp_path / f"base-{name}"
        shutil.copytree(pocket_folder, folder)
        (folder / f"{part}.safetensors").unlink()
        bad = folder / f"{part.replace('text_encoder/model', 'text_encoder/pytorch_model')}{suffix}"
        if suffix == ".safetensors":
            bad = folder / f"{part}.safetensors"
        bad.write_bytes(content)
        code = cli.main(["generate", "crab", "--base", str(folder)])
        assert not (tmp_path / "sang").exists(), name
        assert code == 2, (name, capsys.readouterr().err)
        shutil.rmtree(folder)
