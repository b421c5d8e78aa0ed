"""What each choice of the recalibration is worth, on fine-tunes of a known model."""
