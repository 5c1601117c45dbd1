"""Training steps and loops, losses and scores, and the training of one network."""
