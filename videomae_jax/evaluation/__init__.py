"""How good a model is: arrays and sums in, numbers out."""
