"""Methods for multivariate time series."""
