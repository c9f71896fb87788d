"""From a folder of pictures to batches of latents: what every trainer shares.

    examples = read_folder(Path("pictures"), caption_template="{caption}, zwx style")
    dataset = prepare(examples, base, resolution=base.resolution)
    batch = dataset.batch(seed, step, global_batch)

datasets/README.md describes the folder's format. Decoding, cropping, latents and text embeddings are done once, in
`prepare`; a batch only looks them up and samples the posterior.
"""

from sfumato.data.buckets import Crop, bucket_sizes, fit_crop
from sfumato.data.dataset import Batch, Dataset, prepare
from sfumato.data.folder import Example, Folder, Ignored, read_folder
from sfumato.data.images import Picture, open_image, open_picture

__all__ = [
    "Batch",
    "Crop",
    "Dataset",
    "Example",
    "Folder",
    "Ignored",
    "Picture",
    "bucket_sizes",
    "fit_crop",
    "open_image",
    "open_picture",
    "prepare",
    "read_folder",
]
