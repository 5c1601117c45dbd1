"""nn-Meter's predictors: archives, forests, and tables made by them."""
