"""A command's time, memory and disk, told before it runs."""
