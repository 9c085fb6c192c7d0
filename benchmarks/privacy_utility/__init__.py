"""The benchmark of noise in split learning: tokens read and quality of the model, by noise."""
