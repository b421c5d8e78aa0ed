"""The page of `safegene demo`: what the safety step does, seen at one prompt after another."""
