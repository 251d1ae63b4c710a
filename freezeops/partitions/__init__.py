"""The split of one variable between frozen and trainable entries."""
