"""The subject of these tests, and the U-Net that learned it."""

from sfumato.files import read_tensors

STEPS = 3
PROMPT, CLASS = "sks square", "square"


def unet_of(folder):
    return read_tensors(folder / "unet/diffusion_pytorch_model.safetensors")
