"""From a folder of pictures to batches of latents: what every trainer shares.

    examples = read_folder(Path("pictures"), caption_template="{caption}, zwx style")   # or a dataset.toml
    dataset = prepare(examples, base, resolution=base.resolution)
    batch = dataset.batch(seed, step, global_batch)

datasets/README.md describes both formats. Decoding, cropping, latents and text embeddings are done once, in `prepare`;
a batch only looks them up and samples the posterior. Importing this package, and reading folders, loads no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sfumato.data.buckets import Crop, bucket_sizes, fit_crop
    from sfumato.data.dataset_config import read_folder
    from sfumato.data.folder import Example, ExampleSet
    from sfumato.data.images import Picture, open_image, open_picture
    from sfumato.data.listing import Ignored
    from sfumato.data.options import Options
    from sfumato.data.preparation.dataset import Dataset
    from sfumato.data.preparation.prepare import prepare
    from sfumato.data.preparation.texts import Batch, concat_batches

_HOME = {
    "Batch": "preparation.texts",
    "Crop": "buckets",
    "Dataset": "preparation.dataset",
    "Example": "folder",
    "ExampleSet": "folder",
    "Ignored": "listing",
    "Options": "options",
    "Picture": "images",
    "bucket_sizes": "buckets",
    "fit_crop": "buckets",
    "concat_batches": "preparation.texts",
    "open_image": "images",
    "open_picture": "images",
    "prepare": "preparation.prepare",
    "read_folder": "dataset_config",
}

__all__ = [
    "Batch",
    "Crop",
    "Dataset",
    "Example",
    "ExampleSet",
    "Ignored",
    "Options",
    "Picture",
    "bucket_sizes",
    "concat_batches",
    "fit_crop",
    "open_image",
    "open_picture",
    "prepare",
    "read_folder",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sfumato.data' has no attribute {name!r}")
    value = getattr(import_module(f"sfumato.data.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
