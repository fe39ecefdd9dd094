"""Storage formats of weights: one file each, which declares FORMAT."""
