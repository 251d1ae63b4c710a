"""Masks of single tensors: which bit governs which entry, and the bits. Knows neither TensorFlow nor Keras."""
