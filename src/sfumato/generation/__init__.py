"""Draw images with a pipeline: one call, many images, grids, and the settings in an image's file."""
