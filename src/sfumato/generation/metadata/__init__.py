"""The settings in an image's file, as other programs and ours write them."""
