"""What validation measures: metrics, exact means, losses of the examples, the baseline."""
