"""Name the classes of images with a trained network."""
