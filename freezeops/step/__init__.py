"""One step of training: what the inner optimizer is given, and what is put back after it."""
