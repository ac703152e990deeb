"""Evidence: the questions of the paper, asked again at a scale that two cores or one GPU can run."""
