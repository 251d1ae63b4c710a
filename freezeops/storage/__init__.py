"""How masks are written as bytes, with a checksum, and how saved names find variables again."""
