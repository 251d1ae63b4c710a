"""Gradients of trainable entries alone, made from what a traced step made the whole gradient from."""
