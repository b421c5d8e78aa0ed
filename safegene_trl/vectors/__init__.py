"""Safety vectors: what they hold, their files, family, signatures, and what is made of several."""
