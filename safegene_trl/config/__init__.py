"""What users set: the settings of the safety step and of its gate, and one way of checking them."""
