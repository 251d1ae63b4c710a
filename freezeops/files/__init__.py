"""Files: masks, deltas, and what is read from the files of Keras and TensorFlow."""
