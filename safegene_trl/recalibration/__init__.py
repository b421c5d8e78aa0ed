"""The few coefficients of a vector, found on a few samples."""
