"""The calls of users, and the masks that they come to."""
