"""The `safegene` command: one subcommand, one file."""
