"""Everything private of Keras and TensorFlow, and only here."""
