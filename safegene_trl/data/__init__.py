"""The data of a safety step: rows in any accepted format, and the samples that are read from them."""
