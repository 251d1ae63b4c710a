"""Uses of private names of Keras, TensorFlow and tf_keras; no other module has any. `contract.py` lists them."""
