"""Files of thresholds: those shipped, their format, and where a model finds its own."""
