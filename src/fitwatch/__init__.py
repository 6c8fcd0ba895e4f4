"""fitwatch: a small PyTorch Trainer that is exact about weighted losses and honest about overfitting."""
