"""Making a safety vector: one method, one file."""
