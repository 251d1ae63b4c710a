"""How one variable is split between frozen and trainable entries."""
