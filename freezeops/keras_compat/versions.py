"""The versions that freezeops is tested with. `setup.py` reads this file, so that it imports nothing."""

KERAS = ("3.12.0", "3.15.1")
"""The oldest and the newest Keras that the tests pass with."""

TENSORFLOW = ("2.19", "2.21")
"""The same of TensorFlow."""

TF_KERAS = ("2.19", "2.21")
"""The same of tf_keras."""
