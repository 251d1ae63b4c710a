"""Files: masks, deltas, checkpoints, and masks in the files of Keras and TensorFlow."""
