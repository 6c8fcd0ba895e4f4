"""Pure decision rules: numbers in, verdict out; no training loop, no files."""
