"""Methods: what is trained, and what it is worth; one file each."""
